"""Experts on TPUs: rows brought to their experts, two products, and rows brought back.

The products are kernels (`tpu_rows`, `tpu_outer`) whose rows lie sorted by expert in an array that
XLA gathers (`dispatch`). A kernel that gathered them itself would move no fewer bytes: two rows of
bfloat16 share the words of a tile in HBM, so x would first have to be written in another form.

The hidden rows go through HBM between gate and up on one side and down on the other. For Scout's
8192 tokens that is 0.27 GB beside 4 GB of weights, and it buys windows of twice as many rows than
if they stayed in VMEM along with the sums of both sides: an expert that more than half a window of
tokens chose would otherwise have its 0.25 GB of weights read again.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.experts import tpu_blocks as tb
from kernels_pallas.experts import tpu_outer as to
from kernels_pallas.experts import tpu_rows as tr
from kernels_pallas.experts.dispatch import (
    Block,
    Places,
    arrange,
    experts_of,
    list_blocks,
    most_blocks,
)
from kernels_pallas.experts.inputs import Inputs, expected_rows, stored_as
from kernels_pallas.tpu_primitives import LANES, tile_rows


def _run(
    operation: str, rows: tr.RowOperands, by: tr.Matrices, epilogue, outs: list, *, p: Places
) -> list[jax.Array]:
    """Run one kernel over all blocks."""
    (R,), (E,) = p.place_R.shape, p.counts_E.shape
    sizes = tr.row_sizes(operation, rows, by, outs, R, E)
    assert sizes is not None
    return tr.grouped_rows(
        rows,
        by,
        tb.Table.of(list_blocks(p, sizes.block, unit=sizes.unit)),
        sizes,
        epilogue,
        outs,
        name=f"expert_mlp_{operation}",
        cost=tr.row_cost(rows, by, outs, R, E, sizes.cores),
    )


def _column(x_P: jax.Array) -> jax.Array:
    return jnp.broadcast_to(x_P[:, None], (x_P.shape[0], LANES)).astype(jnp.float32)


def _matrices(x: Inputs, *names: str, is_transposed: bool = False) -> tr.Matrices:
    return tr.Matrices(*x.matrices(*names), is_transposed, stored_as(x), x.first)


def _swiglu(products: list[jax.Array], gate: jax.Array, _) -> tuple[jax.Array, ...]:
    """Return the hidden rows, and the products of the tokens themselves."""
    a, b = products
    return jax.nn.silu(gate * a) * (gate * b), a, b


def _fill_lanes(a: jax.Array) -> jax.Array:
    """Lengthen the features of [.., D or F] to whole lanes; both, of a matrix."""
    first = 1 if a.ndim == 3 else a.ndim - 1
    widths = [(0, -n % LANES if axis >= first else 0) for axis, n in enumerate(a.shape)]
    return jnp.pad(a, widths)


def _filled(x: Inputs) -> Inputs:
    """Lengthen D and F to whole lanes: zeros add nothing. Inputs that have them are as they came.

    Matrices are copied for it, which small models can afford.
    """
    if x.x_TD.shape[1] % LANES == 0 and x.w_up_NDF.shape[2] % LANES == 0:
        return x
    x_TD, *weights = map(_fill_lanes, (x.x_TD, x.w_gate_NDF, x.w_up_NDF, x.w_down_NFD))
    shared_TD = None if x.shared_TD is None else _fill_lanes(x.shared_TD)
    x = x._replace(x_TD=x_TD, shared_TD=shared_TD)
    return x._replace(w_gate_NDF=weights[0], w_up_NDF=weights[1], w_down_NFD=weights[2])


def unsupported_reason(x: Inputs, num_experts: int) -> str | None:
    """Return why these arrays cannot be taken, or None if they can."""
    D, dtype, R = x.x_TD.shape[1], x.x_TD.dtype, x.expert_TX.size
    F = x.w_up_NDF.shape[2]
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"tokens must be bfloat16 or float32, not {dtype}"
    if D % LANES or F % LANES:
        if stored_as(x) != "float" or x.w_up_NDF.shape[0] != num_experts:
            return f"D ({D}) and F ({F}) of quantised or stacked matrices must divide by {LANES}"
        x = jax.eval_shape(_filled, x)
        D, F = x.x_TD.shape[1], x.w_up_NDF.shape[2]
    for operation, sizes in _sizes(x, F, num_experts).items():
        if sizes is None:
            return f"the {operation} kernel does not fit into VMEM for D = {D} and F = {F}"
        needed = 4 * len(Block._fields) * most_blocks(R, num_experts, sizes.block)
        if needed > tb.SCALARS_BUDGET:
            return f"its list of blocks takes {needed} bytes of SMEM, over {tb.SCALARS_BUDGET}"
    return None


def _sizes(x: Inputs, F: int, num_experts: int) -> dict[str, tb.BlockSizes | None]:
    """Return the sizes of all kernels, backward included if the matrices are floats."""
    D, dtype, R = x.x_TD.shape[1], x.x_TD.dtype, x.expert_TX.size

    def row(width: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct((1, width), dtype)

    column: Any = jax.ShapeDtypeStruct((1, LANES), jnp.float32)

    def sizes(operation: str, rows: tr.RowOperands, outs: int, *names: str) -> tb.BlockSizes | None:
        by = _matrices(x, *names, is_transposed=operation != "forward")
        return tr.row_sizes(operation, rows, by, [dtype] * outs, R, num_experts)

    found = {
        "gate and up": sizes("forward", tr.RowOperands([row(D)], column), 3, "gate", "up"),
        "down": sizes("forward", tr.RowOperands([row(F)], column), 1, "down"),
    }
    if stored_as(x) == "float":
        rows = tr.RowOperands([row(D)], column, [row(F)] * 2)
        found["backward hidden"] = sizes("backward_hidden", rows, 3, "down")
        rows = tr.RowOperands([row(F)], None, [row(D, jnp.float32)])
        found["backward tokens"] = sizes("backward_tokens", rows, 1, "up")
        found["backward weights"] = to.outer_sizes(row(D), row(F), R, num_experts)
    return found


def forward(x: Inputs, num_experts: int, *, saves: bool) -> tuple[jax.Array, "Saved | None"]:
    """Apply the experts. Returns y_TD in the dtype of x, and what `backward` wants if it saves."""
    (T, X), (_, D), dtype = x.expert_TX.shape, x.x_TD.shape, x.x_TD.dtype
    x = _filled(x)
    p = arrange(x.expert_TX.reshape(T * X), num_experts, tile_rows(dtype))
    token_P = p.source_P // X
    gate_P = jnp.where(p.is_held_P, x.gate_TX.reshape(T * X)[p.source_P], 0)
    rows, by = tr.RowOperands([x.x_TD[token_P]], _column(gate_P)), _matrices(x, "gate", "up")
    outs = [dtype] * (3 if saves else 1)
    h_PF, *ab = _run("forward", rows, by, lambda *a: _swiglu(*a)[: len(outs)], outs, p=p)
    (y_PD,) = _run("forward", tr.RowOperands([h_PF]), _matrices(x, "down"), _add, [dtype], p=p)
    y_TD = p.back(y_PD).reshape(T, X, -1).astype(jnp.float32).sum(1)
    if x.shared_TD is not None:
        y_TD += x.shared_TD
    return y_TD[:, :D].astype(dtype), Saved(p, *ab) if saves else None


class Saved(NamedTuple):
    """What the gradient needs: where rows lie, and their products before the gate, by place."""

    places: Places
    a_PF: jax.Array
    b_PF: jax.Array


def _swiglu_gradient(products: list[jax.Array], gate: jax.Array, tiles: list[jax.Array]):
    """Return the gradients of gate * a and gate * b, and the hidden rows."""
    (dh,), (a, b) = products, (gate * tile for tile in tiles)
    sigma = jax.nn.sigmoid(a)
    silu = a * sigma
    return dh * b * (sigma + silu * (1 - sigma)), dh * silu, silu * b


def _add(products: list[jax.Array], _, tiles: list[jax.Array]) -> tuple[jax.Array]:
    """Return the product, added to what there is."""
    return (sum(tiles, products[0]),)


def _outer(
    x_PK: jax.Array,
    dy_PM: jax.Array,
    p: Places,
    like: Any,
    first: jax.Array,
    *,
    is_transposed=False,
) -> jax.Array:
    """Sum x^T dy (or dy^T x) over each expert's rows, among zeros for those of other layers."""
    (R,), (E,) = p.place_R.shape, p.counts_E.shape
    sizes = to.outer_sizes(x_PK, dy_PM, R, E)
    assert sizes is not None
    K, M, size = x_PK.shape[1], dy_PM.shape[1], like.dtype.itemsize
    held = expected_rows(R)
    readings = sizes.cores if held <= E * sizes.block else M // sizes.tile  # rows in several blocks
    cost = pl.CostEstimate(
        flops=2 * held * K * M,
        transcendentals=0,
        bytes_accessed=E * K * M * size + held * (K * readings + M) * x_PK.dtype.itemsize,
    )
    return to.grouped_outer_places(
        x_PK,
        dy_PM,
        tb.Table.of(list_blocks(p, sizes.block, unit=sizes.unit, every_expert=True), least=0),
        sizes,
        first=first,
        num_experts=E,
        like=like,
        is_transposed=is_transposed,
        name="expert_mlp_backward_weights",
        cost=cost,
    )


