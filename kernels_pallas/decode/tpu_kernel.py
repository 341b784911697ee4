"""The decode kernel for TPUs: a queue of copies from the cache, with some arithmetic behind it.

The time is that of bringing the cache from HBM once, as stored.

- One program attends one row of the batch, all heads together. Blocks of slots [K, block, H] come
  into VMEM through a ring of buffers, and the queue runs on into the next row, so that it does not
  drain between rows. Where a device is two cores, each takes half of every row's blocks.
- Only blocks that hold a visible slot are copied, and of the last one only what lies before the
  row's end, up to the next multiple of 128. Its other slots are masked and their values zeroed,
  because the product of a weight 0 and a NaN would be NaN.
- Integers and float8s are widened in VMEM. A scale belongs to a token of a head, which is a column
  of the logits, so it multiplies the float32 logits (of keys) or weights (of values).
- With pages, a block is several of them, or parts of one, each copied on its own. The page table
  comes in windows: its 82k entries for 10M tokens, times the batch, need not fit into SMEM.

Logits are in units of log 2, of which the hardware computes the exponential.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.visibility import (
    NEGATIVE,
    Settings,
    attention_temperature,
    first_visible,
)
from kernels_pallas.tpu_primitives import LANES, round_up

TILE = 8  # slots are copied in multiples of it
_LOG2_E = math.log2(math.e)
_Masks = tuple[jax.Array, jax.Array]  # of a block: [rows, block] and [block, 1]
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


class _Program(NamedTuple):
    """What the steps of a program share."""

    plan: Any
    cache: Cache
    windows: Any
    scratch: Scratch
    sizes: Sizes
    how: Settings


def _read_row(p: _Program, index: Any) -> Row:
    """Read the scalars of a row of the batch."""
    scalars = len(Row._fields) - 1
    width = scalars + p.sizes.queries
    start = (pl.program_id(0) * p.sizes.batch + index) * width
    fields = [p.plan[start + i] for i in range(width)]
    return Row(*fields[:scalars], positions=fields[scalars:])


def _bounds(p: _Program, row: Row, block: Any) -> tuple[Any, Any]:
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
    p: _Program, index: Any, row: Row, first: Any, stop: Any, ring: Any, *, is_start: bool
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


def _page(p: _Program, index: Any, number: Any) -> Any:
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


def _ask(p: _Program) -> None:
    """Start the copies of the next block in the queue, if there is one."""
    cursor = p.scratch.cursor
    index, block = cursor[_ROW], cursor[_BLOCK]

    @pl.when(index < p.sizes.batch)
    def _() -> None:
        row = _read_row(p, index)
        first, stop = _bounds(p, row, block)
        ring = jax.lax.rem(cursor[_ASKED], p.sizes.depth)
        _copy_block(p, index, row, first, stop, ring, is_start=True)
        is_last = block + 1 == row.blocks
        cursor[_ROW] = jnp.where(is_last, row.follow, index)
        cursor[_BLOCK] = jnp.where(is_last, 0, block + 1)
        cursor[_ASKED] += 1


def _open_queue(p: _Program, row: Row) -> None:
    """Ask for the first blocks; the ring keeps one place free for the next."""
    cursor = p.scratch.cursor
    cursor[_ROW] = jnp.where(row.blocks > 0, 0, row.follow)
    cursor[_BLOCK] = 0
    cursor[_ASKED] = 0
    cursor[_ATTENDED] = 0
    cursor[_HELD] = -1
    for _ in range(p.sizes.depth - 1):
        _ask(p)


class _Queries(NamedTuple):
    """What is known of the rows of logits: [rows, 1] each.

    Attributes:
        is_real: not padding.
        factor: on the logits, in units of log 2.
        lo, hi: the slots [lo, hi) that are seen, but for the length of the cache.
    """

    is_real: jax.Array
    factor: jax.Array
    lo: jax.Array
    hi: jax.Array


def _queries(p: _Program, row: Row) -> _Queries:
    """Spread the positions of the queries over the rows of logits."""
    number = jax.lax.broadcasted_iota(jnp.int32, (p.sizes.rows, 1), 0)
    position = jnp.full_like(number, -1)
    for t, scalar in enumerate(row.positions):
        is_t = (number >= t * p.sizes.group) & (number < (t + 1) * p.sizes.group)
        position = jnp.where(is_t, scalar, position)
    is_real = position >= 0
    factor = jnp.full(number.shape, p.how.scale * _LOG2_E, jnp.float32)
    if p.how.temperature is not None:
        factor *= attention_temperature(position, p.how.temperature)
    lo = first_visible(position, p.how.chunk_size) - row.kv_start
    return _Queries(is_real, factor, lo, jnp.where(is_real, position - row.kv_start + 1, lo))


def _masks(sizes: Sizes, queries: _Queries, row: Row, first: Any, stop: Any) -> _Masks:
    """Return which query sees which slot of the block [first, stop), and which slots are used."""
    slot_1S = first + jax.lax.broadcasted_iota(jnp.int32, (1, sizes.block), 1)
    slot_S1 = first + jax.lax.broadcasted_iota(jnp.int32, (sizes.block, 1), 0)
    is_seen_RS = (slot_1S >= queries.lo) & (slot_1S < jnp.minimum(queries.hi, stop))
    return is_seen_RS, (slot_S1 >= row.begin) & (slot_S1 < stop)


def _attend_block(
    p: _Program, q_ref: Any, queries: _Queries, ring: Any, masks: _Masks | None
) -> None:
    """Add a block to the running softmax of every head; no masks if all of it is seen by all."""
    buffers = p.scratch.buffers
    precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None

    def dot(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
        dims = (((1,), (axis,)), ((), ()))
        return jax.lax.dot_general(
            x, y, dims, precision=precision, preferred_element_type=jnp.float32
        )

    for head in range(p.sizes.kv_heads):
        logits_RS = dot(q_ref[head], buffers.k[ring, head].astype(q_ref.dtype), 1)
        logits_RS *= queries.factor
        if buffers.k_scale is not None:
            logits_RS *= buffers.k_scale[ring, head : head + 1]
        if masks is not None:
            logits_RS = jnp.where(masks[0], logits_RS, NEGATIVE)
        top_RL = p.scratch.top[head]
        new_top_RL = jnp.maximum(top_RL, logits_RS.max(1, keepdims=True))
        decay_RL = jnp.exp2(top_RL - new_top_RL)
        weights_RS = jnp.exp2(logits_RS - new_top_RL[:, :1])
        if masks is not None:
            weights_RS = jnp.where(masks[0], weights_RS, 0.0)
        p.scratch.top[head] = new_top_RL
        sum_R1 = weights_RS.sum(1, keepdims=True)
        p.scratch.sum[head] = p.scratch.sum[head] * decay_RL + sum_R1
        if buffers.v_scale is not None:
            weights_RS *= buffers.v_scale[ring, head : head + 1]
            if masks is not None:
                weights_RS = jnp.where(masks[0], weights_RS, 0.0)
        v_SH = buffers.v[ring, head].astype(q_ref.dtype)
        if masks is not None:
            v_SH = jnp.where(masks[1], v_SH, jnp.zeros_like(v_SH))
        sum_RH = dot(weights_RS.astype(q_ref.dtype), v_SH, 0)
        p.scratch.acc[head] = p.scratch.acc[head] * decay_RL[:, :1] + sum_RH


def _finish(p: _Program, queries: _Queries, out_ref: Any, lse_ref: Any) -> None:
    """Write the outputs of a row; the log-sum-exps of head k in lane k."""
    lane = jax.lax.broadcasted_iota(jnp.int32, lse_ref.shape, 1)
    lse = jnp.full(lse_ref.shape, NEGATIVE, jnp.float32)
    for head in range(p.sizes.kv_heads):
        sum_RL = p.scratch.sum[head]
        is_seeing_RL = queries.is_real & (sum_RL != 0)
        sum_RL = jnp.where(is_seeing_RL, sum_RL, 1.0)
        out_RH = p.scratch.acc[head] / sum_RL[:, :1]
        out_ref[head] = jnp.where(is_seeing_RL[:, :1], out_RH, 0.0).astype(out_ref.dtype)
        lse_RL = (p.scratch.top[head] + jnp.log2(sum_RL)) / _LOG2_E
        lse = jnp.where((lane == head) & is_seeing_RL, lse_RL, lse)
    lse_ref[...] = lse


def attend_row(
    plan_ref: Any,
    q_ref: Any,
    cache: Cache,
    windows_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    scratch: Scratch,
    *,
    sizes: Sizes,
    how: Settings,
) -> None:
    """Attend one row of the batch, or one split of it: the body of the kernel."""
    p = _Program(plan_ref, cache, windows_ref, scratch, sizes, how)
    row = _read_row(p, pl.program_id(1))
    queries = _queries(p, row)
    pl.when(pl.program_id(1) == 0)(lambda: _open_queue(p, row))
    scratch.top[...] = jnp.full(scratch.top.shape, NEGATIVE, jnp.float32)
    scratch.sum[...] = jnp.zeros(scratch.sum.shape, jnp.float32)
    scratch.acc[...] = jnp.zeros(scratch.acc.shape, jnp.float32)

    def step(block: Any, _: None) -> None:
        _ask(p)
        ring = jax.lax.rem(scratch.cursor[_ATTENDED], sizes.depth)
        first, stop = _bounds(p, row, block)
        _copy_block(p, pl.program_id(1), row, first, stop, ring, is_start=False)
        is_clear = (first >= row.clear_begin) & (stop <= row.clear_end)
        is_clear &= stop - first == sizes.block
        mask = functools.partial(_masks, sizes, queries, row, first, stop)
        attend = functools.partial(_attend_block, p, q_ref, queries, ring)
        pl.when(is_clear)(lambda: attend(None))
        pl.when(~is_clear)(lambda: attend(mask()))
        scratch.cursor[_ATTENDED] += 1

    jax.lax.fori_loop(0, row.blocks, step, None)
    _finish(p, queries, out_ref, lse_ref)
