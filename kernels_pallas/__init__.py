"""Pallas kernels, one folder per operation; this package knows jax only, never llama4_jax."""

from kernels_pallas.attention.api import chunked_attention, merge_attention
from kernels_pallas.backend import interpreted, reference_only
from kernels_pallas.decode.api import decode_attention
from kernels_pallas.experts.api import expert_mlp
from kernels_pallas.experts.grouped import combine, dispatch, grouped_matmul
from kernels_pallas.experts.inputs import WeightScales
from kernels_pallas.experts.parallel import expert_mlp_parallel
from kernels_pallas.prefill.api import prefill_attention

__version__ = "0.1.0"

__all__ = [
    "chunked_attention", "decode_attention", "prefill_attention", "merge_attention",
    "expert_mlp", "expert_mlp_parallel", "WeightScales", "dispatch", "grouped_matmul", "combine",
    "interpreted", "reference_only",
]  # fmt: skip
