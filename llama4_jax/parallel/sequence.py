"""Attention among the tokens of rows that may be divided over devices.

Chunk layers need none while every shard of a row holds whole chunks. In NoPE layers the keys and
values travel around a ring, and partial results are merged by their log-sum-exps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention.api import chunked_attention, merge_attention
from kernels_pallas.attention.visibility import NEGATIVE
from llama4_jax.parallel.shard import per_shard

QUERIES = ("batch", "seq", "q_heads", None)
KEYS = ("batch", "seq", "kv_heads", None)
TOKENS = ("batch", "seq")


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Who sees whom in a layer: chunk size (None: all that is earlier), temperature (None: off)."""

    chunk_size: int | None
    temperature: tuple[int, float] | None


class _Keys(NamedTuple):
    """Keys of one shard; S is its length."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    positions_BS: jax.Array
    segments_BS: jax.Array | None


def _around_ring(
    attend: Callable[[_Keys], tuple[jax.Array, jax.Array]],
    keys: _Keys,
    axes: tuple[str, ...],
    like: jax.Array,
) -> jax.Array:
    """Attend to every shard's keys while they travel from device to device, one step at a time.

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
    (seen, keys), _ = jax.lax.scan(step, (nothing, keys), None, length=size - 1)
    return merged(seen, keys)[0].astype(like.dtype)


def self_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    in_order: bool,
    sees: Visibility,
) -> jax.Array:
    """Attend among the tokens of whole rows.

    Args:
        q_BTNH, k_BTKH, v_BTKH: projections of the same tokens.
        positions_BT: int32 positions, -1 for padding.
        segments_BT: int32 segments of packed rows, or None.
        in_order: promises that positions are 0, 1, 2, ... in every row, so that a shard of whole
            chunks needs no other's keys in a chunk layer.
        sees: the layer's visibility.

    Returns:
        out_BTNH.
    """
    chunk = sees.chunk_size

    def local(
        divided: dict[str, tuple[str, ...]],
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
                temperature=sees.temperature,
                return_lse=return_lse,
            )

        own = _Keys(k, v, positions, segments)
        is_alone = in_order and chunk is not None and q.shape[1] % chunk == 0
        if is_alone or not divided["seq"]:  # no query sees a key of another shard
            return attend(own, return_lse=False)
        return _around_ring(lambda keys: attend(keys, return_lse=True), own, divided["seq"], q)

    arrays = [q_BTNH, k_BTKH, v_BTKH, positions_BT]
    axes = [QUERIES, KEYS, KEYS, TOKENS]
    if segments_BT is not None:
        arrays.append(segments_BT)
        axes.append(TOKENS)
    return per_shard(local, *arrays, axes=tuple(axes), out=QUERIES)
