"""What the TPU kernels of attention share: blocks of arrays, and the walk over those they need.

Heads come first inside the kernels, [B, K, G, T, H] with G query heads for each kv head, so that a
block of one head is a matrix of whole tiles. A program owns one block of queries (or of keys) and
walks over the blocks of the other side. Those stay in HBM: `walk` asks the summaries of
`visibility` which block comes next and copies that one while the present one is computed, so a
block that nobody sees costs neither a copy nor a product.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import tpu_sizes
from kernels_pallas.attention.visibility import (
    KeyBlocks,
    QueryBlocks,
    Settings,
    attention_temperature,
    first_visible,
)
from kernels_pallas.tpu_primitives import LANES

HIDDEN = -3e38  # a logit that is not seen; far below NEGATIVE, where the running maximum starts
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
UNROLLED_HEADS = 8


def head_major(x_BTNH: jax.Array, K: int) -> jax.Array:
    """Return [B, K, G, T, H]."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.swapaxes(1, 2).reshape(B, K, N // K, T, H)


def token_major(x_BKGTH: jax.Array) -> jax.Array:
    """Return [B, T, N, H]."""
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.reshape(B, K * G, T, H).swapaxes(1, 2)


def padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Append zeros until the axis is a multiple of a block; what is copied must exist."""
    missing = -x.shape[axis] % size
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths)


def marks(positions_BT: jax.Array, segments_BT: jax.Array | None, size: int) -> jax.Array:
    """Return int32 [B, blocks, 1 or 2, size]: rows of positions, -1 past the end, and segments."""
    rows = [positions_BT] if segments_BT is None else [positions_BT, segments_BT]
    B, T = positions_BT.shape
    rows = [jnp.pad(r, ((0, 0), (0, -T % size)), constant_values=-1) for r in rows]
    return jnp.stack([r.reshape(B, -1, size) for r in rows], axis=2)


def head_rows(x_BTN: jax.Array, K: int, size: int) -> jax.Array:
    """Cut one number for each token and head into lane rows [B, K, blocks, G, size]."""
    B, T, N = x_BTN.shape
    x_BTN = padded(x_BTN, 1, size)
    return x_BTN.reshape(B, -1, size, K, N // K).transpose(0, 3, 1, 4, 2)


def scalars(summary: Sequence[jax.Array]) -> jax.Array:
    """Stack a summary into int32 [B, fields, blocks], for SMEM."""
    return jnp.stack(summary, axis=1)


def scalars_spec(summary: Sequence[jax.Array], row: Callable = lambda b: b) -> pl.BlockSpec:
    """Return the block that holds the scalars of one batch row, that of program b."""
    fields, blocks = len(summary), summary[0].shape[1]
    return pl.BlockSpec(
        (None, fields, blocks),
        lambda b, h, i: (row(b), 0, 0),
        pipeline_mode=pl.Buffered(1),
        memory_space=pltpu.SMEM,
    )


def q_at(scalars_ref: Any, i: jax.Array) -> QueryBlocks:
    """Read the summary of one block of queries."""
    return QueryBlocks(*[scalars_ref[field, i] for field in range(len(QueryBlocks._fields))])


def kv_at(scalars_ref: Any, j: jax.Array) -> KeyBlocks:
    """Read the summary of one block of keys."""
    return KeyBlocks(*[scalars_ref[field, j] for field in range(len(KeyBlocks._fields))])


def wide(x: jax.Array, width: int) -> jax.Array:
    """Repeat columns [n, 128], each the same in all lanes, to another width."""
    if width < LANES:
        return x[:, :width]
    repeated = jnp.concatenate([x] * pl.cdiv(width, LANES), axis=1)
    return repeated[:, :width]


def column(row: jax.Array) -> jax.Array:
    """Turn a lane row [1, n] into a column [n, 128], the same in all lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def set_columns(columns: Any, factors: Any, q_marks: Any, how: Settings) -> None:
    """Turn the marks of a block of queries into columns, once.

    Args:
        columns: int32 [2 or 3, bq, 128], filled with the first and last position seen, and the
            segment.
        factors: float32 [bq, 128], filled with the factor on the logits if there is a temperature.
        q_marks: int32 [1 or 2, bq], the positions and the segments.
        how: the settings.
    """
    positions = q_marks[:1]
    columns[0] = column(first_visible(positions, how.chunk_size))
    columns[1] = column(positions)
    if q_marks.shape[0] == 2:
        columns[2] = column(q_marks[1:])
    if how.temperature is not None:
        warmth = attention_temperature(positions, how.temperature)
        factors[...] = column(warmth * (how.scale * LOG2_E))


def factor(factors: Any, how: Settings, width: int) -> jax.Array | float:
    """Return what makes products into logits in base 2."""
    return how.scale * LOG2_E if how.temperature is None else wide(factors[...], width)


def mask(columns: Any, kv_marks: jax.Array) -> jax.Array:
    """Return the mask [bq, bkv] from columns of queries and rows of keys."""
    width = kv_marks.shape[1]
    positions = kv_marks[:1]
    is_seen = (positions >= wide(columns[0], width)) & (positions <= wide(columns[1], width))
    if kv_marks.shape[0] == 2:
        is_seen &= kv_marks[1:] == wide(columns[2], width)
    return is_seen


