"""Experts on Hopper GPUs: two grouped products, gate and up with SwiGLU, then down.

PlacedRows lie by expert (`gpu_rows`); the products are persistent kernels (`gpu_product`) that
read the matrices of experts with rows and of no others. The gate folds into the epilogue of the
first, silu(g a) * (g b), in float32. With few rows, where time goes by bytes of the matrices,
blocks are 64 rows of which groups of 8 are copied if there are any, two programs share a
multiprocessor, and the second product is split along its sum to give all of them work; the first
brings what the second reads first into the L2 cache before it ends, as memory would idle between
them. Stored matrices are read as they are (`gpu_quantized`).

Sizes that `tuning` may set, each kernel's under a name of its own:
    expert_mlp.up, expert_mlp.down (rows: "few" or "many"; stored: "float", "int8", "int4", "fp8"):
        width 64, 128 or 256 columns of one matrix in a tile, for up no more than 128; stages 2 to
        6 of the ring; programs 1 or 2 of a multiprocessor, for few rows. 0 leaves it to `_plans`.
    expert_mlp.dhidden, expert_mlp.dx (dtype): width 128 or 256, stages 2 to 4.
    expert_mlp.dup, expert_mlp.ddown (dtype): width 64 or 128, of ddown also 256; stages 2 to 5.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import backend, chips, tuning
from kernels_pallas.experts import gpu_backward, gpu_quantized
from kernels_pallas.experts.gpu_backward import Saved, cost
from kernels_pallas.experts.gpu_product import Term, product
from kernels_pallas.experts.gpu_rows import PlacedRows
from kernels_pallas.experts.gpu_work import (
    DEPTH,
    Item,
    ProductPlan,
    Sums,
    fitting,
    prefetch,
    staging,
    store,
    store_all,
)
from kernels_pallas.experts.inputs import INT4_GROUP, Inputs, stored_as
from kernels_pallas.experts.quantize import fp8_rows
from kernels_pallas.gpu_primitives import OF_ROWS, ROWS

_FEW = 256  # rows up to which copying matrices takes longer than multiplying


backward = gpu_backward.backward
grouped_matmul, grouped_outer = gpu_backward.grouped_matmul, gpu_backward.grouped_outer


def unsupported_reason(x: Inputs, num_experts: int) -> str | None:
    """Say why the kernels cannot take these shapes, dtypes or this chip; None if they can."""
    del num_experts
    dtypes = [x.x_TD.dtype, x.w_gate_NDF.dtype, x.w_up_NDF.dtype, x.w_down_NFD.dtype]
    kind = backend.device_kind()
    if not backend.gpu_interpreter() and not chips.is_hopper(kind):
        return f"wgmma is Hopper's, and this is {kind}"
    if jnp.float32 in dtypes:
        return "float32: wgmma multiplies in tf32"
    if x.x_TD.dtype not in (jnp.bfloat16, jnp.float16):
        return f"its tokens are bfloat16 or float16, not {x.x_TD.dtype.name}"
    stored = stored_as(x)
    if stored != "float" and x.x_TD.dtype != jnp.bfloat16:
        return f"tokens of stored matrices are bfloat16, not {x.x_TD.dtype.name}"
    if stored == "float" and any(dtype != x.x_TD.dtype for dtype in dtypes):
        return f"tokens and matrices differ in dtype: {', '.join(d.name for d in dtypes)}"
    D, F = x.x_TD.shape[1], x.w_gate_NDF.shape[2]
    side = ROWS if stored == "float" else 2 * ROWS
    if D % side or F % side:
        return f"D ({D}) and F ({F}) are to be multiples of {side}, the side of a tile"
    return None


def _silu_product(u: jax.Array, v: jax.Array) -> jax.Array:
    return u * v / (1 + jnp.exp(-u))


def _up_epilogue(
    sums: Sequence[Sums], item: Item, extras: Any, outs: Any, scratch: Any, *, plan: ProductPlan
) -> None:
    """Write silu(g a) * (g b) and, if asked for, a and b."""
    gate_P, *_ = extras
    buffers = scratch[0].at[jax.lax.axis_index("warpgroup")]
    here = pl.ds(pl.multiple_of(item.start, 8), ROWS)
    gate_R = plgpu.load(gate_P.at[here], layout=OF_ROWS, optimized=False)
    step = buffers.shape[2]
    for column in range(0, plan.width, step):
        a, b = (total(column, step) for total in sums)
        g = jax.lax.broadcast_in_dim(gate_R, a.shape, [0])
        at = item._replace(column=item.column + column)
        tiles = (_silu_product(g * a, g * b), a, b)
        for i, (tile, out) in enumerate(zip(tiles, outs, strict=False)):
            before = column // step * len(outs) + i
            store(tile, buffers, out, at, plan.granule, before=before)


def _down_epilogue(
    sums: Sequence[Sums], item: Item, extras: Any, outs: Any, scratch: Any, *, plan: ProductPlan
) -> None:
    del extras
    buffers = scratch[0].at[jax.lax.axis_index("warpgroup")]
    target = outs[0].at[item.split]
    store_all(sums[0], plan.width, buffers, target, item, plan.granule)


def _prefetch_down(blocks_BF: Any, extras: Any, *, x: Inputs, plan: ProductPlan) -> None:
    w_NFD, stored = extras[1], stored_as(x)
    width = plan.width if stored == "float" else plan.groups * plan.width
    prefetch(w_NFD, blocks_BF, plan, width, w_NFD.shape[1] // DEPTH)


def _plans(x: Inputs, num_experts: int, *, saves: bool) -> tuple[ProductPlan, ProductPlan]:
    """Return the plans of the products with gate and up, and with down."""
    R, (D, F), stored = x.expert_TX.size, (x.x_TD.shape[1], x.w_gate_NDF.shape[2]), stored_as(x)
    few, is_wide = R <= _FEW and not saves, stored == "float"
    groups, per_processor = (1, 2) if few and stored != "int4" else (2, 1)
    granule = 8 if few else 2 * ROWS if is_wide else ROWS
    about = {"rows": "few" if few else "many", "stored": stored}
    default = {"width": 0, "stages": 4, "programs": 0}
    up_width, down_width = (128, 256) if is_wide and not few else (64, 128)
    plans = []
    for name, size, most in (("up", F, up_width), ("down", D, down_width)):
        sizes = tuning.lookup(f"expert_mlp.{name}", default, **about)
        share = size if is_wide else size // groups  # groups have columns of their own
        width = fitting(share, sizes["width"] or most)
        programs = (few and sizes["programs"]) or per_processor
        plans.append(ProductPlan(groups, granule, width, sizes["stages"], programs))
    up, down = plans
    if few:
        tile = down.width if is_wide else groups * down.width
        steps = F // (INT4_GROUP if stored == "int4" else ROWS)
        down = down._replace(splits=_splits(D // tile, min(R, num_experts), steps, down))
    return up, down


def _splits(columns: int, experts: int, steps: int, plan: ProductPlan) -> int:
    """Return into how many parts to split sums, so that few programs idle at the end."""

    def busy(splits: int) -> float:
        items = columns * experts * splits
        return items / (-(-items // plan.programs) * plan.programs)

    choices = range(1, min(16, steps) + 1)
    return next((s for s in choices if busy(s) >= 0.95), max(choices, key=busy))


def _rounded(x_PK: jax.Array, stored: str) -> tuple[jax.Array, jax.Array | None]:
    """Return rows as they meet stored matrices, and their scales if they have any."""
    if stored == "int4":
        return gpu_quantized.halved(x_PK), None
    if stored == "fp8":
        rounded_PK, scale_P1 = fp8_rows(x_PK)
        return rounded_PK.astype(jnp.bfloat16), scale_P1[:, 0]
    return x_PK, None


def _product(x: Inputs, x_PK: jax.Array, names: tuple[str, ...], *rest: Any, **how: Any) -> Any:
    """Multiply rows by the matrices of these names, as they are stored."""
    w, scales = x.matrices(*names)
    if scales is None:
        return product([Term(x_PK, tuple(w))], *rest, **how)
    term = gpu_quantized.Stored(*_rounded(x_PK, stored_as(x)), tuple(w), tuple(scales))
    return gpu_quantized.product(term, *rest, **how)


def _staging(x: Inputs, plan: ProductPlan, dtype: Any) -> Any:
    """Return what is written by way of; few rows are written one buffer at a time."""
    line = 128 if x.scales is None else 64
    return staging(plan.groups, dtype, line=line, count=1 if plan.granule < ROWS else 2)


def forward(x: Inputs, num_experts: int, *, saves: bool) -> tuple[jax.Array, Saved | None]:
    """Apply the experts; see `api.expert_mlp`.

    Returns:
        y_TD in the dtype of x, and what `backward` wants if `saves`.
    """
    (_, X), dtype = x.expert_TX.shape, x.x_TD.dtype
    D, F = x.x_TD.shape[1], x.w_gate_NDF.shape[2]
    up, down = _plans(x, num_experts, saves=saves)
    block = ROWS if x.scales is not None else up.rows
    expert_R = x.expert_TX.reshape(-1)
    rows = PlacedRows.of(expert_R, num_experts, x.first, size=block, granule=up.granule)
    x_PD = rows.spread(x.x_TD, X)
    P = x_PD.shape[0]
    hidden, few = jax.ShapeDtypeStruct((P, F), dtype), up.granule < ROWS
    hidden_PF, *products = _product(
        x,
        x_PD,
        ("gate", "up"),
        rows.blocks_BF,
        up,
        functools.partial(_up_epilogue, plan=up),
        extras=[rows.spread_gates(x.gate_TX), *([x.w_down_NFD] * few)],
        afterwards=functools.partial(_prefetch_down, x=x, plan=down) if few else None,
        out_type=(hidden,) * (3 if saves else 1),
        scratch=[_staging(x, up, dtype)],
        name="expert_mlp_up",
        cost=cost(x, num_experts, matrices=2, rows=D + F * (3 if saves else 1)),
    )
    is_final = X == 1 and x.shared_TD is None and down.splits == 1
    y_dtype = dtype if is_final else jnp.dtype(jnp.float32)
    (y_APD,) = _product(
        x,
        hidden_PF,
        ("down",),
        rows.blocks_BF,
        down,
        functools.partial(_down_epilogue, plan=down),
        extras=[],
        out_type=(jax.ShapeDtypeStruct((down.splits, P, D), y_dtype),),
        scratch=[_staging(x, down, y_dtype)],
        name="expert_mlp_down",
        cost=cost(x, num_experts, matrices=1, rows=D + F),
    )
    y_TD = rows.gather(y_APD, X)
    if x.shared_TD is not None:
        y_TD += x.shared_TD.astype(jnp.float32)
    return y_TD.astype(dtype), Saved(rows, *products) if saves else None
