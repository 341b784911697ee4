"""Mixture-of-experts arithmetic in plain XLA: work grows with tokens, never with experts x tokens.

Rows are sorted by expert; a loop walks blocks of rows, each of one expert, and multiplies a block
by that expert's matrix. The trip count is the number of blocks that hold rows, known only at run
time, so experts without tokens cost nothing and their weights are not read.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

MIN_BLOCK = 8
MAX_BLOCK = 256


class Dispatch(NamedTuple):
    """Where the routed rows go.

    Attributes:
        order_R: routed row (token * X + choice) of each sorted row.
        group_sizes_E: rows of each expert; rows of no expert are sorted last and not counted.
    """

    order_R: jax.Array
    group_sizes_E: jax.Array


def dispatch(expert_TX: jax.Array, num_experts: int) -> Dispatch:
    """Sort routed rows by expert, in token order inside one; ids outside 0..E-1 go to nobody."""
    expert_R = expert_TX.reshape(-1)
    is_routed_R = (expert_R >= 0) & (expert_R < num_experts)
    expert_R = jnp.where(is_routed_R, expert_R, num_experts)
    order_R = jnp.argsort(expert_R, stable=True)
    group_sizes_E = jnp.bincount(expert_R, length=num_experts + 1)[:num_experts]
    return Dispatch(order_R, group_sizes_E.astype(jnp.int32))


def combine(y_RD: jax.Array, to: Dispatch, experts_per_token: int) -> jax.Array:
    """Bring sorted rows back to their tokens and add a token's choices up. Returns y_TD."""
    R, D = y_RD.shape
    is_routed_R = jnp.arange(R) < to.group_sizes_E.sum()
    y_RD = jnp.where(is_routed_R[:, None], y_RD, 0)
    unsorted_RD = jnp.zeros_like(y_RD).at[to.order_R].set(y_RD, unique_indices=True)
    return unsorted_RD.reshape(-1, experts_per_token, D).sum(1)


