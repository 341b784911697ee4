"""Who sees whom: the mask of single tokens, and summaries that tell which blocks can be skipped.

A query at position p sees the keys at positions lo..hi of its own segment, hi = p and lo = 0 or the
start of p's chunk. That is the whole mask, so a block of queries and a block of keys need no table
of pairs: order tokens by segment and then position, and the extremes of (segment, lo) and (segment,
hi) in one block, of (segment, position) in the other, tell whether they can meet (`may_see`) and
whether they meet everywhere (`sees_all`). For rows in order, packed ones included, nothing is
copied in vain. The summaries take O(T + S) steps on the device; kernels read them as scalars.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # the log-sum-exp of no keys
_FAR = 2**30  # beyond any position


class Inputs(NamedTuple):
    """The arrays of one attention call; see `api.chunked_attention`."""

    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    q_positions_BT: jax.Array
    kv_positions_BS: jax.Array
    q_segments_BT: jax.Array | None
    kv_segments_BS: jax.Array | None


class Settings(NamedTuple):
    """The static arguments of one attention call; the scale is given."""

    chunk_size: int | None
    temperature: tuple[int, float] | None
    scale: float


def first_visible(q_positions: jax.Array, chunk_size: int | None) -> jax.Array:
    """Return lo: the first position that a query sees."""
    if chunk_size is None:
        return jnp.zeros_like(q_positions)
    positions = jnp.maximum(q_positions, 0)
    return positions - jax.lax.rem(positions, jnp.full_like(positions, chunk_size))


def visible(
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    chunk_size: int | None,
) -> jax.Array:
    """Return the mask of queries and keys whose shapes broadcast, such as [B, T, 1] and [B, 1, S].

    A negative position marks padding, which no query sees.
    """
    mask = (kv_positions >= first_visible(q_positions, chunk_size)) & (kv_positions <= q_positions)
    if q_segments is not None and kv_segments is not None:
        mask &= q_segments == kv_segments
    return mask


def attention_temperature(positions: jax.Array, temperature: tuple[int, float]) -> jax.Array:
    """Compute s(p) = 1 + coefficient * ln(floor((p + 1) / floor) + 1) in float32.

    Positions stay integers until the floor is taken: in bfloat16 the steps would move.
    """
    floor, coefficient = temperature
    steps = jax.lax.div(jnp.maximum(positions, 0) + 1, jnp.full_like(positions, floor))
    return 1.0 + coefficient * jnp.log(steps.astype(jnp.float32) + 1.0)


class QueryBlocks(NamedTuple):
    """Extremes over each block of queries; int32 [B, blocks]. Scalars inside a kernel.

    Attributes:
        lo_min: first position seen by the queries of the first segment; padding left out.
        lo_max: largest first position seen.
        hi_min: smallest last position seen; -1 if there is padding.
        hi_max: last position seen by the queries of the last segment.
        segment_min, segment_max: first and last segment; padding left out.
        begin, end: blocks of keys from the first to after the last that some query may see.
    """

    lo_min: jax.Array
    lo_max: jax.Array
    hi_min: jax.Array
    hi_max: jax.Array
    segment_min: jax.Array
    segment_max: jax.Array
    begin: jax.Array
    end: jax.Array


class KeyBlocks(NamedTuple):
    """Extremes over each block of keys; int32 [B, blocks]. Scalars inside a kernel.

    Attributes:
        min: first position in the first segment; padding left out.
        max: last position in the last segment; -1 if all is padding.
        padding: 1 if the block has padding, else 0.
        segment_min, segment_max: first and last segment; padding left out.
        begin, end: blocks of queries from the first to after the last that may see some key.
    """

    min: jax.Array
    max: jax.Array
    padding: jax.Array
    segment_min: jax.Array
    segment_max: jax.Array
    begin: jax.Array
    end: jax.Array


def may_see(q: QueryBlocks, kv: KeyBlocks) -> jax.Array:
    """Whether some query of a block may see some key of another; never wrongly False."""
    is_after_lo = (kv.segment_max > q.segment_min) | (
        (kv.segment_max == q.segment_min) & (kv.max >= q.lo_min)
    )
    is_before_hi = (kv.segment_min < q.segment_max) | (
        (kv.segment_min == q.segment_max) & (kv.min <= q.hi_max)
    )
    return is_after_lo & is_before_hi


def sees_all(q: QueryBlocks, kv: KeyBlocks) -> jax.Array:
    """Whether every query of a block sees every key of another, so that no mask is needed."""
    inside = (kv.min >= q.lo_max) & (kv.max <= q.hi_min) & (kv.padding == 0)
    same_first = (q.segment_min == kv.segment_min) & (q.segment_max == kv.segment_max)
    return inside & same_first & (q.segment_min == q.segment_max)


def _range(seen_BIJ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the first True of each row and one past the last; 0 and 0 if there is none."""
    n = seen_BIJ.shape[-1]
    begin = jnp.argmax(seen_BIJ, axis=-1).astype(jnp.int32)
    end = n - jnp.argmax(seen_BIJ[..., ::-1], axis=-1).astype(jnp.int32)
    return begin, jnp.where(seen_BIJ.any(-1), end, begin)


