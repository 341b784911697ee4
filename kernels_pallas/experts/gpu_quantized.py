"""The grouped product with stored matrices: int8, int4 or float8 on the way to the tensor cores.

As `gpu_product`, except that matrices come into the ring as stored, and that a warpgroup widens
them to bfloat16 before it multiplies, 64 columns at a time: from one place in shared memory to
another, through registers, while the tensor cores are at the columns before. So warpgroups side by
side share rows and have columns of their own. Scales of output channels, and of rows where these
were rounded to float8 too, multiply the sums, in float32; those of int4's groups the widened tile.

A byte of int4 holds two input channels, which become two tiles, one of the even and one of the odd
channels; the rows' channels come in that order (`halved`). Both are got by arithmetic on four
bytes at a time: the high nibble's byte is 16 times its level, the low one's, its sign bit flipped,
the level plus 8.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.experts.gpu_work import (
    DEPTH,
    OF_ROWS,
    ROWS,
    TILE,
    Item,
    Plan,
    Sums,
    bring_rows,
    drain,
    launch,
    span,
    walk,
)
from kernels_pallas.experts.inputs import INT4_GROUP

_OF_COLUMNS = TILE.reduce(0)
_PART = 64  # columns that are widened and multiplied at a time
_SLICE = 32  # and of these, as many as registers hold


class Stored(NamedTuple):
    """Rows and the stored matrices that they meet.

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
        wide: tiles to multiply [groups, matrices * width / 64, channels, 64].
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


def _copy(term: Stored, visit: Callable[..., jax.Array], plan: Plan, ring: _Ring) -> None:
    """Bring the tiles of all items, each as soon as there is room."""

    def fetch(item: Item, k: jax.Array, turn: jax.Array) -> jax.Array:
        slot = jax.lax.rem(turn, jnp.int32(plan.stages))
        ready = ring.ready.at[slot]

        @pl.when(turn >= plan.stages)
        def _reuse() -> None:
            plgpu.barrier_wait(ring.free.at[slot])

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

    drain(ring.free, visit(copies))


def _widen(stored: Any, scale: Any, wide: Any) -> None:
    """Write a tile as bfloat16, of int4 the odd channels after the even ones, and scaled."""
    for first in range(0, _PART, _SLICE):
        columns = pl.ds(first, _SLICE)
        tile = plgpu.load(stored.at[:, columns], layout=TILE)
        if scale is not None:
            scale_C = plgpu.load(scale.at[columns], layout=_OF_COLUMNS, optimized=False)
            factor = jax.lax.broadcast_in_dim(scale_C.astype(wide.dtype), tile.shape, [1])
            even = (((tile & 15) ^ 8).astype(wide.dtype) - 8) * factor
            wide[pl.ds(0, DEPTH), columns] = even
            odd = (tile & -16).astype(wide.dtype) * (factor * 0.0625)
            wide[pl.ds(DEPTH, DEPTH), columns] = odd
            continue
        if tile.dtype == jnp.float8_e4m3fn:
            tile = tile.astype(jnp.float32)
        wide[:, columns] = tile.astype(wide.dtype)


