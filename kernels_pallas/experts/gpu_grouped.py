"""The grouped product on its own on Hopper GPUs, and its gradient: see `grouped.grouped_matmul`.

These are the kernels of `expert_mlp` with an epilogue that only writes. Sizes are those of its
gradient for x, whatever the number of rows; with few, `expert_mlp` has shorter blocks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.experts.dispatch import experts_of
from kernels_pallas.experts.gpu_outer import outer
from kernels_pallas.experts.gpu_product import Term, product
from kernels_pallas.experts.gpu_rows import Rows
from kernels_pallas.experts.gpu_work import ROWS, Plan, fitting, staging, write
from kernels_pallas.experts.inputs import expected_rows

_GROUPS = 2  # warpgroups that multiply
_WIDTH = 256  # columns of a tile at most
_STAGES = 4  # tiles in the ring


def _arranged(sizes_E: jax.Array, num_rows: int, first: jax.Array) -> Rows:
    expert_R, block = experts_of(sizes_E, num_rows), _GROUPS * ROWS
    return Rows.of(expert_R, sizes_E.shape[0], first, size=block, granule=block)


def _cost(num_rows: int, num_experts: int, D: int, F: int, dtype: Any) -> pl.CostEstimate:
    """Estimate a product, or a sum of outer products: matrices of all experts that may be hit."""
    rows, size = expected_rows(num_rows), jnp.dtype(dtype).itemsize
    return pl.CostEstimate(
        flops=2 * rows * D * F,
        bytes_accessed=(min(rows, num_experts) * D * F + rows * (D + F)) * size,
        transcendentals=0,
    )


def grouped_matmul(
    x_RD: jax.Array,
    w_NDF: jax.Array,
    sizes_E: jax.Array,
    first: jax.Array,
    *,
    is_transposed: bool = False,
) -> jax.Array:
    """Multiply each run of sorted rows by its expert's matrix; no gradient of its own.

    Args:
        x_RD: rows sorted by expert; D and F are multiples of 64.
        w_NDF: float matrices of these experts and perhaps of others.
        sizes_E: int32 rows of each expert; rows beyond their sum belong to nobody.
        first: number of expert 0's matrix in w_NDF; the others follow it.
        is_transposed: whether the matrices are [N, F, D].

    Returns:
        y_RF in the dtype of x; rows of nobody are zero.
    """
    (R, D), F, dtype = x_RD.shape, w_NDF.shape[1 if is_transposed else 2], x_RD.dtype
    rows = _arranged(sizes_E, R, first)
    width = fitting(F, _WIDTH)
    plan = Plan(_GROUPS, _GROUPS * ROWS, width, _STAGES, 1, is_transposed=is_transposed)
    x_PD = rows.spread(x_RD, 1)
    (y_PF,) = product(
        [Term(x_PD, (w_NDF,))],
        rows.blocks_BF,
        plan,
        functools.partial(write, plan=plan),
        extras=[],
        out_type=(jax.ShapeDtypeStruct((x_PD.shape[0], F), dtype),),
        scratch=[staging(_GROUPS, dtype)],
        name="expert_mlp_grouped",
        cost=_cost(R, sizes_E.shape[0], D, F, dtype),
    )
    return rows.gather(y_PF[None], 1).astype(dtype)


def grouped_outer(x_RD: jax.Array, dy_RF: jax.Array, sizes_E: jax.Array, dtype: Any) -> jax.Array:
    """Sum x^T dy over each expert's rows in float32: the gradient of its matrix.

    Args:
        x_RD: rows sorted by expert; D and F are multiples of 64.
        dy_RF: rows in the same order.
        sizes_E: int32 rows of each expert; rows beyond their sum belong to nobody.
        dtype: of the result.

    Returns:
        dw_EDF; zero for experts without rows.
    """
    (R, D), F = x_RD.shape, dy_RF.shape[1]
    rows = _arranged(sizes_E, R, jnp.int32(0))
    x_PD, dy_PF = (rows.spread(part, 1) for part in (x_RD, dy_RF))
    cost = _cost(R, sizes_E.shape[0], D, F, dtype)
    (dw_EDF,) = outer(x_PD, (dy_PF,), rows, dtype, cost, name="expert_mlp_ddown")
    return dw_EDF
