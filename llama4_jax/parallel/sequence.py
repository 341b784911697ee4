"""Attention among the tokens of rows that may be sharded.

Keys and values travel around a ring, as far as some query sees, and partial results are merged by
their log-sum-exps. Chunk layers need no travel while every shard of a row holds whole chunks.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention.api import chunked_attention, merge_attention
from kernels_pallas.attention.visibility import NEGATIVE
from llama4_jax.config.pattern import Visibility
from llama4_jax.parallel.shard import per_shard

QUERIES = ("batch", "seq", "q_heads", None)
KEYS = ("batch", "seq", "kv_heads", None)
TOKENS = ("batch", "seq")


Order = Literal["row", "segments", "any"]
"""What is known of positions: 0, 1, 2, ... in every row; counting up by one along every segment,
whose tokens stand together; or nothing."""


class _Keys(NamedTuple):
    """Keys of one shard; S is its length."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    positions_BS: jax.Array
    segments_BS: jax.Array | None


def ring_hops(shards: int, tokens: int, chunk_size: int | None, order: Order) -> int:
    """Return over how many shards before its own some query of a shard sees keys.

    Args:
        shards: of a row.
        tokens: of a shard.
        chunk_size: of the layer, or None.
        order: what is known of positions.
    """
    if chunk_size is None or order == "any":
        return shards - 1
    if order == "row" and tokens % chunk_size == 0:
        return 0
    return min(shards - 1, -(-(chunk_size - 1) // tokens))


def _around_ring(
    attend: Callable[[_Keys], tuple[jax.Array, jax.Array]],
    keys: _Keys,
    axes: tuple[str, ...],
    hops: int,
    like: jax.Array,
) -> jax.Array:
    """Attend to own keys and those of so many shards before, while they travel, one hop at a time.

    No device ever holds more than two shards of them, and a step's transfer is under way while its
    keys are attended to. Shards that lie in the future of these queries cost their transfer alone.
    """
    size = jax.lax.axis_size(axes)
    to_next = [(i, (i + 1) % size) for i in range(size)]

    def merged(seen: tuple, keys: _Keys) -> tuple[jax.Array, jax.Array]:
        pairs = zip(seen, attend(keys), strict=True)
        return merge_attention(*(jnp.stack(pair) for pair in pairs))

    @jax.checkpoint
    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        seen, keys = carry
        following = jax.tree.map(lambda a: jax.lax.ppermute(a, axes, to_next), keys)
        return (merged(seen, keys), following), None

    B, T, N, _ = like.shape
    nothing = jnp.zeros(like.shape, jnp.float32), jnp.full((B, T, N), NEGATIVE, jnp.float32)
    (seen, keys), _ = jax.lax.scan(step, (nothing, keys), None, length=hops)
    return merged(seen, keys)[0].astype(like.dtype)


def self_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    order: Order,
    visibility: Visibility,
) -> jax.Array:
    """Attend among the tokens of whole rows.

    Args:
        q_BTNH, k_BTKH, v_BTKH: projections of the same tokens.
        positions_BT: int32 positions, -1 for padding.
        segments_BT: int32 segments of packed rows, or None.
        order: what is promised of positions; the more it is, the fewer keys travel.
        visibility: the layer's visibility.

    Returns:
        out_BTNH.
    """
    chunk = visibility.chunk_size

    def local(
        sharded: dict[str, tuple[str, ...]],
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        positions: jax.Array,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        def attend(keys: _Keys, return_lse: bool) -> Any:
            return chunked_attention(
                q,
                keys.k_BSKH,
                keys.v_BSKH,
                q_positions_BT=positions,
                kv_positions_BS=keys.positions_BS,
                q_segments_BT=segments,
                kv_segments_BS=keys.segments_BS,
                chunk_size=chunk,
                temperature=visibility.temperature,
                return_lse=return_lse,
            )

        own = _Keys(k, v, positions, segments)
        over = sharded["seq"]
        hops = ring_hops(jax.lax.axis_size(over), q.shape[1], chunk, order) if over else 0
        if not hops:
            return attend(own, return_lse=False)
        return _around_ring(lambda keys: attend(keys, return_lse=True), own, over, hops, q)

    arrays = [q_BTNH, k_BTKH, v_BTKH, positions_BT]
    axes = [QUERIES, KEYS, KEYS, TOKENS]
    if segments_BT is not None:
        arrays.append(segments_BT)
        axes.append(TOKENS)
    return per_shard(local, *arrays, axes=tuple(axes), out=QUERIES)
