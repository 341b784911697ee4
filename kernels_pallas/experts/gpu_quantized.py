"""The grouped product with stored matrices: int8, int4 or float8 on the way to the tensor cores.

As `gpu_product`, except that matrices come into the ring as stored, and that a warpgroup widens its
tile to bfloat16 before it multiplies: from one place in shared memory to another, through
registers. So warpgroups side by side share rows and have columns of their own. Widening is exact;
scales come after the product, in float32: those of output channels, and of rows where these were
rounded to float8 too, at the end, and those of int4's groups after each step, which is one group.

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

from kernels_pallas.experts.gpu_product import (
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
    sliced,
    span,
    walk,
)
from kernels_pallas.experts.inputs import INT4_GROUP

_OF_COLUMNS = TILE.reduce(0)
_PART = 32  # columns that are widened at a time, for want of registers


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
        wide: tiles to multiply [groups, buffers, matrices, channels, width].
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


def _widen(stored: Any, wide: Any) -> None:
    """Write a tile as bfloat16, of int4 the odd channels after the even ones, part by part."""

    @pl.loop(0, stored.shape[1] // _PART)
    def _(part: jax.Array) -> None:
        columns = pl.ds(pl.multiple_of(part * _PART, _PART), _PART)
        tile = plgpu.load(stored.at[:, columns], layout=TILE)
        if wide.shape[0] > DEPTH:
            wide[pl.ds(0, DEPTH), columns] = ((tile & 15) ^ 8).astype(wide.dtype) - 8
            wide[pl.ds(DEPTH, DEPTH), columns] = (tile & -16).astype(wide.dtype) * 0.0625
            return
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
    stages, count = jnp.int32(plan.stages), len(term.w)
    group = jax.lax.axis_index("warpgroup")
    wide, shape = ring.wide.at[group], (ROWS, plan.width)

    def release(turn: jax.Array) -> None:
        plgpu.barrier_arrive(ring.free.at[jax.lax.rem(turn, stages)])

    def by_channels(turn: jax.Array, steps: jax.Array) -> Sequence[jax.Array]:
        """Multiply one step while the next is widened."""

        def sum_up(*accs: Any) -> Sequence[jax.Array]:
            def step(k: jax.Array, _: None) -> None:
                slot, buffer = jax.lax.rem(turn + k, stages), jax.lax.rem(k, jnp.int32(2))
                plgpu.barrier_wait(ring.ready.at[slot])
                for i in range(count):
                    _widen(ring.w.at[slot, group, i], wide.at[buffer, i])
                plgpu.commit_smem()
                for i, acc in enumerate(accs):
                    plgpu.wgmma(acc, ring.x.at[slot], wide.at[buffer, i])
                plgpu.wgmma_wait(count)  # those before are done with their tiles
                pl.when(k > 0)(lambda: release(turn + k - 1))

            jax.lax.fori_loop(jnp.int32(0), steps, step, None)
            return [acc[...] for acc in accs]

        sums = pl.run_scoped(sum_up, *[plgpu.ACC(shape, jnp.float32)] * count)
        release(turn + steps - 1)
        return sums

    def by_groups(turn: jax.Array, steps: jax.Array) -> Sequence[jax.Array]:
        """Scale the product of each step before it is added."""

        def step(k: jax.Array, sums: Sequence[jax.Array]) -> Sequence[jax.Array]:
            slot = jax.lax.rem(turn + k, stages)
            plgpu.barrier_wait(ring.ready.at[slot])
            out = []
            for i, before in enumerate(sums):
                tile = wide.at[0, i]
                _widen(ring.w.at[slot, group, i], tile)
                plgpu.commit_smem()

                def multiply(acc: Any, tile: Any = tile) -> jax.Array:
                    plgpu.wgmma(acc, ring.x.at[slot], tile)
                    return acc[...]

                part = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
                scale = ring.scales.at[slot, group, i]
                scale_C = plgpu.load(scale, layout=_OF_COLUMNS, optimized=False)
                more = part * jax.lax.broadcast_in_dim(scale_C, shape, [1])
                out.append(jax.lax.optimization_barrier(before + more))
            release(turn + k)
            return out

        nothing = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), TILE)
        return jax.lax.fori_loop(jnp.int32(0), steps, step, [nothing] * count)

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
        multiply = by_groups if term.is_int4 else by_channels
        sums = [sliced(total) for total in multiply(turn, end - begin)]
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
    buffers = 1 if term.is_int4 else 2
    scales = plgpu.SMEM((stages, groups, count, plan.width), jnp.float32)
    copies = ROWS // plan.granule + groups * count * (2 if term.is_int4 else 1)
    rings = _Ring(
        plgpu.SMEM((stages, ROWS, term.channels), term.x_PK.dtype),
        plgpu.SMEM((stages, groups, count, DEPTH, plan.width), term.w[0].dtype),
        scales if term.is_int4 else None,
        plgpu.SMEM((groups, buffers, count, term.channels, plan.width), term.x_PK.dtype),
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
