"""Key-value caches: a layer appends its tokens and attends, and knows no layout."""

from llama4_jax.cache.layers import Cache, CacheView, LayerCache

__all__ = ["Cache", "CacheView", "LayerCache"]
