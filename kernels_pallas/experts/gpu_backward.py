"""Gradients of experts on Hopper GPUs: two grouped products, and grouped outer products.

With a = x Wg, b = x Wu, u = g a, v = g b and hidden = silu(u) v, the first product is dy Wd^T; its
epilogue turns it into the gradients of u and v, times g those of a and b, writes hidden again, and
sums a du + b dv along each row, the gradient of the gate. The second is da Wg^T + db Wu^T, that of
x. Gradients of matrices are in `gpu_outer`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import tuning
from kernels_pallas.experts.gpu_outer import outer
from kernels_pallas.experts.gpu_product import Term, product
from kernels_pallas.experts.gpu_rows import Rows
from kernels_pallas.experts.gpu_work import (
    OF_ROWS,
    ROWS,
    TILE,
    Item,
    Plan,
    Sums,
    fitting,
    staging,
    write,
)
from kernels_pallas.experts.inputs import Inputs, expected_rows

_GROUPS = 2  # warpgroups that multiply
_PART = 64  # columns that the epilogue of the first product takes at a time
_SLICE = 32  # and of these, as many as registers hold


class Saved(NamedTuple):
    """What the backward pass wants besides the inputs: the places and the two products."""

    rows: Rows
    a_PF: jax.Array
    b_PF: jax.Array


def cost(x: Inputs, num_experts: int, *, matrices: int, rows: int) -> pl.CostEstimate:
    """Estimate a product of expected rows with `matrices` matrices of each expert that is hit.

    Args:
        x, num_experts: the call.
        matrices: of one expert.
        rows: numbers that each row reads and writes.
    """
    D, (_, _, F), held = x.x_TD.shape[1], x.w_gate_NDF.shape, expected_rows(x.expert_TX.size)
    hit = min(held, num_experts)
    size = x.w_gate_NDF.shape[1] * F * x.w_gate_NDF.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * matrices * held * D * F,
        bytes_accessed=matrices * hit * size + held * rows * x.x_TD.dtype.itemsize,
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
    sums: Sequence[Sums], item: Item, extras: Any, outs: Any, scratch: Any, *, plan: Plan
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


def _hidden_gradients(
    x: Inputs, num_experts: int, saved: Saved, gate_P: jax.Array, dy_PD: jax.Array
) -> Sequence[jax.Array]:
    """Return da_PF, db_PF, hidden_PF and the gradients of gates by tiles of columns."""
    (P, F), dtype = saved.a_PF.shape, x.x_TD.dtype
    sizes = tuning.lookup("expert_mlp.dhidden", {"width": 256, "stages": 3}, dtype=dtype.name)
    width = fitting(F, sizes["width"])
    plan = Plan(_GROUPS, _GROUPS * ROWS, width, sizes["stages"], 1, is_transposed=True)
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
    x: Inputs, num_experts: int, rows: Rows, da_PF: jax.Array, db_PF: jax.Array
) -> jax.Array:
    """Return dx_PD = da Wg^T + db Wu^T."""
    (P, F), (_, D), dtype = da_PF.shape, x.x_TD.shape, x.x_TD.dtype
    sizes = tuning.lookup("expert_mlp.dx", {"width": 256, "stages": 4}, dtype=dtype.name)
    width = fitting(D, sizes["width"])
    plan = Plan(_GROUPS, _GROUPS * ROWS, width, sizes["stages"], 1, is_transposed=True)
    out_dtype = dtype if x.expert_TX.shape[1] == 1 else jnp.dtype(jnp.float32)
    (dx_PD,) = product(
        [Term(da_PF, (x.w_gate_NDF,)), Term(db_PF, (x.w_up_NDF,))],
        rows.blocks_BF,
        plan,
        functools.partial(write, plan=plan),
        extras=[],
        out_type=(jax.ShapeDtypeStruct((P, D), out_dtype),),
        scratch=[staging(_GROUPS, out_dtype)],
        name="expert_mlp_dx",
        cost=cost(x, num_experts, matrices=2, rows=D + 2 * F),
    )
    return dx_PD


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

    def among(dw: jax.Array, w: jax.Array) -> jax.Array:
        """Place the gradients of E matrices among those of all layers."""
        if dw.shape == w.shape:
            return dw
        return jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(w), dw, x.first, axis=0)

    weights = (x.w_gate_NDF, x.w_up_NDF, x.w_down_NFD)
    d_gate, d_up, d_down = map(among, (d_gate, d_up, d_down), weights)
    return dx_TD, d_gate, d_up, d_down, dgate_TX
