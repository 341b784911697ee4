"""Prefill attention in plain XLA: decode attention, with each block of queries as a row."""

import jax

from kernels_pallas.attention.visibility import Settings
from kernels_pallas.decode import reference
from kernels_pallas.decode.inputs import Inputs
from kernels_pallas.prefill.queries import in_blocks

BLOCK, SLOTS = 128, 256  # queries and slots at a time


def unsupported_reason(x: Inputs, how: Settings) -> None:
    """Refuse nothing."""


def forward(x: Inputs, how: Settings, *, out_dtype: jax.typing.DTypeLike):
    """Attend. Returns out_BTNH in out_dtype and lse_BTN in float32."""
    B, T = x.q_positions_BT.shape
    with jax.named_scope("prefill_attention"):
        rows = in_blocks(x, min(T, BLOCK))
        found = reference.attend(rows, how, out_dtype=out_dtype, slots=SLOTS)
    return tuple(a.reshape(B, -1, *a.shape[2:])[:, :T] for a in found)
