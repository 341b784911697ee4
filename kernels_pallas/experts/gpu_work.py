"""What the grouped products of the GPU kernels share: items of work, the ring's rules, writing."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import backend
from kernels_pallas.experts.dispatch import Block
from kernels_pallas.gpu_primitives import ROWS, Slots, run_ring

DEPTH = 64  # input channels of a step
_TOGETHER = 16  # blocks that take turns at the same columns
_BOX = 256  # lines that one operation of TMA takes at most


class ProductPlan(NamedTuple):
    """What is static in a product.

    Attributes:
        groups: warpgroups that multiply.
        granule: rows of one copy, of which an expert's rows fill a multiple.
        width: columns of one matrix in an item.
        stages: tiles in the ring.
        per_processor: programs of a multiprocessor.
        splits: parts of the sum.
        is_transposed: whether matrices are [columns, input channels].
    """

    groups: int
    granule: int
    width: int
    stages: int
    per_processor: int
    splits: int = 1
    is_transposed: bool = False

    @property
    def rows(self) -> int:
        """Return the rows of a block."""
        return self.groups * ROWS

    @property
    def programs(self) -> int:
        """Return how many programs run at a time."""
        return self.per_processor * backend.gpu().multiprocessors


class Item(NamedTuple):
    """An item of work: its matrix, first row, rows that count, first column, part of the sum."""

    matrix: jax.Array
    start: jax.Array
    rows: jax.Array
    column: jax.Array
    split: jax.Array


Sums = Callable[[int, int], jax.Array]  # first and number of columns -> float32 [64, number]


def _read(blocks_BF: Any, b: jax.Array) -> Block:
    return Block(*(blocks_BF[b, f] for f in range(len(Block._fields))))


def _run_of(blocks_BF: Any, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the first block of the run that block b belongs to, and how many those are."""
    block = _read(blocks_BF, b)
    inside = jax.lax.rem(block.number, jnp.int32(_TOGETHER))
    return b - inside, jnp.minimum(block.count - block.number + inside, _TOGETHER)