def _multiply(
    term: Stored,
    visit: Callable[..., jax.Array],
    plan: Plan,
    ring: _Ring,
    epilogue: Callable[[Sequence[Sums], Item], None],
) -> None:
    """Sum the products of this warpgroup's columns, and hand over the sums of each item."""
    stages, parts = jnp.int32(plan.stages), plan.width // _PART
    group = jax.lax.axis_index("warpgroup")
    tiles = [(i, part) for i in range(len(term.w)) for part in range(parts)]

    def release(turn: jax.Array) -> None:
        plgpu.barrier_arrive(ring.free.at[jax.lax.rem(turn, stages)])

    def sum_up(turn: jax.Array, steps: jax.Array) -> Sequence[jax.Array]:
        def run(*accs: Any) -> Sequence[jax.Array]:
            def step(k: jax.Array, _: None) -> None:
                slot = jax.lax.rem(turn + k, stages)
                plgpu.barrier_wait(ring.ready.at[slot])
                for (i, part), acc, n in zip(tiles, accs, range(len(tiles)), strict=True):
                    columns = pl.ds(part * _PART, _PART)
                    scale = None if ring.scales is None else ring.scales.at[slot, group, i, columns]
                    wide = ring.wide.at[group, n]
                    plgpu.wgmma_wait(len(tiles) - 1)  # the last product with this tile is done
                    _widen(ring.w.at[slot, group, i, :, columns], scale, wide)
                    plgpu.commit_smem()
                    plgpu.wgmma(acc, ring.x.at[slot], wide)
                pl.when(k > 0)(lambda: release(turn + k - 1))

            jax.lax.fori_loop(jnp.int32(0), steps, step, None)
            return [acc[...] for acc in accs]

        sums = pl.run_scoped(run, *[plgpu.ACC((ROWS, _PART), jnp.float32)] * len(tiles))
        release(turn + steps - 1)
        return sums

    def joined(sums: Sequence[jax.Array]) -> Sums:
        """Give columns of a matrix whose sums are in parts; a request stays within one."""

        def columns(begin: int, size: int) -> jax.Array:
            part, inside = divmod(begin, _PART)
            return sums[part][:, inside : inside + size]

        return columns

    def scaled(sums: Sums, scale_NC: Any, item: Item) -> Sums:
        """Scale columns and rows when the epilogue asks for them."""

        def columns(begin: int, size: int) -> jax.Array:
            tile = sums(begin, size)
            source = scale_NC.at[item.matrix, pl.ds(pl.multiple_of(item.column + begin, 8), size)]
            scale_C = plgpu.load(source, layout=_OF_COLUMNS, optimized=False)
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
        totals = sum_up(turn, end - begin)
        sums = [joined(totals[i * parts :]) for i in range(len(term.w))]
        if not term.is_int4:
            sums = [scaled(*pair, own) for pair in zip(sums, term.scales, strict=True)]
        epilogue(sums, own)
        return turn + end - begin

    visit(work)


def product(
    term: Stored,
    blocks_BF: jax.Array,
    plan: Plan,
    epilogue: Callable[..., None],
    *,
    extras: Sequence[jax.Array],
    out_type: Any,
    scratch: Sequence[Any],
    name: str,
    cost: pl.CostEstimate,
) -> Any:
    """Multiply the rows of each block by its expert's matrices; see `gpu_product.product`."""
    count, groups, stages = len(term.w), plan.groups, plan.stages
    scales = plgpu.SMEM((stages, groups, count, plan.width), jnp.float32)
    copies = ROWS // plan.granule + groups * count * (2 if term.is_int4 else 1)
    rings = _Ring(
        plgpu.SMEM((stages, ROWS, term.channels), term.x_PK.dtype),
        plgpu.SMEM((stages, groups, count, DEPTH, plan.width), term.w[0].dtype),
        scales if term.is_int4 else None,
        plgpu.SMEM((groups, count * plan.width // _PART, term.channels, _PART), term.x_PK.dtype),
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
    )
    width = groups * plan.width
    columns = term.w[0].shape[2] // width
    leaves, tree = jax.tree.flatten((term, blocks_BF, list(extras)))
    outputs = jax.tree.leaves(out_type)

    def body(*refs: Any) -> None:
        term, blocks_BF, extras = jax.tree.unflatten(tree, refs[: len(leaves)])
        outs, rest = refs[len(leaves) :][: len(outputs)], refs[len(leaves) + len(outputs) :]
        ring, own = _Ring(*rest[: len(rings)]), rest[len(rings) :]

        def visit(step: Callable[..., jax.Array]) -> jax.Array:
            return walk(blocks_BF, columns, plan.splits, width, step)

        def finish(sums: Sequence[Sums], item: Item) -> None:
            epilogue(sums, item, extras, outs, own)

        group = jax.lax.axis_index("warpgroup")

        @pl.when(group < groups)
        def _() -> None:
            _multiply(term, visit, plan, ring, finish)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == groups)
        def _() -> None:
            _copy(term, visit, plan, ring)

    return launch(
        body,
        leaves,
        out_type=out_type,
        scratch=(*rings, *scratch),
        programs=min(plan.programs, blocks_BF.shape[0] * columns * plan.splits),
        warpgroups=groups + 1,
        name=name,
        cost=cost,
    )