def summarize(
    x: Inputs, chunk_size: int | None, q_block: int, kv_block: int
) -> tuple[QueryBlocks, KeyBlocks]:
    """Summarise blocks of queries and of keys; a last block may be partial."""

    def blocks(x_BT: jax.Array, size: int, fill: int) -> jax.Array:
        B, T = x_BT.shape
        padded = jnp.pad(x_BT, ((0, 0), (0, -T % size)), constant_values=fill)
        return padded.reshape(B, -1, size)

    def segments(segments_BT: jax.Array | None, real: jax.Array, size: int):
        """Return each token's segment, and the first and the last one of each block."""
        if segments_BT is None:
            zero = jnp.zeros(real.shape[:2], jnp.int32)
            return jnp.zeros(real.shape, jnp.int32), zero, zero
        s = blocks(segments_BT, size, 0)
        first, last = jnp.where(real, s, _FAR).min(-1), jnp.where(real, s, -_FAR).max(-1)
        return s, first, last

    def least(p: jax.Array, real: jax.Array, s: jax.Array, first: jax.Array) -> jax.Array:
        return jnp.where(real & (s == first[..., None]), p, _FAR).min(-1)

    def largest(p: jax.Array, real: jax.Array, s: jax.Array, last: jax.Array) -> jax.Array:
        return jnp.where(real & (s == last[..., None]), p, -1).max(-1)

    hi = blocks(x.q_positions_BT, q_block, -1)
    lo, real = first_visible(hi, chunk_size), hi >= 0
    s, first, last = segments(x.q_segments_BT, real, q_block)
    extremes = (least(lo, real, s, first), lo.max(-1), hi.min(-1), largest(hi, real, s, last))
    nothing = jnp.zeros(first.shape, jnp.int32)
    q = QueryBlocks(*extremes, first, last, nothing, nothing)

    p = blocks(x.kv_positions_BS, kv_block, -1)
    real = p >= 0
    s, first, last = segments(x.kv_segments_BS, real, kv_block)
    padding = (~real).any(-1).astype(jnp.int32)
    extremes = (least(p, real, s, first), largest(p, real, s, last), padding)
    nothing = jnp.zeros(first.shape, jnp.int32)
    kv = KeyBlocks(*extremes, first, last, nothing, nothing)

    rows = jax.tree.map(lambda a: a[:, :, None], q)
    columns = jax.tree.map(lambda a: a[:, None, :], kv)
    seen = may_see(QueryBlocks(*rows), KeyBlocks(*columns))
    q_begin, q_end = _range(seen)
    kv_begin, kv_end = _range(seen.swapaxes(1, 2))
    return q._replace(begin=q_begin, end=q_end), kv._replace(begin=kv_begin, end=kv_end)
