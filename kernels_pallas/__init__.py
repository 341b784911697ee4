"""Pallas kernels, one folder per operation; this package knows jax only, never llama4_jax."""

from kernels_pallas.attention.api import chunked_attention, merge_attention
from kernels_pallas.backend import interpreted
from kernels_pallas.decode.api import decode_attention

__all__ = ["chunked_attention", "decode_attention", "merge_attention", "interpreted"]
