"""Mixture-of-experts arithmetic in plain XLA: work grows with tokens, never with experts x tokens.

Rows are sorted by expert; a loop walks blocks of rows, each of one expert, and takes a block
through all of that expert's matrices. The trip count is the number of blocks that hold rows, known
only at run time, so experts without tokens cost nothing and their weights are not read.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention.reference import dot_f32
from kernels_pallas.backend import vary_alike
from kernels_pallas.experts.dispatch import (
    Blocks,
    Dispatch,
    blocks_of,
    combine_sorted,
    sort_rows,
)
from kernels_pallas.experts.inputs import Inputs, stored_as
from kernels_pallas.experts.quantize import fp8_rows, unpack_int4

MIN_BLOCK = 8
MAX_BLOCK = 256


def block_rows(num_rows: int, num_experts: int) -> int:
    """Return the rows of a block: about an expert's mean share, within MIN_BLOCK and MAX_BLOCK.

    An expert that a few rows share should be one block: each block reads its matrix once more.
    """
    share = -(-num_rows // num_experts)
    return min(MAX_BLOCK, num_rows, max(MIN_BLOCK, 1 << max(share - 1, 0).bit_length()))


def blocks_of_sorted(group_sizes_E: jax.Array, num_rows: int, size: int) -> Blocks:
    """List blocks of up to `size` of the rows that `dispatch.sort_rows` sorts."""
    offsets_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    return blocks_of(offsets_E, group_sizes_E, size, num_rows)


class _Walk(NamedTuple):
    """The blocks of a call: which rows each takes, and the arrays that they come from."""

    x: Inputs
    to: Dispatch
    blocks: Blocks
    token_R: jax.Array
    gate_R1: jax.Array
    rows: int

    @staticmethod
    def of(x: Inputs, num_experts: int, to: Dispatch | None = None) -> "_Walk":
        """Plan a walk over all rows; arrays by row are filled up by one block."""
        to = sort_rows(x.expert_TX, num_experts) if to is None else to
        R, X = to.order_R.shape[0], x.expert_TX.shape[1]
        rows = block_rows(R, num_experts)
        gate_R = x.gate_TX.reshape(R)[to.order_R].astype(jnp.float32)
        return _Walk(
            x,
            to,
            blocks_of_sorted(to.group_sizes_E, R, rows),
            jnp.pad(to.order_R // X, (0, rows)),
            jnp.pad(gate_R, (0, rows))[:, None],
            rows,
        )

    def at(self, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return block i: number of its matrices, first row, tokens, gates, and which are its."""
        expert, start, count, *_ = jax.tree.map(lambda field: field[i], self.blocks.fields)
        tokens = jax.lax.dynamic_slice_in_dim(self.token_R, start, self.rows)
        gates = jax.lax.dynamic_slice_in_dim(self.gate_R1, start, self.rows)
        return self.x.first + expert, start, tokens, gates, jnp.arange(self.rows)[:, None] < count

    def run(self, body, carry):
        """Fold a function of (block, carry) over the blocks that hold rows."""
        carry, _ = vary_alike((carry, self.x))
        return jax.lax.fori_loop(0, self.blocks.total, body, carry)


