"""The model: decoder, vision encoder, and the cache it decodes with."""

from llama4_jax.cache.layers import Cache
from llama4_jax.model.llama4 import Hidden, Llama4, Output

__all__ = ["Cache", "Hidden", "Llama4", "Output"]