def backward(
    x: Inputs, num_experts: int, saved: Saved, dy_TD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return dx_TD, the gradients of the three matrices, and dgate_TX.

    With z = gate * x the input of an expert and dz its gradient, that of x is gate * dz, that of
    the gate is the sum of x * dz, and those of the matrices want z. Nothing is computed again:
    these are six products, 12 T X D F FLOPs.
    """
    del num_experts  # the places know
    (T, X), dtype, p = x.expert_TX.shape, x.x_TD.dtype, saved.places
    (_, D, F), x, dy_TD = x.w_up_NDF.shape, _filled(x), _fill_lanes(dy_TD)
    token_P = p.source_P // X
    gate_R = jnp.where(p.place_R >= 0, x.gate_TX.reshape(T * X), 0).astype(jnp.float32)
    gate_P = jnp.where(p.is_held_P, gate_R[p.source_P], 0)
    dy_PD = dy_TD[token_P]
    run = functools.partial(_run, p=p)
    down = _matrices(x, "down", is_transposed=True)
    rows = tr.RowOperands([dy_PD], _column(gate_P), [saved.a_PF, saved.b_PF])
    da_PF, db_PF, h_PF = run("backward_hidden", rows, down, _swiglu_gradient, [dtype] * 3)
    # One after the other: then twice as many rows fit into VMEM, and fewer experts are read twice.
    gate, up = (_matrices(x, name, is_transposed=True) for name in ("gate", "up"))
    parts = run("backward_tokens", tr.RowOperands([da_PF]), gate, _add, [jnp.float32])
    (dz_PD,) = run("backward_tokens", tr.RowOperands([db_PF], None, parts), up, _add, [dtype])

    z_PD = (x.x_TD[token_P] * gate_P[:, None]).astype(dtype)
    d_gate = _outer(z_PD, da_PF, p, x.w_gate_NDF, x.first)
    d_up = _outer(z_PD, db_PF, p, x.w_up_NDF, x.first)
    d_down = _outer(dy_PD, h_PF, p, x.w_down_NFD, x.first, is_transposed=True)

    dz_TXD = p.back(dz_PD).reshape(T, X, -1).astype(jnp.float32)
    dx_TD = (dz_TXD * gate_R.reshape(T, X, 1)).sum(1).astype(dtype)
    x_TXD = jnp.where(p.place_R.reshape(T, X, 1) >= 0, x.x_TD[:, None], 0)
    dgate_TX = (dz_TXD * x_TXD).sum(2).astype(x.gate_TX.dtype)
    return dx_TD[:, :D], d_gate[:, :D, :F], d_up[:, :D, :F], d_down[:, :F, :D], dgate_TX


def grouped_matmul(
    x_RD: jax.Array,
    w_NDF: jax.Array,
    sizes_E: jax.Array,
    first: jax.Array,
    *,
    is_transposed: bool = False,
) -> jax.Array:
    """Multiply each run of sorted rows by its expert's matrix; see `reference.grouped_matmul`.

    Matrices are copied if D or F are no multiples of 128.
    """
    (R, _), (E,), dtype = x_RD.shape, sizes_E.shape, x_RD.dtype
    F, x_RD, w_NDF = w_NDF.shape[1 if is_transposed else 2], _fill_lanes(x_RD), _fill_lanes(w_NDF)
    p = arrange(experts_of(sizes_E, R), E, tile_rows(dtype))
    by = tr.Matrices([w_NDF], None, is_transposed, "float", first)
    (y_PF,) = _run("forward", tr.RowOperands([x_RD[p.source_P]]), by, _add, [dtype], p=p)
    return p.back(y_PF)[:, :F]


def grouped_outer(x_RD: jax.Array, dy_RF: jax.Array, sizes_E: jax.Array, dtype: Any) -> jax.Array:
    """Sum x^T dy over each expert's rows in float32; see `reference.grouped_outer`."""
    (R, D), F, (E,) = x_RD.shape, dy_RF.shape[1], sizes_E.shape
    x_RD, dy_RF = _fill_lanes(x_RD), _fill_lanes(dy_RF)
    p = arrange(experts_of(sizes_E, R), E, tile_rows(x_RD.dtype))
    dy_PF = jnp.where(p.is_held_P[:, None], dy_RF[p.source_P], 0)
    dw_EDF = jax.ShapeDtypeStruct((E, x_RD.shape[1], dy_RF.shape[1]), dtype)
    return _outer(x_RD[p.source_P], dy_PF, p, dw_EDF, jnp.int32(0))[:, :D, :F]
