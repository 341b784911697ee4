"""Gradients of experts on Hopper GPUs: two grouped products, and grouped outer products.

With a = x Wg, b = x Wu, u = g a, v = g b and hidden = silu(u) v, the first product is dy Wd^T; its
epilogue turns it into the gradients of u and v, times g those of a and b, writes hidden again, and
sums a du + b dv along each row, the gradient of the gate. The second is da Wg^T + db Wu^T, that of
x. Gradients of matrices are in `gpu_outer`.

The same kernels are the grouped product on its own, and its gradient: `grouped_matmul`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import tuning
from kernels_pallas.experts.dispatch import experts_of
from kernels_pallas.experts.gpu_outer import outer
from kernels_pallas.experts.gpu_product import Term, product
from kernels_pallas.experts.gpu_rows import PlacedRows
from kernels_pallas.experts.gpu_work import (
    Item,
    ProductPlan,
    Sums,
    fitting,
    staging,
    write,
)
from kernels_pallas.experts.inputs import Inputs, among_layers, expected_rows
from kernels_pallas.gpu_primitives import OF_ROWS, ROWS, TILE

_GROUPS = 2  # warpgroups that multiply
_PART = 64  # columns that the epilogue of the first product takes at a time
_SLICE = 32  # and of these, as many as registers hold


class Saved(NamedTuple):
    """What the backward pass wants besides the inputs: the places and the two products."""

    rows: PlacedRows
    a_PF: jax.Array
    b_PF: jax.Array


def cost(x: Inputs, num_experts: int, *, matrices: int, rows: int) -> pl.CostEstimate:
    """Estimate a product of expected rows with `matrices` matrices of each expert that is hit.

    Args:
        x, num_experts: the call.
        matrices: of one expert.
        rows: numbers that each row reads and writes.
    """
    D, w, held = x.x_TD.shape[1], x.w_gate_NDF, expected_rows(x.expert_TX.size)
    size = matrices * min(held, num_experts) * w.shape[1] * w.shape[2] * w.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * matrices * held * D * w.shape[2],
        bytes_accessed=size + held * rows * x.x_TD.dtype.itemsize,
        transcendentals=0,
    )


class _Scratch(NamedTuple):
    """Shared memory of the first epilogue: two parts of a and of b, hidden, gates' sums."""

    a: Any
    b: Any
    hidden: Any
    sums: Any
    ready: Any

    def of(self, group: jax.Array) -> "_Scratch":
        """Return the part of a warpgroup."""
        a, b, hidden, sums = (ref.at[group] for ref in self[:-1])
        ready = tuple(self.ready.at[2 * group + slot] for slot in range(2))
        return _Scratch(a, b, hidden, sums, ready)


def _bring(item: Item, part: int, extras: Any, scratch: _Scratch) -> None:
    """Start copying a part of a and b."""
    _, a_PF, b_PF = extras
    here = pl.ds(pl.multiple_of(item.start, ROWS), ROWS)
    columns = pl.ds(item.column + part * _PART, _PART)
    slot = part % 2
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for source, target in ((a_PF, scratch.a), (b_PF, scratch.b)):
        plgpu.copy_gmem_to_smem(source.at[here, columns], target.at[slot], scratch.ready[slot])


def _prologue(item: Item, extras: Any, scratch: Any) -> None:
    _bring(item, 0, extras, _Scratch(*scratch).of(jax.lax.axis_index("warpgroup")))


