"""The grouped product with stored matrices: int8, int4 or float8 on the way to the tensor cores.

As `gpu_product`, except that matrices come into the ring as stored, and that a warpgroup widens
them to bfloat16 before it multiplies, 64 columns at a time: from one place in shared memory to
another, through registers, while the tensor cores are at the columns before. So warpgroups side by
side share rows and have columns of their own. Scales of output channels, and of rows where these
were rounded to float8 too, multiply the sums, in float32; those of int4's groups the widened tile.

A byte of int4 holds two input channels, which become two tiles, one of the even and one of the odd
channels; the rows' channels come in that order (`halved`). Widening is what bounds these products,
so threads take eight columns of a line at a time, and levels come of few instructions: four bytes
at a time are spread over the last bits of bfloat16s that are 128.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.experts.gpu_work import (
    DEPTH,
    Item,
    ProductPlan,
    Sums,
    bring_rows,
    run_items,
    span,
)
from kernels_pallas.experts.inputs import INT4_GROUP
from kernels_pallas.gpu_primitives import (
    LINES,
    OF_COLUMNS,
    OF_ROWS,
    PART,
    ROWS,
    Slots,
    nibbles,
    widen,
)

_MANY = 16  # copies to memory that may be under way: more than are, so nothing but a barrier


class Stored(NamedTuple):
    """PlacedRows and the stored matrices that they meet.

    Attributes:
        x_PK: bfloat16 rows; `halved` for int4.
        scale_P: scale of each row, or None.
        w: matrices [N, K, C], or [N, K / 2, C] of int4.
        scales: of each matrix [N, C], or [N, K / 128, C] of int4.
    """

    x_PK: Any
    scale_P: Any
    w: tuple[Any, ...]
    scales: tuple[Any, ...]

    @property
    def is_int4(self) -> bool:
        """Return whether bytes hold two input channels."""
        return len(self.scales[0].shape) == 3

    @property
    def channels(self) -> int:
        """Return the input channels of a step, whose tile of a matrix has 64 lines."""
        return 2 * DEPTH if self.is_int4 else DEPTH


class _Ring(NamedTuple):
    """Shared memory.

    Attributes:
        x: tiles of rows [stages, 64, channels].
        w: tiles as stored [stages, groups, matrices, 64, width].
        scales: of int4's groups [stages, groups, matrices, width], or None.
        wide: tiles to multiply [groups, tiles, 64, columns]: each has 64 columns of a matrix, or of
            int4 the even or the odd channels of all columns.
        ready, free: barriers of stages.
    """

    x: Any
    w: Any
    scales: Any
    wide: Any
    ready: Any
    free: Any


def halved(x_PK: jax.Array) -> jax.Array:
    """Put the even channels of each group of int4 before its odd ones."""
    x = x_PK.reshape(x_PK.shape[0], -1, INT4_GROUP // 2, 2)
    return x.swapaxes(2, 3).reshape(x_PK.shape)


def _copy(
    term: Stored, visit: Callable[..., jax.Array], ring: _Ring, *, plan: ProductPlan
) -> jax.Array:
    """Bring the tiles of all items, each as soon as there is room; return the turns it took."""

    slots = Slots(ring.ready, ring.free)

    def fetch(item: Item, k: jax.Array, turn: jax.Array) -> jax.Array:
        slot = slots.reuse(turn)
        ready = ring.ready.at[slot]
        for group in range(plan.groups):
            columns = pl.ds(item.column + group * plan.width, plan.width)
            for i, (w, scale) in enumerate(zip(term.w, term.scales, strict=True)):
                source = w.at[item.matrix, pl.ds(k * DEPTH, DEPTH), columns]
                plgpu.copy_gmem_to_smem(source, ring.w.at[slot, group, i], ready)
                if ring.scales is not None:
                    source = scale.at[item.matrix, k, columns]
                    plgpu.copy_gmem_to_smem(source, ring.scales.at[slot, group, i], ready)
        channels = pl.ds(k * term.channels, term.channels)
        bring_rows(term.x_PK, item, channels, ring.x.at[slot], ready, plan.granule)
        return turn + 1

    def copies(turn: jax.Array, item: Item) -> jax.Array:
        steps = span(term.x_PK.shape[1] // term.channels, item.split, plan.splits)
        return jax.lax.fori_loop(*steps, lambda k, turn: fetch(item, k, turn), turn)

    return visit(copies)


def _widen_int4(stored: Any, scale: Any, half: int, wide: Any) -> None:
    """Write the even input channels of 64 columns, or the odd ones, as bfloat16 and scaled."""
    tile = plgpu.load(stored, layout=LINES)
    scale_C = plgpu.load(scale, layout=LINES.reduce(0), optimized=False)
    factor = jax.lax.broadcast_in_dim(scale_C.astype(wide.dtype), tile.shape, [1])
    wide[...] = nibbles(tile, half) * factor


def _multiply(
    term: Stored,
    visit: Callable[..., jax.Array],
    ring: _Ring,
    prologue: Callable[[Item], None],
    epilogue: Callable[[Sequence[Sums], Item], None],
    *,
    plan: ProductPlan,
) -> None:
    """Sum the products of this warpgroup's columns, and hand over the sums of each item."""
    _, tiles, _, columns = ring.wide.shape
    slots, group = Slots(ring.ready, ring.free), jax.lax.axis_index("warpgroup")
    count, parts = len(term.w), plan.width // PART
    blocks = [(i, pl.ds(part * PART, PART)) for i in range(count) for part in range(parts)]

    def fill(n: int, slot: jax.Array, wide: Any) -> Any:
        """Widen tile n of a step and return the rows' channels that meet it."""
        if ring.scales is None:
            i, here = blocks[n]
            widen(ring.w.at[slot, group, i, :, here], wide)
            return ring.x.at[slot]
        for block, (i, here) in enumerate(blocks):
            stored, scale = ring.w.at[slot, group, i, :, here], ring.scales.at[slot, group, i, here]
            _widen_int4(stored, scale, n, wide.at[:, pl.ds(block * PART, PART)])
        return ring.x.at[slot, :, pl.ds(n * DEPTH, DEPTH)]

    def sum_up(turn: jax.Array, steps: jax.Array) -> Sequence[jax.Array]:
        def run(*accs: Any) -> Sequence[jax.Array]:
            def step(k: jax.Array, _: None) -> None:
                slot = slots.filled(turn + k)
                for n in range(tiles):
                    wide = ring.wide.at[group, n]
                    plgpu.wgmma_wait(tiles - 1)  # the last product with this tile is done
                    plgpu.wait_smem_to_gmem(_MANY, wait_read_only=True)  # and for all four warps
                    rows = fill(n, slot, wide)
                    plgpu.commit_smem()
                    plgpu.wgmma(accs[n % len(accs)], rows, wide)
                pl.when(k > 0)(lambda: slots.release(turn + k - 1))

            jax.lax.fori_loop(jnp.int32(0), steps, step, None)
            return [acc[...] for acc in accs]

        accs = [plgpu.ACC((ROWS, columns), jnp.float32)] * (count * plan.width // columns)
        sums = pl.run_scoped(run, *accs)
        slots.release(turn + steps - 1)
        return sums

    def of_matrix(sums: Sequence[jax.Array], i: int) -> Sums:
        """Give columns of a matrix; a request stays within 64."""

        def give(begin: int, size: int) -> jax.Array:
            part, inside = divmod(i * plan.width + begin, columns)
            return sums[part][:, inside : inside + size]

        return give

    def scaled(sums: Sums, scale_NC: Any, item: Item) -> Sums:
        """Scale columns and rows when the epilogue asks for them."""

        def columns(begin: int, size: int) -> jax.Array:
            tile = sums(begin, size)
            source = scale_NC.at[item.matrix, pl.ds(pl.multiple_of(item.column + begin, 8), size)]
            scale_C = plgpu.load(source, layout=OF_COLUMNS, optimized=False)
            tile *= jax.lax.broadcast_in_dim(scale_C, tile.shape, [1])
            if term.scale_P is None:
                return tile
            here = pl.ds(pl.multiple_of(item.start, 8), ROWS)
            scale_R = plgpu.load(term.scale_P.at[here], layout=OF_ROWS, optimized=False)
            return tile * jax.lax.broadcast_in_dim(scale_R, tile.shape, [0])

        return columns

    def work(turn: jax.Array, item: Item) -> jax.Array:
        begin, end = span(term.x_PK.shape[1] // term.channels, item.split, plan.splits)
        own = item._replace(column=item.column + group * plan.width)
        prologue(own)
        totals = sum_up(turn, end - begin)
        sums = [of_matrix(totals, i) for i in range(count)]
        if not term.is_int4:
            sums = [scaled(*pair, own) for pair in zip(sums, term.scales, strict=True)]
        epilogue(sums, own)
        return turn + end - begin

    visit(work)


def product(
    term: Stored,
    blocks_BF: jax.Array,
    plan: ProductPlan,
    epilogue: Callable[..., None],
    **how: Any,
) -> Any:
    """Multiply the rows of each block by its expert's matrices; see `gpu_product.product`."""
    count, groups, stages = len(term.w), plan.groups, plan.stages
    scales = plgpu.SMEM((stages, groups, count, plan.width), jnp.float32)
    total = count * plan.width
    wide = (2, DEPTH, total) if term.is_int4 else (total // PART, DEPTH, PART)
    copies = 1 + groups * count * (2 if term.is_int4 else 1)
    rings = _Ring(
        plgpu.SMEM((stages, ROWS, term.channels), term.x_PK.dtype),
        plgpu.SMEM((stages, groups, count, DEPTH, plan.width), term.w[0].dtype),
        scales if term.is_int4 else None,
        plgpu.SMEM((groups, *wide), term.x_PK.dtype),
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
    )
    width = groups * plan.width
    return run_items(
        term,
        blocks_BF,
        plan,
        functools.partial(_copy, plan=plan),
        functools.partial(_multiply, plan=plan),
        epilogue,
        columns=term.w[0].shape[2] // width,
        width=width,
        ring=rings,
        shifts_registers=False,
        **how,
    )
