"""The model: decoder, vision encoder, cache."""

from llama4_jax.model.cache import Cache
from llama4_jax.model.llama4 import Hidden, Llama4, Output

__all__ = ["Cache", "Hidden", "Llama4", "Output"]