def _block_rows(num_rows: int, num_experts: int) -> int:
    """Return the rows of a block: about an expert's mean share, within MIN_BLOCK and MAX_BLOCK.

    An expert that a few rows share should be one block: each block reads its matrix once more.
    """
    share = -(-num_rows // num_experts)
    return min(MAX_BLOCK, num_rows, max(MIN_BLOCK, 1 << max(share - 1, 0).bit_length()))


class _Blocks(NamedTuple):
    """The run-time schedule: blocks of each expert before it, and the first row of each expert."""

    ends_E: jax.Array
    offsets_E: jax.Array
    sizes_E: jax.Array


def _schedule(group_sizes_E: jax.Array, rows: int) -> _Blocks:
    ends_E = jnp.cumsum(-(-group_sizes_E // rows))
    offsets_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    return _Blocks(ends_E, offsets_E, group_sizes_E)


def _locate(blocks: _Blocks, i: jax.Array, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the expert of block i, its first row, and how many rows from there are its own."""
    expert = jnp.searchsorted(blocks.ends_E, i, side="right").astype(jnp.int32)
    before = jnp.where(expert > 0, blocks.ends_E[expert - 1], 0)
    inside = (i - before) * rows
    return expert, blocks.offsets_E[expert] + inside, blocks.sizes_E[expert] - inside


def _pad_rows(x: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(x, ((0, rows), (0, 0)))


@jax.custom_vjp
def grouped_matmul(
    x_RD: jax.Array, w_NDF: jax.Array, group_sizes_E: jax.Array, first: jax.Array | int
) -> jax.Array:
    """Multiply each run of sorted rows by its expert's matrix.

    Args:
        x_RD: rows sorted by expert.
        w_NDF: matrices of these experts and perhaps of others; the loop reads those it needs.
        group_sizes_E: int32 rows of each expert; rows beyond their sum belong to nobody.
        first: int32 place of expert 0's matrix in w_NDF; the others follow it.

    Returns:
        y_RF in the dtype of x; rows of nobody are arbitrary but finite.
    """
    (R, D), F, E = x_RD.shape, w_NDF.shape[2], group_sizes_E.shape[0]
    rows = _block_rows(R, E)
    blocks = _schedule(group_sizes_E, rows)
    x_padded = _pad_rows(x_RD, rows)

    def body(i: jax.Array, y: jax.Array) -> jax.Array:
        expert, start, _ = _locate(blocks, i, rows)
        x = jax.lax.dynamic_slice(x_padded, (start, 0), (rows, D))
        w = jax.lax.dynamic_index_in_dim(w_NDF, first + expert, keepdims=False)
        # Rows past the expert's end are overwritten by the blocks that follow.
        return jax.lax.dynamic_update_slice(y, jnp.dot(x, w).astype(y.dtype), (start, 0))

    y = jnp.zeros((R + rows, F), x_RD.dtype)
    return jax.lax.fori_loop(0, blocks.ends_E[-1], body, y)[:R]


def _grouped_outer(x_RD: jax.Array, dy_RF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Sum x^T dy over each expert's rows: the float32 gradient of its matrix. Returns dw_EDF."""
    (R, D), F, E = x_RD.shape, dy_RF.shape[1], group_sizes_E.shape[0]
    rows = _block_rows(R, E)
    blocks = _schedule(group_sizes_E, rows)
    x_padded, dy_padded = _pad_rows(x_RD, rows), _pad_rows(dy_RF, rows)

    def body(i: jax.Array, dw: jax.Array) -> jax.Array:
        expert, start, count = _locate(blocks, i, rows)
        x = jax.lax.dynamic_slice(x_padded, (start, 0), (rows, D))
        dy = jax.lax.dynamic_slice(dy_padded, (start, 0), (rows, F))
        x = jnp.where(jnp.arange(rows)[:, None] < count, x, 0)
        dw_DF = jnp.einsum("RD,RF->DF", x, dy, preferred_element_type=jnp.float32)
        dw_DF += jax.lax.dynamic_index_in_dim(dw, expert, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(dw, dw_DF, expert, 0)

    return jax.lax.fori_loop(0, blocks.ends_E[-1], body, jnp.zeros((E, D, F), jnp.float32))


class _Saved(NamedTuple):
    """The arguments of the product, for its gradient."""

    x_RD: jax.Array
    w_NDF: jax.Array
    group_sizes_E: jax.Array
    first: jax.Array | int


def _grouped_matmul_fwd(
    x_RD: jax.Array, w_NDF: jax.Array, group_sizes_E: jax.Array, first: jax.Array | int
) -> tuple[jax.Array, _Saved]:
    saved = _Saved(x_RD, w_NDF, group_sizes_E, first)
    return grouped_matmul(*saved), saved


def _grouped_matmul_bwd(saved: _Saved, dy_RF: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    x_RD, w_NDF, group_sizes_E, first = saved
    is_routed_R = jnp.arange(x_RD.shape[0]) < group_sizes_E.sum()
    dx_RD = grouped_matmul(dy_RF, w_NDF.transpose(0, 2, 1), group_sizes_E, first)
    dw = _grouped_outer(x_RD, dy_RF, group_sizes_E).astype(w_NDF.dtype)
    if dw.shape != w_NDF.shape:
        dw = jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(w_NDF), dw, first, axis=0)
    return jnp.where(is_routed_R[:, None], dx_RD, 0), dw, None, None


grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


@functools.partial(jax.named_call, name="expert_mlp")
def expert_mlp(
    x_TD: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    *,
    expert_TX: jax.Array,
    gate_TX: jax.Array,
    group: jax.Array | None = None,
) -> jax.Array:
    """Route, apply each expert's SwiGLU to the gated input, and add up. See `api.expert_mlp`."""
    T, X = expert_TX.shape
    E = w_gate.shape[-3]
    first = 0 if group is None else group * E
    w_gate, w_up, w_down = (w.reshape(-1, *w.shape[-2:]) for w in (w_gate, w_up, w_down))
    to = dispatch(expert_TX, E)
    x_RD = x_TD[to.order_R // X] * gate_TX.reshape(T * X)[to.order_R][:, None].astype(x_TD.dtype)
    hidden_RF = jax.nn.silu(grouped_matmul(x_RD, w_gate, to.group_sizes_E, first))
    hidden_RF = hidden_RF * grouped_matmul(x_RD, w_up, to.group_sizes_E, first)
    return combine(grouped_matmul(hidden_RF, w_down, to.group_sizes_E, first), to, X)
