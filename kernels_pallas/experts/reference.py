"""Mixture-of-experts arithmetic in plain XLA: work grows with tokens, never with experts x tokens.

Rows are sorted by expert; a loop walks blocks of rows, each of one expert, and multiplies a block
by that expert's matrix. The trip count is the number of blocks that hold rows, known only at run
time, so experts without tokens cost nothing and their weights are not read.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention.reference import dot_f32
from kernels_pallas.backend import vary_alike
from kernels_pallas.experts.dispatch import Block, Dispatch, blocks_of, combine_sorted, sort_rows
from kernels_pallas.experts.inputs import Inputs, among_layers, stored_as
from kernels_pallas.experts.quantize import fp8_rows, unpack_int4

MIN_BLOCK = 8
MAX_BLOCK = 256


def block_rows(num_rows: int, num_experts: int) -> int:
    """Return the rows of a block: about an expert's mean share, within MIN_BLOCK and MAX_BLOCK.

    An expert that a few rows share should be one block: each block reads its matrix once more.
    """
    share = -(-num_rows // num_experts)
    return min(MAX_BLOCK, num_rows, max(MIN_BLOCK, 1 << max(share - 1, 0).bit_length()))


def _fold(
    body: Callable[[Block, list[jax.Array], jax.Array], jax.Array],
    result: jax.Array,
    arrays: list[jax.Array],
    sizes_E: jax.Array,
    rows: int,
) -> jax.Array:
    """Fold a function of (block, its rows of the arrays, result) over the blocks that hold rows.

    A block's arrays have so many rows; those past its own are of experts that follow.
    """
    R = arrays[0].shape[0]
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    fields, total = blocks_of(starts_E, sizes_E, rows, R)
    padded = [jnp.pad(array, ((0, rows), (0, 0))) for array in arrays]

    def step(i: jax.Array, result: jax.Array) -> jax.Array:
        block = Block(*(field[i] for field in fields))
        parts = [jax.lax.dynamic_slice_in_dim(array, block.start, rows) for array in padded]
        return body(block, parts, result)

    return jax.lax.fori_loop(0, total, step, result)


def _pick(w_NDF: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(w_NDF, number, keepdims=False)


def _multiply_stored(
    rows: jax.Array, w_DF: jax.Array, scale_F: jax.Array, stored: str
) -> jax.Array:
    """Multiply rows by one matrix as stored; float32."""
    if stored == "int4":
        return dot_f32("RD,DF->RF", rows, unpack_int4(w_DF, scale_F).astype(rows.dtype))
    if stored == "int8":
        return dot_f32("RD,DF->RF", rows, w_DF.astype(rows.dtype)) * scale_F
    rows, row_scale_R1 = fp8_rows(rows)
    product_RF = dot_f32("RD,DF->RF", rows.astype(jnp.bfloat16), w_DF.astype(jnp.bfloat16))
    return product_RF * row_scale_R1 * scale_F


def grouped_matmul(
    x_RD: jax.Array,
    w_NDF: jax.Array,
    sizes_E: jax.Array,
    first: jax.Array,
    *,
    is_transposed: bool = False,
    scale_NF: jax.Array | None = None,
    stored: str = "float",
    dtype: Any = None,
) -> jax.Array:
    """Multiply each run of sorted rows by its expert's matrix; no gradient of its own.

    Args:
        x_RD: rows sorted by expert.
        w_NDF: matrices of these experts and perhaps of others, as stored.
        sizes_E: int32 rows of each expert; rows beyond their sum belong to no expert.
        first: number of expert 0's matrix in w_NDF; the others follow it.
        is_transposed: whether float matrices are [N, F, D].
        scale_NF: scales of stored matrices.
        stored: how matrices are stored.
        dtype: of the result; that of x if it is None.

    Returns:
        y_RF; rows of no expert are zero.
    """
    (R, _), F = x_RD.shape, w_NDF.shape[1 if is_transposed else 2]
    rows, dtype = block_rows(R, sizes_E.shape[0]), dtype or x_RD.dtype
    product = "RD,FD->RF" if is_transposed else "RD,DF->RF"

    def body(block: Block, parts: list[jax.Array], y_RF: jax.Array) -> jax.Array:
        number = first + block.expert
        if scale_NF is None:
            part = dot_f32(product, parts[0], _pick(w_NDF, number))
        else:
            w_DF, scale_F = _pick(w_NDF, number), _pick(scale_NF, number)
            part = _multiply_stored(parts[0], w_DF, scale_F, stored)
        # Rows past the expert's end are overwritten by the blocks that follow.
        return jax.lax.dynamic_update_slice(y_RF, part.astype(dtype), (block.start, 0))

    y_RF, *_ = vary_alike((jnp.zeros((R + rows, F), dtype), x_RD, w_NDF, sizes_E))
    y_RF = _fold(body, y_RF, [x_RD], sizes_E, rows)[:R]
    return jnp.where((jnp.arange(R) < sizes_E.sum())[:, None], y_RF, 0)


def grouped_outer(x_RD: jax.Array, dy_RF: jax.Array, sizes_E: jax.Array, dtype: Any) -> jax.Array:
    """Sum x^T dy over each expert's rows in float32: the gradient of its matrix.

    Args:
        x_RD: rows sorted by expert.
        dy_RF: rows in the same order.
        sizes_E: int32 rows of each expert; rows beyond their sum belong to no expert.
        dtype: of the result.

    Returns:
        dw_EDF; zero for experts without rows.
    """
    (R, D), F, (E,) = x_RD.shape, dy_RF.shape[1], sizes_E.shape
    rows = block_rows(R, E)

    def body(block: Block, parts: list[jax.Array], dw_EDF: jax.Array) -> jax.Array:
        is_own = jnp.arange(rows)[:, None] < block.rows
        x, dy = (jnp.where(is_own, part, 0) for part in parts)
        dw_DF = dot_f32("RD,RF->DF", x, dy) + _pick(dw_EDF, block.expert)
        return jax.lax.dynamic_update_index_in_dim(dw_EDF, dw_DF, block.expert, 0)

    dw_EDF, *_ = vary_alike((jnp.zeros((E, D, F), jnp.float32), x_RD, dy_RF, sizes_E))
    return _fold(body, dw_EDF, [x_RD, dy_RF], sizes_E, rows).astype(dtype)


def unsupported_reason(x: Inputs, num_experts: int) -> None:
    """Refuse nothing."""


class Saved(NamedTuple):
    """What the gradient needs: the order of rows, and their products before the gate."""

    to: Dispatch
    a_RF: jax.Array
    b_RF: jax.Array


def _gates(x: Inputs, to: Dispatch) -> jax.Array:
    return x.gate_TX.reshape(-1)[to.order_R][:, None].astype(jnp.float32)


def forward(x: Inputs, num_experts: int, *, saves: bool) -> tuple[jax.Array, Saved | None]:
    """Apply the experts. Returns y_TD in the dtype of x, and what `backward` wants if it saves."""
    to, X, dtype = sort_rows(x.expert_TX, num_experts), x.expert_TX.shape[1], x.x_TD.dtype
    gate, up, down = (None, None, None) if x.scales is None else x.scales

    def multiply(x_RD: jax.Array, w: jax.Array, scale: jax.Array | None, dtype: Any) -> jax.Array:
        how = {"scale_NF": scale, "stored": stored_as(x), "dtype": dtype}
        return grouped_matmul(x_RD, w, to.group_sizes_E, x.first, **how)

    with jax.named_scope("expert_mlp"):
        x_RD, gate_R1 = x.x_TD[to.order_R // X], _gates(x, to)
        a_RF = multiply(x_RD, x.w_gate_NDF, gate, jnp.float32)
        b_RF = multiply(x_RD, x.w_up_NDF, up, jnp.float32)
        hidden_RF = (jax.nn.silu(gate_R1 * a_RF) * (gate_R1 * b_RF)).astype(dtype)
        y_TD = combine_sorted(multiply(hidden_RF, x.w_down_NFD, down, dtype), to, X)
        if x.shared_TD is not None:
            y_TD += x.shared_TD
    return y_TD, Saved(to, a_RF.astype(dtype), b_RF.astype(dtype)) if saves else None


def backward(
    x: Inputs, num_experts: int, saved: Saved, dy_TD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return dx_TD, the gradients of the three matrices, and dgate_TX.

    With a, b the products of a row and g its gate, h = silu(g a) g b; da, db are the gradients of
    g a, g b, so those of a, b are g da, g db, and that of g is the sum of a da + b db.
    """
    del num_experts  # the order of rows knows
    to, (T, X), dtype = saved.to, x.expert_TX.shape, x.x_TD.dtype
    sizes_E = to.group_sizes_E

    def back(dy: jax.Array, w: jax.Array) -> jax.Array:
        how = {"is_transposed": True, "dtype": jnp.float32}
        return grouped_matmul(dy, w, sizes_E, x.first, **how)

    with jax.named_scope("expert_mlp_backward"):
        x_RD, dy_RD = (array[to.order_R // X] for array in (x.x_TD, dy_TD))
        gate_R1, a_RF, b_RF = _gates(x, to), *(s.astype(jnp.float32) for s in saved[1:])
        hidden_RF, pull = jax.vjp(
            lambda ga, gb: jax.nn.silu(ga) * gb, gate_R1 * a_RF, gate_R1 * b_RF
        )
        da_RF, db_RF = pull(back(dy_RD, x.w_down_NFD))
        dgate_R1 = (a_RF * da_RF + b_RF * db_RF).sum(1, keepdims=True)
        da_RF, db_RF = ((gate_R1 * d_RF).astype(dtype) for d_RF in (da_RF, db_RF))
        dx_RD = back(da_RF, x.w_gate_NDF) + back(db_RF, x.w_up_NDF)
        outer = functools.partial(grouped_outer, sizes_E=sizes_E, dtype=x.w_up_NDF.dtype)
        d_gate, d_up = outer(x_RD, da_RF), outer(x_RD, db_RF)
        d_down = outer(hidden_RF.astype(dtype), dy_RD)
        dx_TD = combine_sorted(dx_RD.astype(dtype), to, X)
        dgate_TX = combine_sorted(dgate_R1, to, 1).reshape(T, X).astype(x.gate_TX.dtype)
    weights = zip((d_gate, d_up, d_down), (x.w_gate_NDF, x.w_up_NDF, x.w_down_NFD), strict=True)
    d_gate, d_up, d_down = (among_layers(dw, x.first, w) for dw, w in weights)
    return dx_TD, d_gate, d_up, d_down, dgate_TX