def walk(
    blocks_BF: Any,
    columns: int,
    splits: int,
    width: int,
    step: Callable[..., jax.Array],
    most: int | None = None,
) -> jax.Array:
    """Visit the items of this program, by blocks and columns of the matrices.

    Blocks of one expert, up to a dozen at a time, come before the next columns: what they read of
    the matrix is then read from memory once, and from the L2 cache by all blocks but the first, and
    so are their own rows.

    Args:
        blocks_BF: see `gpu_rows`.
        columns: tiles of so many columns.
        splits: parts of each sum.
        width: of a tile.
        step: (tiles that came before, item) -> tiles with those of the item.
        most: items of all programs that are visited; None for all.

    Returns:
        Tiles of all items.
    """
    parts = columns * splits

    def visit(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, turn = state
        first, count = _run_of(blocks_BF, jax.lax.div(i, jnp.int32(parts)))
        inside = i - first * parts
        part = jax.lax.div(inside, count)
        block = _read(blocks_BF, first + jax.lax.rem(inside, count))
        column = jax.lax.div(part, jnp.int32(splits)) * width
        split = jax.lax.rem(part, jnp.int32(splits))
        turn = step(turn, Item(block.expert, block.start, block.rows, column, split))
        return i + jax.lax.axis_size("program"), turn

    total = blocks_BF[0, len(Block._fields)] * parts
    total = total if most is None else jnp.minimum(total, most)
    start = jax.lax.axis_index("program").astype(jnp.int32), jnp.int32(0)
    return jax.lax.while_loop(lambda state: state[0] < total, visit, start)[1]


def sliced(sums: jax.Array) -> Sums:
    """Return what gives columns of the sums."""
    return lambda begin, size: sums[:, begin : begin + size]


def span(steps: int, split: jax.Array, splits: int) -> tuple[jax.Array, jax.Array]:
    """Return the first step of a part of the sum, and the one after its last."""
    if splits == 1:
        return jnp.int32(0), jnp.int32(steps)
    parts = jnp.int32(splits)
    return jax.lax.div(split * steps, parts), jax.lax.div((split + 1) * steps, parts)


def bring_rows(x_PK: Any, item: Item, channels: Any, tile: Any, ready: Any, granule: int) -> None:
    """Copy the rows of a block that count, in one copy of a granule, or of two, four, and so on.

    What comes after them, other experts' rows, is multiplied and not written.
    """

    def bring(rows: int) -> None:
        theirs = pl.ds(pl.multiple_of(item.start, granule), rows)
        plgpu.copy_gmem_to_smem(x_PK.at[theirs, channels], tile.at[pl.ds(0, rows)], ready)

    def at_least(rows: int) -> None:
        if rows >= tile.shape[0]:
            bring(tile.shape[0])
        else:
            jax.lax.cond(item.rows <= rows, lambda: bring(rows), lambda: at_least(2 * rows))

    at_least(granule)


def prefetch(w: Any, blocks_BF: Any, plan: ProductPlan, width: int, steps: int) -> None:
    """Bring into the L2 cache what the next product reads first, while this one comes to its end.

    Args:
        w: the next product's matrix [N, lines, C].
        blocks_BF: see `gpu_rows`.
        plan: of the next product.
        width: columns of its items.
        steps: of its whole sums, each of 64 lines.
    """
    lines = min(plan.stages, steps, _BOX // DEPTH) * DEPTH

    def touch(turn: jax.Array, item: Item) -> jax.Array:
        first = span(steps, item.split, plan.splits)[0] * DEPTH
        source = w.at[item.matrix, pl.ds(first, lines), pl.ds(item.column, width)]
        plgpu.async_prefetch(source)
        return turn

    walk(blocks_BF, w.shape[2] // width, plan.splits, width, touch, most=plan.programs)


def fitting(size: int, most: int) -> int:
    """Return the most columns of a tile that divide a matrix."""
    return next(width for width in (256, 128, 64) if width <= most and size % width == 0)


def store(
    tile: jax.Array, buffers: Any, target_PC: Any, item: Item, granule: int, *, before: int = 0
) -> None:
    """Write a tile of 64 rows, only those that are the item's own.

    Args:
        tile: float32 [64, columns].
        buffers: in shared memory [count, 64, some columns], of this warpgroup alone; a
            copy from one goes on while the next is filled.
        target_PC: where to; the item says at which row and column.
        item: an item whose rows are those of the tile.
        granule: of rows that are written or left together.
        before: copies that the epilogue has made by way of the same buffers.
    """
    (count, _, width), dtype, step = buffers.shape, buffers.dtype, min(granule, ROWS)
    for i, column in enumerate(range(0, tile.shape[1], width), before):
        buffer = buffers.at[i % count]
        unread = count - 1 if i > 0 and step == ROWS else 0  # copies that may be under way
        plgpu.wait_smem_to_gmem(unread, wait_read_only=True)
        buffer[...] = tile[:, column : column + width].astype(dtype)
        plgpu.commit_smem()
        columns = pl.ds(item.column + column, width)
        for row in range(0, ROWS, step):

            def write(row: int = row, columns: Any = columns, buffer: Any = buffer) -> None:
                theirs = pl.ds(pl.multiple_of(item.start + row, step), step)
                target = target_PC.at[theirs, columns]
                plgpu.copy_smem_to_gmem(buffer.at[pl.ds(row, step)], target)

            if row == 0:
                write()
            else:
                pl.when(row < item.rows)(write)


def store_all(
    sums: Sums, width: int, buffers: Any, target_PC: Any, item: Item, granule: int
) -> None:
    """Write all columns of the sums; see `store`."""
    step = buffers.shape[2]
    for column in range(0, width, step):
        at = item._replace(column=item.column + column)
        before = column // step
        store(sums(column, step), buffers, target_PC, at, granule, before=before)


def write(
    sums: Sequence[Sums], item: Item, extras: Any, outs: Any, scratch: Any, *, plan: ProductPlan
) -> None:
    """Write the product as it is: the epilogue that adds nothing."""
    del extras
    buffers = scratch[0].at[jax.lax.axis_index("warpgroup")]
    store_all(sums[0], plan.width, buffers, outs[0], item, plan.granule)


def staging(groups: int, dtype: Any, *, line: int = 128, count: int = 2) -> Any:
    """Return buffers for `store`, for each warpgroup; a line of them has so many bytes."""
    return plgpu.SMEM((groups, count, ROWS, line // jnp.dtype(dtype).itemsize), dtype)


def run_items(
    factors: Any,
    blocks_BF: jax.Array,
    plan: ProductPlan,
    copy: Callable[..., jax.Array],
    multiply: Callable[..., None],
    epilogue: Callable[..., None],
    *,
    prologue: Callable[..., None] | None = None,
    afterwards: Callable[..., None] | None = None,
    extras: Sequence[jax.Array],
    columns: int,
    width: int,
    ring: Any,
    **how: Any,
) -> Any:
    """Run a kernel whose items are blocks of rows and columns of matrices.

    Args:
        factors: rows and matrices.
        blocks_BF: see `gpu_rows`.
        plan: static sizes.
        copy: (factors, visit, ring) brings tiles and returns of how many turns; `visit` is `walk`
            but for its last argument.
        multiply: (factors, visit, ring, prologue, epilogue) multiplies them.
        epilogue: (sums of each matrix, item, extras, outputs, scratch) writes the outputs.
        prologue: (item, extras, scratch) starts copies that the epilogue waits for.
        afterwards: (blocks, extras), what the warpgroup does that copied, after the last copy.
        extras: further arrays for these.
        columns: tiles of so many columns.
        width: of a tile.
        ring: tiles, and barriers `ready` and `free` of their `Slots`.
        **how: see `gpu_primitives.run_ring`.
    """

    def visits(blocks_BF: Any) -> Callable[..., jax.Array]:
        return lambda step: walk(blocks_BF, columns, plan.splits, width, step)

    def copy_all(inputs: Any, ring: Any) -> None:
        factors, blocks_BF, extras = inputs
        turns = copy(factors, visits(blocks_BF), ring)
        if afterwards is not None:
            afterwards(blocks_BF, extras)
        Slots(ring.ready, ring.free).drain(turns)

    def multiply_all(inputs: Any, outs: Sequence[Any], ring: Any, own: Sequence[Any]) -> None:
        factors, blocks_BF, extras = inputs

        def begin(item: Item) -> None:
            if prologue is not None:
                prologue(item, extras, own)

        def finish(sums: Sequence[Sums], item: Item) -> None:
            epilogue(sums, item, extras, outs, own)

        multiply(factors, visits(blocks_BF), ring, begin, finish)

    return run_ring(
        (factors, blocks_BF, list(extras)),
        copy_all,
        multiply_all,
        ring=ring,
        groups=plan.groups,
        programs=min(plan.programs, blocks_BF.shape[0] * columns * plan.splits),
        **how,
    )