def copies(sources: Sequence[Any], buffers: Sequence[Any], slot: jax.Array, arrived: Any):
    """Return the copies from HBM to one slot of the buffers, each with a semaphore of its own."""
    return [
        pltpu.make_async_copy(source, buffer.at[slot], arrived.at[n, slot])
        for n, (source, buffer) in enumerate(zip(sources, buffers, strict=True))
    ]


def clear_padding(positions_row: jax.Array, *refs: Any) -> None:
    """Zero the rows of tokens at negative positions: zero times NaN would be NaN."""
    is_real = column(positions_row) >= 0
    for ref in refs:
        value = ref[...].astype(jnp.float32)
        keep = wide(is_real.astype(jnp.int32), value.shape[-1]) > 0
        ref[...] = jnp.where(keep, value, 0.0).astype(ref.dtype)


def heads(count: int, compute: Callable[[Any], None]) -> None:
    """Compute head by head, a few of them unrolled."""

    def step(g: Any, _: None) -> None:
        compute(g)

    jax.lax.fori_loop(0, count, step, None, unroll=count <= UNROLLED_HEADS)


def heads_ahead(count: int, begin: Callable[[Any], Any], finish: Callable[[Any, Any], None]):
    """Compute head by head, and begin the next before one is finished.

    The compiler keeps nearly to the order it is given: the products that begin a head then run
    while the softmax of the one before is computed. By its schedules for v6e this takes a fifth to
    a third off the forward kernel.
    """
    if count > UNROLLED_HEADS:
        heads(count, lambda g: finish(g, begin(g)))
        return
    begun = begin(0)
    for g in range(count):
        present, begun = begun, begin(g + 1) if g + 1 < count else None
        finish(g, present)


def walk(
    i: jax.Array,
    owners: int,
    *,
    bounds: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    copies: Callable[[jax.Array, jax.Array], Sequence[Any]],
    slot_ref: Any,
    visit: Callable[[jax.Array, jax.Array], None],
    seen: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> None:
    """Visit the blocks that block i meets, each copied while the one before is computed.

    The last visit overlaps with the first copy for block i + 1, so programs of consecutive i must
    follow each other; the first of them (i == 0) starts from nothing.

    Args:
        i: the block that this program owns.
        owners: how many such blocks there are.
        bounds: of a block i, the begin and end of the blocks it may meet.
        copies: the copies that bring block j to a buffer slot, 0 or 1.
        slot_ref: SMEM int32 [1], the slot of the next first block; kept between programs.
        visit: computes with block j in a slot.
        seen: whether block i meets block j; None if it meets all within the bounds.
    """

    def next_seen(owner: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the first block from j on that the owner meets, and the end."""
        end = bounds(owner)[1]
        if seen is None:
            return j, end

        def missed(j: jax.Array) -> jax.Array:
            return (j < end) & ~seen(owner, jnp.clip(j, 0, jnp.maximum(end - 1, 0)))

        def step(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return carry[0] + 1, missed(carry[0] + 1)

        return jax.lax.while_loop(lambda carry: carry[1], step, (j, missed(j)))[0], end

    def start(j: jax.Array, slot: jax.Array) -> None:
        for copy in copies(j, slot):
            copy.start()

    def start_next_owner(slot: jax.Array) -> None:
        owner = jnp.minimum(i + 1, owners - 1)
        first, end = next_seen(owner, bounds(owner)[0])
        pl.when((i + 1 < owners) & (first < end))(lambda: start(first, slot))

    first, end = next_seen(i, bounds(i)[0])

    @pl.when(i == 0)
    def _():
        slot_ref[0] = 0
        pl.when(first < end)(lambda: start(first, jnp.int32(0)))

    def step(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        j, slot = carry
        after, _ = next_seen(i, j + 1)
        pl.when(after < end)(lambda: start(after, 1 - slot))
        pl.when(after >= end)(lambda: start_next_owner(1 - slot))
        for copy in copies(j, slot):
            copy.wait()
        visit(j, slot)
        return after, 1 - slot

    slot = slot_ref[0]
    pl.when(first >= end)(lambda: start_next_owner(slot))
    _, slot = jax.lax.while_loop(lambda carry: carry[0] < end, step, (first, slot))
    slot_ref[0] = slot


def pairs(s: Any, how: Settings) -> int:
    """Estimate how many (query, key) pairs of one head are seen.

    Positions are not known when a program is compiled: the queries are taken for the last T of S
    tokens of one document.
    """
    if how.chunk_size is not None and how.chunk_size < s.S:
        return s.T * how.chunk_size // 2
    return s.T * s.S - s.T * s.T // 2 if s.T < s.S else s.T * s.S // 2


def cost(s: Any, how: Settings, *, products: int, owned: int, walked: int) -> pl.CostEstimate:
    """Estimate what a kernel costs.

    Args:
        s: the sizes.
        how: the settings.
        products: matrix products for each block of logits.
        owned: bytes that are moved once.
        walked: bytes that one visit copies.
    """
    heads_pairs = s.B * s.K * s.G * pairs(s, how)
    visits = max(pairs(s, how) // (s.bq * s.bkv), 1) * s.B * s.K
    return pl.CostEstimate(
        flops=2 * products * s.H * heads_pairs,
        transcendentals=heads_pairs,
        bytes_accessed=owned + visits * walked,
    )


def params() -> Any:
    """Return the compiler's parameters: consecutive blocks of one head share their copies."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=tpu_sizes.VMEM_LIMIT,
    )
