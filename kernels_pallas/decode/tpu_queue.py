"""The queue of the decode kernel for TPUs: blocks of a cache on their way from HBM into VMEM."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.visibility import Settings
from kernels_pallas.tpu_primitives import LANES, round_up

TILE = 8  # slots are copied in multiples of it
_ROW, _BLOCK, _ASKED, _ATTENDED, _HELD = range(5)  # fields of the cursor


class Sizes(NamedTuple):
    """Static sizes, and how the slots are cut.

    Attributes:
        batch, queries, kv_heads: B, T and K.
        group: query heads that share a kv head.
        slots: of a row; pages counted in full.
        block: slots attended at a time.
        piece: slots of a copy: the block, or with pages a page or a part of one.
        page: slots of a page, None without pages.
        orders_scales: the cache is in pages, and scales are blocks of rows [B, blocks, K, block].
        depth: blocks in the ring.
        splits: parts into which the blocks of every row are divided.
    """

    batch: int
    queries: int
    kv_heads: int
    group: int
    slots: int
    block: int
    piece: int
    page: int | None
    orders_scales: bool
    depth: int
    splits: int

    @property
    def rows(self) -> int:
        """Return the rows of logits of a kv head: its queries, then padding."""
        return round_up(self.queries * self.group, TILE)

    @property
    def whole(self) -> int:
        """Return the slots before the last ones that are fewer than 128, which have a block alone.

        Copies within have a size that the row decides, which must be a multiple of 128; the copy of
        the last ones has its own, fixed, size.
        """
        return self.slots // LANES * LANES if self.page is None else self.slots


class Row(NamedTuple):
    """What a program knows of a row of the batch: scalars in SMEM.

    Attributes:
        first: the slot where the first block starts.
        blocks: how many there are.
        follow: the next row that has blocks, or B.
        begin, end: the slots that some query sees.
        clear_begin, clear_end: the slots that every query sees, padding left out.
        kv_start: the position of slot 0.
        positions: of the T queries.
    """

    first: Any
    blocks: Any
    follow: Any
    begin: Any
    end: Any
    clear_begin: Any
    clear_end: Any
    kv_start: Any
    positions: list[Any]


class Cache(NamedTuple):
    """The cache, [B, K, S, H] or pages [P, K, page, H]; scales without H, or by `orders_scales`."""

    k: Any
    v: Any
    k_scale: Any
    v_scale: Any

    def parts(self) -> list[Any]:
        """Return what is there."""
        return [part for part in self if part is not None]


class Scratch(NamedTuple):
    """What a core keeps in VMEM and SMEM.

    Attributes:
        buffers: the ring; Cache of [depth, K, block, ...].
        arrived: a semaphore for each block of the ring.
        cursor: the row and block to be copied next, how many blocks were asked for and how many
            attended, and which window of the page table is held.
        window: of the page table; None without pages.
        window_arrived: its semaphore.
        top, sum: [K, rows, 128] running maximum of logits and sum of weights, alike in all lanes.
        acc: [K, rows, H] running weighted sum of values.
    """

    buffers: Cache
    arrived: Any
    cursor: Any
    window: Any
    window_arrived: Any
    top: Any
    sum: Any
    acc: Any


class Program(NamedTuple):
    """What the steps of a program share."""

    plan: Any
    cache: Cache
    windows: Any
    scratch: Scratch
    sizes: Sizes
    how: Settings


def read_row(p: Program, index: Any) -> Row:
    """Read the scalars of a row of the batch."""
    scalars = len(Row._fields) - 1
    width = scalars + p.sizes.queries
    start = (pl.program_id(0) * p.sizes.batch + index) * width
    fields = [p.plan[start + i] for i in range(width)]
    return Row(*fields[:scalars], positions=fields[scalars:])


def _bounds(p: Program, row: Row, block: Any) -> tuple[Any, Any]:
    """Return the slots [first, stop) that a block of a row has to bring."""
    sizes = p.sizes
    first = row.first + block * sizes.block
    stop = jnp.minimum(first + sizes.block, row.end)
    if sizes.whole < sizes.slots:
        is_last = first >= sizes.whole
        first = jnp.minimum(first, sizes.whole)
        stop = jnp.where(is_last, row.end, jnp.minimum(stop, sizes.whole))
    return pl.multiple_of(first, math.gcd(sizes.block, LANES)), stop


def _copy_block(
    p: Program, index: Any, row: Row, first: Any, stop: Any, ring: Any, *, is_start: bool
) -> None:
    """Start every copy that brings the slots [first, stop) of a row, or wait for every one."""
    sizes = p.sizes
    kinds = list(zip(p.cache.parts(), p.scratch.buffers.parts(), strict=True))
    kinds, ordered = (kinds[:2], kinds[2:]) if sizes.orders_scales else (kinds, [])

    def move(source_ref: Any, target_ref: Any) -> None:
        transfer = pltpu.make_async_copy(source_ref, target_ref, p.scratch.arrived.at[ring])
        transfer.start() if is_start else transfer.wait()

    def copy(index: Any, source: Any, target: Any, size: Any, scale_size: Any) -> None:
        for part, buffer in kinds:
            count = size if len(part.shape) == 4 else scale_size
            source_ref = part.at[index, :, pl.ds(source, count)]
            move(source_ref, buffer.at[ring, :, pl.ds(target, count)])

    def copy_pages(page_size: int) -> None:
        # Pages that lie before what is seen may not exist.
        begin = jnp.maximum(first, jax.lax.div(row.begin, sizes.piece) * sizes.piece)

        def step(i: Any, _: None) -> None:
            slot = begin + i * sizes.piece
            # Where a copy came from does not matter to those who wait for it.
            page = _page(p, index, jax.lax.div(slot, page_size)) if is_start else 0
            offset = pl.multiple_of(jax.lax.rem(slot, page_size), sizes.piece)
            target = pl.multiple_of(slot - first, sizes.piece)
            copy(page, offset, target, sizes.piece, sizes.piece)

        jax.lax.fori_loop(0, pl.cdiv(stop - begin, sizes.piece), step, None)
        for part, buffer in ordered:
            move(part.at[index, jax.lax.div(first, sizes.block)], buffer.at[ring])

    if sizes.page is not None:
        copy_pages(sizes.page)
        return
    size = pl.multiple_of(pl.cdiv(stop - first, LANES) * LANES, LANES)
    if sizes.whole == sizes.slots:
        copy(index, first, 0, size, size)
        return
    is_last = first == sizes.whole
    rest = sizes.slots - sizes.whole
    pl.when(is_last)(lambda: copy(index, sizes.whole, 0, rest, LANES))
    if sizes.whole:
        pl.when(~is_last)(lambda: copy(index, first, 0, size, size))


def _page(p: Program, index: Any, number: Any) -> Any:
    """Look up a page of a row, of which the window of the table is brought unless it is here."""
    cursor, entries = p.scratch.cursor, p.windows.shape[2]
    wanted = index * (p.windows.shape[0] // p.sizes.batch) + jax.lax.div(number, entries)

    @pl.when(cursor[_HELD] != wanted)
    def _() -> None:
        source_ref, arrived = p.windows.at[wanted], p.scratch.window_arrived
        copy = pltpu.make_async_copy(source_ref, p.scratch.window, arrived)
        copy.start()
        copy.wait()
        cursor[_HELD] = wanted

    return p.scratch.window[0, jax.lax.rem(number, entries)]


def _ask(p: Program) -> None:
    """Start the copies of the next block in the queue, if there is one."""
    cursor = p.scratch.cursor
    index, block = cursor[_ROW], cursor[_BLOCK]

    @pl.when(index < p.sizes.batch)
    def _() -> None:
        row = read_row(p, index)
        first, stop = _bounds(p, row, block)
        ring = jax.lax.rem(cursor[_ASKED], p.sizes.depth)
        _copy_block(p, index, row, first, stop, ring, is_start=True)
        is_last = block + 1 == row.blocks
        cursor[_ROW] = jnp.where(is_last, row.follow, index)
        cursor[_BLOCK] = jnp.where(is_last, 0, block + 1)
        cursor[_ASKED] += 1


def open_queue(p: Program, row: Row) -> None:
    """Ask for the first blocks; the ring keeps one place free for the next."""
    cursor = p.scratch.cursor
    cursor[_ROW] = jnp.where(row.blocks > 0, 0, row.follow)
    cursor[_BLOCK] = 0
    cursor[_ASKED] = 0
    cursor[_ATTENDED] = 0
    cursor[_HELD] = -1
    for _ in range(p.sizes.depth - 1):
        _ask(p)


def take(p: Program, row: Row, block: Any) -> tuple[Any, Any, Any]:
    """Ask for one more block and wait for this one of the row; its ring, and its [first, stop)."""
    _ask(p)
    cursor = p.scratch.cursor
    ring = jax.lax.rem(cursor[_ATTENDED], p.sizes.depth)
    first, stop = _bounds(p, row, block)
    _copy_block(p, pl.program_id(1), row, first, stop, ring, is_start=False)
    cursor[_ATTENDED] += 1
    return ring, first, stop
