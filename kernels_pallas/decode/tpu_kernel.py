"""The decode kernel for TPUs: a queue of copies from the cache, with some arithmetic behind it.

The time is that of bringing the cache from HBM once, as stored.

- One program attends one row of the batch, all heads together. Blocks of slots [K, block, H] come
  into VMEM through a ring of buffers, and the queue runs on into the next row, so that it does not
  drain between rows. Where a device is two cores, each takes half of every row's blocks.
- Only blocks that hold a visible slot are copied, and of the last one only what lies before the
  row's end, up to the next multiple of 128. Its other slots are masked and their values zeroed,
  because the product of a weight 0 and a NaN would be NaN.
- Integers are widened in VMEM. Float8s go to the multiplier as they are, beside bfloat16 queries,
  but for blocks with NaN where its float8s have none, and masked ones where they have: those are
  widened. A scale belongs to a token of a head, which is a column of the logits, so it multiplies
  the float32 logits (of keys) or weights (of values).
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

from kernels_pallas import backend, tpu_widen
from kernels_pallas.attention.visibility import (
    NEGATIVE,
    Settings,
    attention_temperature,
    first_visible,
)
from kernels_pallas.decode.tpu_queue import (
    Cache,
    Program,
    Row,
    Scratch,
    Sizes,
    open_queue,
    read_row,
    take,
)
from kernels_pallas.tpu_primitives import dot

_LOG2_E = math.log2(math.e)
_Masks = tuple[jax.Array, jax.Array]  # of a block: [rows, block] and [block, 1]


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


def _queries(p: Program, row: Row) -> _Queries:
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


def _takes_float8s(p: Program, dtype: jnp.dtype) -> bool:
    """Tell whether the multiplier takes keys and values beside queries, but for NaN."""
    is_whole = p.sizes.block % tpu_widen.FLOAT8_ROWS == 0
    return p.cache.k.dtype == jnp.float8_e4m3fn and is_whole and dtype == jnp.bfloat16


def _attend_block(
    p: Program,
    q_ref: Any,
    queries: _Queries,
    ring: Any,
    masks: _Masks | None,
    *,
    as_float8s: bool,
    is_rare: bool = False,
) -> None:
    """Add a block to the running softmax of every head.

    Args:
        p, q_ref, queries, ring: see there.
        masks: None if all of it is seen by all.
        as_float8s: multiply float8s, none of which may be NaN if there are masks or the multiplier
            has no such thing; else widen what is stored.
        is_rare: keep the code short.
    """
    buffers = p.scratch.buffers
    float8 = backend.tpu().float8

    def operand(stored: jax.Array) -> jax.Array:
        if not as_float8s:
            return stored.astype(q_ref.dtype)
        return stored if stored.dtype == float8 else tpu_widen.float8s(stored, float8)[0]

    unit = tpu_widen.float8_unit(float8) if as_float8s else 1

    def attend_head(head: Any, _: None = None) -> None:
        one = pl.ds(head, 1)
        logits_RS = dot(q_ref[head], operand(buffers.k[ring, head]), (1, 1))
        logits_RS *= queries.factor * unit
        if buffers.k_scale is not None:
            logits_RS *= buffers.k_scale[ring, one]
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
            weights_RS *= buffers.v_scale[ring, one]
            if masks is not None:
                weights_RS = jnp.where(masks[0], weights_RS, 0.0)
        v_SH = operand(buffers.v[ring, head])
        if masks is not None and not as_float8s:
            v_SH = jnp.where(masks[1], v_SH, jnp.zeros_like(v_SH))
        sum_RH = dot(weights_RS.astype(q_ref.dtype), v_SH, (1, 0)) * unit
        p.scratch.acc[head] = p.scratch.acc[head] * decay_RL[:, :1] + sum_RH

    if is_rare:
        jax.lax.fori_loop(0, p.sizes.kv_heads, attend_head, None)
    else:
        for head in range(p.sizes.kv_heads):
            attend_head(head)


def _finish(p: Program, queries: _Queries, out_ref: Any, lse_ref: Any) -> None:
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
    p = Program(plan_ref, cache, windows_ref, scratch, sizes, how)
    row = read_row(p, pl.program_id(1))
    queries = _queries(p, row)
    pl.when(pl.program_id(1) == 0)(lambda: open_queue(p, row))
    scratch.top[...] = jnp.full(scratch.top.shape, NEGATIVE, jnp.float32)
    scratch.sum[...] = jnp.zeros(scratch.sum.shape, jnp.float32)
    scratch.acc[...] = jnp.zeros(scratch.acc.shape, jnp.float32)

    def step(block: Any, _: None) -> None:
        ring, first, stop = take(p, row, block)
        is_clear = (first >= row.clear_begin) & (stop <= row.clear_end)
        is_clear &= stop - first == sizes.block
        mask = functools.partial(_masks, sizes, queries, row, first, stop)
        attend = functools.partial(_attend_block, p, q_ref, queries, ring)
        is_float8 = _takes_float8s(p, q_ref.dtype)
        if not is_float8 or cache.k.dtype == backend.tpu().float8:  # which has NaN
            pl.when(is_clear)(lambda: attend(None, as_float8s=is_float8))
            pl.when(~is_clear)(lambda: attend(mask(), as_float8s=False))
        else:
            k, v = scratch.buffers[:2]
            has_nan = tpu_widen.holds_nan(
                part[ring, head] for part in (k, v) for head in range(sizes.kv_heads)
            )
            pl.when(~has_nan & is_clear)(lambda: attend(None, as_float8s=True))
            pl.when(~has_nan & ~is_clear)(lambda: attend(mask(), as_float8s=True))
            pl.when(has_nan)(lambda: attend(mask(), as_float8s=False, is_rare=True))

    jax.lax.fori_loop(0, row.blocks, step, None)
    _finish(p, queries, out_ref, lse_ref)
