"""The grouped product on its own: each run of sorted rows times its expert's matrix."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.backend import vary_alike
from kernels_pallas.experts.reference import block_rows, locate, schedule


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
    rows = block_rows(R, E)
    blocks = schedule(group_sizes_E, rows)
    x_padded = _pad_rows(x_RD, rows)

    def body(i: jax.Array, y: jax.Array) -> jax.Array:
        expert, start, _ = locate(blocks, i, rows)
        x = jax.lax.dynamic_slice(x_padded, (start, 0), (rows, D))
        w = jax.lax.dynamic_index_in_dim(w_NDF, first + expert, keepdims=False)
        # Rows past the expert's end are overwritten by the blocks that follow.
        return jax.lax.dynamic_update_slice(y, jnp.dot(x, w).astype(y.dtype), (start, 0))

    y, *_ = vary_alike((jnp.zeros((R + rows, F), x_RD.dtype), x_RD, w_NDF, group_sizes_E))
    return jax.lax.fori_loop(0, blocks.ends_E[-1], body, y)[:R]


def _grouped_outer(x_RD: jax.Array, dy_RF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Sum x^T dy over each expert's rows: the float32 gradient of its matrix. Returns dw_EDF."""
    (R, D), F, E = x_RD.shape, dy_RF.shape[1], group_sizes_E.shape[0]
    rows = block_rows(R, E)
    blocks = schedule(group_sizes_E, rows)
    x_padded, dy_padded = _pad_rows(x_RD, rows), _pad_rows(dy_RF, rows)

    def body(i: jax.Array, dw: jax.Array) -> jax.Array:
        expert, start, count = locate(blocks, i, rows)
        x = jax.lax.dynamic_slice(x_padded, (start, 0), (rows, D))
        dy = jax.lax.dynamic_slice(dy_padded, (start, 0), (rows, F))
        x, dy = (jnp.where(jnp.arange(rows)[:, None] < count, part, 0) for part in (x, dy))
        dw_DF = jnp.einsum("RD,RF->DF", x, dy, preferred_element_type=jnp.float32)
        dw_DF += jax.lax.dynamic_index_in_dim(dw, expert, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(dw, dw_DF, expert, 0)

    dw, *_ = vary_alike((jnp.zeros((E, D, F), jnp.float32), x_RD, dy_RF, group_sizes_E))
    return jax.lax.fori_loop(0, blocks.ends_E[-1], body, dw)


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