def _pick(w_NDF: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(w_NDF, number, keepdims=False)


def _multiply(
    rows: jax.Array, w_NDF: jax.Array, scale_NF: jax.Array | None, number: jax.Array, stored: str
) -> jax.Array:
    """Multiply rows by one matrix as stored; float32."""
    w_DF = _pick(w_NDF, number)
    if scale_NF is None:
        return dot_f32("RD,DF->RF", rows, w_DF)
    scale_F = _pick(scale_NF, number)
    if stored == "int4":
        return dot_f32("RD,DF->RF", rows, unpack_int4(w_DF, scale_F).astype(rows.dtype))
    if stored == "int8":
        return dot_f32("RD,DF->RF", rows, w_DF.astype(rows.dtype)) * scale_F
    rows, row_scale_R1 = fp8_rows(rows)
    product_RF = dot_f32("RD,DF->RF", rows.astype(jnp.bfloat16), w_DF.astype(jnp.bfloat16))
    return product_RF * row_scale_R1 * scale_F


def refusal(x: Inputs, num_experts: int) -> None:
    """Refuse nothing."""


class Saved(NamedTuple):
    """What the gradient needs: the order of rows, and their products before the gate."""

    to: Dispatch
    a_RF: jax.Array
    b_RF: jax.Array


def forward(x: Inputs, num_experts: int, *, saves: bool) -> tuple[jax.Array, Saved | None]:
    """Apply the experts. Returns y_TD in the dtype of x, and what `backward` wants if it saves."""
    walk, stored, dtype = _Walk.of(x, num_experts), stored_as(x), x.x_TD.dtype
    (R,), (_, D) = walk.to.order_R.shape, x.x_TD.shape
    gate, up, down = (None, None, None) if x.scales is None else x.scales

    def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        number, start, tokens, gates, _ = walk.at(i)
        rows = x.x_TD[tokens]
        a = _multiply(rows, x.w_gate_NDF, gate, number, stored)
        b = _multiply(rows, x.w_up_NDF, up, number, stored)
        hidden = (jax.nn.silu(gates * a) * (gates * b)).astype(dtype)
        y = _multiply(hidden, x.w_down_NFD, down, number, stored)
        # Rows past the expert's end are overwritten by the blocks that follow.
        results = (y, a, b) if saves else (y,)
        return tuple(
            jax.lax.dynamic_update_slice(all_rows, part.astype(dtype), (start, 0))
            for all_rows, part in zip(carry, results, strict=True)
        )

    F = x.w_down_NFD.shape[1] * (2 if stored == "int4" else 1)
    widths = (D, F, F) if saves else (D,)
    with jax.named_scope("expert_mlp"):
        y_RD, *ab = walk.run(body, tuple(jnp.zeros((R + walk.rows, n), dtype) for n in widths))
        y_TD = combine_sorted(y_RD[:R], walk.to, x.expert_TX.shape[1])
        if x.shared_TD is not None:
            y_TD += x.shared_TD
    return y_TD, Saved(walk.to, *ab) if saves else None


def backward(
    x: Inputs, num_experts: int, saved: Saved, dy_TD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return dx_TD, the gradients of the three matrices, and dgate_TX.

    With a, b the products of a row and g its gate, h = silu(g a) g b; da, db are the gradients of
    g a, g b, so those of a, b are g da, g db, and that of g is the sum of a da + b db.
    """
    walk, dtype = _Walk.of(x, num_experts, saved.to), x.x_TD.dtype
    (R,), (T, D), X = walk.to.order_R.shape, x.x_TD.shape, x.expert_TX.shape[1]
    weights = (x.w_gate_NDF, x.w_up_NDF, x.w_down_NFD)
    E = num_experts

    def grow(total_EDF: jax.Array, expert: jax.Array, left: jax.Array, right: jax.Array):
        part_DF = dot_f32("RD,RF->DF", left, right) + _pick(total_EDF, expert)
        return jax.lax.dynamic_update_index_in_dim(total_EDF, part_DF, expert, 0)

    def body(i: jax.Array, carry):
        dx_RD, dgate_R1, d_gate, d_up, d_down = carry
        number, start, tokens, gates, own = walk.at(i)
        rows, gates = jnp.where(own, x.x_TD[tokens], 0), jnp.where(own, gates, 0)
        dy = jnp.where(own, dy_TD[tokens], 0)
        a, b = (
            jnp.where(own, jax.lax.dynamic_slice_in_dim(s, start, walk.rows), 0).astype(jnp.float32)
            for s in (saved.a_RF, saved.b_RF)
        )
        hidden, pull = jax.vjp(lambda ga, gb: jax.nn.silu(ga) * gb, gates * a, gates * b)
        w_gate, w_up, w_down = (_pick(w, number) for w in weights)
        da, db = pull(dot_f32("RD,FD->RF", dy, w_down))
        dgate = (a * da + b * db).sum(1, keepdims=True)
        da, db = ((gates * d).astype(dtype) for d in (da, db))
        dx = dot_f32("RF,DF->RD", da, w_gate) + dot_f32("RF,DF->RD", db, w_up)
        expert = number - x.first
        return (
            jax.lax.dynamic_update_slice(dx_RD, dx.astype(dtype), (start, 0)),
            jax.lax.dynamic_update_slice(dgate_R1, dgate, (start, 0)),
            grow(d_gate, expert, rows, da),
            grow(d_up, expert, rows, db),
            grow(d_down, expert, hidden.astype(dtype), dy),
        )

    with jax.named_scope("expert_mlp_backward"):
        zeros = (
            jnp.zeros((R + walk.rows, D), dtype),
            jnp.zeros((R + walk.rows, 1), jnp.float32),
            *(jnp.zeros((E, *w.shape[1:]), jnp.float32) for w in weights),
        )
        dx_RD, dgate_R1, *d_weights = walk.run(body, zeros)
        dx_TD = combine_sorted(dx_RD[:R], walk.to, X)
        dgate_TX = combine_sorted(dgate_R1[:R], walk.to, 1).reshape(T, X).astype(x.gate_TX.dtype)
    d_gate, d_up, d_down = (
        _among(x.first, dw, w) for dw, w in zip(d_weights, weights, strict=True)
    )
    return dx_TD, d_gate, d_up, d_down, dgate_TX


def _among(first: jax.Array, dw_EDF: jax.Array, w_NDF: jax.Array) -> jax.Array:
    """Place the gradients of E matrices among those of all layers, in their dtype."""
    dw_EDF = dw_EDF.astype(w_NDF.dtype)
    if dw_EDF.shape == w_NDF.shape:
        return dw_EDF
    return jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(w_NDF), dw_EDF, first, axis=0)