def _epilogue(
    sums: Sequence[Sums], item: Item, extras: Any, outs: Any, scratch: Any, *, plan: ProductPlan
) -> None:
    """Write da, db, hidden and the columns' share of the gates' gradients."""
    mine = _Scratch(*scratch).of(jax.lax.axis_index("warpgroup"))
    da_PF, db_PF, hidden_PF, dgate_CP = outs
    here = pl.ds(pl.multiple_of(item.start, ROWS), ROWS)
    dgate_R = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), OF_ROWS)
    for part in range(plan.width // _PART):
        slot = part % 2
        if (part + 1) * _PART < plan.width:
            _bring(item, part + 1, extras, mine)
        else:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_wait(mine.ready[slot])
        for column in range(0, _PART, _SLICE):
            at = slot, slice(None), pl.ds(column, _SLICE)
            begin = part * _PART + column
            d_hidden = sums[0](begin, _SLICE)
            a, b = (plgpu.load(ref.at[at], layout=TILE).astype(jnp.float32) for ref in mine[:2])
            gate_R = plgpu.load(extras[0].at[here], layout=OF_ROWS, optimized=False)
            g = jax.lax.broadcast_in_dim(gate_R, a.shape, [0])
            u, v = g * a, g * b
            sigmoid = 1 / (1 + jnp.exp(-u))
            silu = u * sigmoid
            du = d_hidden * v * (sigmoid + silu * (1 - sigmoid))
            dv = d_hidden * silu
            dgate_R = jax.lax.optimization_barrier(dgate_R + (du * a + dv * b).sum(axis=1))
            dtype = da_PF.dtype
            mine.hidden[:, pl.ds(column, _SLICE)] = (silu * v).astype(dtype)
            mine.a[at] = (g * du).astype(dtype)
            mine.b[at] = (g * dv).astype(dtype)
        plgpu.commit_smem()
        columns = pl.ds(item.column + part * _PART, _PART)
        for ref, out in (
            (mine.a.at[slot], da_PF),
            (mine.b.at[slot], db_PF),
            (mine.hidden, hidden_PF),
        ):
            plgpu.copy_smem_to_gmem(ref, out.at[here, columns])
    mine.sums[...] = dgate_R
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(mine.sums, dgate_CP.at[item.column // plan.width, here])


def plain_product(
    terms: Sequence[Term],
    rows: PlacedRows,
    sizes: Mapping[str, int],
    dtype: Any,
    *,
    is_transposed: bool,
    name: str,
    cost: pl.CostEstimate,
) -> jax.Array:
    """Multiply rows by their experts' matrices and write the sums; see `gpu_product.product`.

    Args:
        terms: what is multiplied and added up, one matrix in each.
        rows: their places and blocks.
        sizes: "width" of a tile at most, and "stages" of the ring.
        dtype: of the result.
        is_transposed: whether matrices are [columns, input channels].
        name: of the kernel.
        cost: estimate.
    """
    columns = terms[0].w[0].shape[1 if is_transposed else 2]
    width, block = fitting(columns, sizes["width"]), _GROUPS * ROWS
    plan = ProductPlan(_GROUPS, block, width, sizes["stages"], 1, is_transposed=is_transposed)
    (y_PC,) = product(
        terms,
        rows.blocks_BF,
        plan,
        functools.partial(write, plan=plan),
        extras=[],
        out_type=(jax.ShapeDtypeStruct((terms[0].x_PK.shape[0], columns), dtype),),
        scratch=[staging(_GROUPS, dtype)],
        name=name,
        cost=cost,
    )
    return y_PC


def _hidden_gradients(
    x: Inputs, num_experts: int, saved: Saved, gate_P: jax.Array, dy_PD: jax.Array
) -> Sequence[jax.Array]:
    """Return da_PF, db_PF, hidden_PF and the gradients of gates by tiles of columns."""
    (P, F), dtype = saved.a_PF.shape, x.x_TD.dtype
    sizes = tuning.lookup("expert_mlp.dhidden", {"width": 256, "stages": 3}, dtype=dtype.name)
    width = fitting(F, sizes["width"])
    plan = ProductPlan(_GROUPS, _GROUPS * ROWS, width, sizes["stages"], 1, is_transposed=True)
    part = plgpu.SMEM((_GROUPS, 2, ROWS, _PART), dtype)
    wide = jax.ShapeDtypeStruct((P, F), dtype)
    return product(
        [Term(dy_PD, (x.w_down_NFD,))],
        saved.rows.blocks_BF,
        plan,
        functools.partial(_epilogue, plan=plan),
        prologue=_prologue,
        extras=[gate_P, saved.a_PF, saved.b_PF],
        out_type=(wide, wide, wide, jax.ShapeDtypeStruct((F // width, P), jnp.float32)),
        scratch=_Scratch(
            part,
            part,
            plgpu.SMEM((_GROUPS, ROWS, _PART), dtype),
            plgpu.SMEM((_GROUPS, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=2 * _GROUPS),
        ),
        name="expert_mlp_dhidden",
        cost=cost(x, num_experts, matrices=1, rows=x.x_TD.shape[1] + 5 * F),
        reads_back=True,
    )


def _token_gradients(
    x: Inputs, num_experts: int, rows: PlacedRows, da_PF: jax.Array, db_PF: jax.Array
) -> jax.Array:
    """Return dx_PD = da Wg^T + db Wu^T."""
    (_, F), (_, D), dtype = da_PF.shape, x.x_TD.shape, x.x_TD.dtype
    sizes = tuning.lookup("expert_mlp.dx", {"width": 256, "stages": 4}, dtype=dtype.name)
    return plain_product(
        [Term(da_PF, (x.w_gate_NDF,)), Term(db_PF, (x.w_up_NDF,))],
        rows,
        sizes,
        dtype if x.expert_TX.shape[1] == 1 else jnp.dtype(jnp.float32),
        is_transposed=True,
        name="expert_mlp_dx",
        cost=cost(x, num_experts, matrices=2, rows=D + 2 * F),
    )


def backward(
    x: Inputs, num_experts: int, saved: Saved, dy_TD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return dx_TD, the gradients of the three matrices, and dgate_TX."""
    (T, X), dtype, rows = x.expert_TX.shape, x.x_TD.dtype, saved.rows
    D, F = x.x_TD.shape[1], x.w_gate_NDF.shape[2]
    x_PD = rows.spread(x.x_TD, X)
    dy_PD = rows.spread(dy_TD.astype(dtype), X)
    gate_P = rows.spread_gates(x.gate_TX)
    da, db, hidden, dgate_CP = _hidden_gradients(x, num_experts, saved, gate_P, dy_PD)
    dx_PD = _token_gradients(x, num_experts, rows, da, db)
    dx_TD = rows.gather(dx_PD[None], X).astype(dtype)
    dgate_RC = rows.gather(dgate_CP[:, :, None], 1)
    dgate_TX = dgate_RC.reshape(T, X).astype(x.gate_TX.dtype)
    for_two = cost(x, num_experts, matrices=2, rows=D + 2 * F)
    for_one = cost(x, num_experts, matrices=1, rows=D + F)
    d_gate, d_up = outer(x_PD, (da, db), rows, dtype, for_two, name="expert_mlp_dup")
    (d_down,) = outer(hidden, (dy_PD,), rows, dtype, for_one, name="expert_mlp_ddown")

    weights = zip((d_gate, d_up, d_down), (x.w_gate_NDF, x.w_up_NDF, x.w_down_NFD), strict=True)
    d_gate, d_up, d_down = (among_layers(dw, x.first, w) for dw, w in weights)
    return dx_TD, d_gate, d_up, d_down, dgate_TX


def _rows(sizes_E: jax.Array, num_rows: int, first: jax.Array) -> PlacedRows:
    """Place rows that are sorted by expert, in blocks of 128, whatever their number."""
    expert_R, block = experts_of(sizes_E, num_rows), _GROUPS * ROWS
    return PlacedRows.of(expert_R, sizes_E.shape[0], first, size=block, granule=block)


def _cost_alone(num_rows: int, num_experts: int, D: int, F: int, dtype: Any) -> pl.CostEstimate:
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
    """Multiply each run of sorted rows by its expert's matrix; see `reference.grouped_matmul`."""
    (R, D), F, dtype = x_RD.shape, w_NDF.shape[1 if is_transposed else 2], x_RD.dtype
    rows = _rows(sizes_E, R, first)
    y_PF = plain_product(
        [Term(rows.spread(x_RD, 1), (w_NDF,))],
        rows,
        {"width": 256, "stages": 4},
        dtype,
        is_transposed=is_transposed,
        name="expert_mlp_grouped",
        cost=_cost_alone(R, sizes_E.shape[0], D, F, dtype),
    )
    return rows.gather(y_PF[None], 1).astype(dtype)


def grouped_outer(x_RD: jax.Array, dy_RF: jax.Array, sizes_E: jax.Array, dtype: Any) -> jax.Array:
    """Sum x^T dy over each expert's rows in float32; see `reference.grouped_outer`."""
    (R, D), F = x_RD.shape, dy_RF.shape[1]
    rows = _rows(sizes_E, R, jnp.int32(0))
    cost = _cost_alone(R, sizes_E.shape[0], D, F, dtype)
    y = (rows.spread(dy_RF, 1),)
    (dw_EDF,) = outer(rows.spread(x_RD, 1), y, rows, dtype, cost, name="expert_mlp_ddown")
    return dw_EDF
