"""Attention over divided sequences: the only collectives along tokens and cache slots.

Chunk layers need none while every shard of a row holds whole chunks. NoPE layers gather keys and
values in a full forward pass; against a cache that is divided over its slots, every shard attends
to its own and the partial results are merged by their log-sum-exps.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.attention.api import chunked_attention
from llama4_jax.parallel.shard import per_shard

_QUERIES = ("batch", "seq", "q_heads", None)
_KEYS = ("batch", "seq", "kv_heads", None)
_TOKENS = ("batch", "seq")


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Who sees whom in a layer: chunk size (None: all that is earlier), temperature (None: off)."""

    chunk_size: int | None
    temperature: tuple[int, float] | None


def _gather(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.all_gather(x, axes, axis=1, tiled=True) if axes else x


def _own(x: jax.Array, axes: tuple[str, ...], length: int) -> jax.Array:
    """Keep this shard's `length` tokens of a gathered array."""
    if not axes:
        return x
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * length, length, axis=1)


def _fold_chunks(x_BT: jax.Array, chunk_size: int, fill: int = 0) -> jax.Array:
    """Turn rows into a batch of chunks, the last one filled up."""
    B, T = x_BT.shape[:2]
    widths = [(0, 0), (0, -T % chunk_size)] + [(0, 0)] * (x_BT.ndim - 2)
    return jnp.pad(x_BT, widths, constant_values=fill).reshape(-1, chunk_size, *x_BT.shape[2:])


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
        in_order: promises that positions are 0, 1, 2, ... in every row, so that chunks can be cut
            by index: then a chunk layer is causal attention on a batch of chunks.
        sees: the layer's visibility.

    Returns:
        out_BTNH.
    """
    if segments_BT is None:
        segments_BT = jnp.zeros_like(positions_BT)
    chunk = sees.chunk_size

    def local(
        divided: dict[str, tuple[str, ...]],
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
    ) -> jax.Array:
        (B, T, N, H), over = q.shape, divided["seq"]
        is_whole = chunk is not None and (T % chunk == 0 if over else T > chunk)
        if in_order and is_whole:
            assert chunk is not None
            q, k, v = (_fold_chunks(x, chunk) for x in (q, k, v))
            positions = kv_positions = _fold_chunks(positions, chunk, fill=-1)
            segments = kv_segments = _fold_chunks(segments, chunk)
        else:
            k, v = _gather(k, over), _gather(v, over)
            kv_positions, kv_segments = _gather(positions, over), _gather(segments, over)
        out = chunked_attention(
            q,
            k,
            v,
            q_positions_BT=positions,
            kv_positions_BS=kv_positions,
            q_segments_BT=segments,
            kv_segments_BS=kv_segments,
            chunk_size=chunk,
            temperature=sees.temperature,
        )
        assert isinstance(out, jax.Array)
        return out.reshape(B, -1, N, H)[:, :T]

    axes = (_QUERIES, _KEYS, _KEYS, _TOKENS, _TOKENS)
    arrays = (q_BTNH, k_BTKH, v_BTKH, positions_BT, segments_BT)
    return per_shard(local, *arrays, axes=axes, out=_QUERIES)


def _write(
    cache_GBKSH: jax.Array, new_BTKH: jax.Array, slots_BT: jax.Array, group: jax.Array
) -> jax.Array:
    """Store new tokens at their slots of one group's cache; slots outside the cache are skipped."""
    B, _, K, _ = new_BTKH.shape
    rows_B11, heads_1K1 = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
    slots_BT = jnp.where(slots_BT < 0, cache_GBKSH.shape[3], slots_BT)  # negatives would wrap
    return cache_GBKSH.at[group, rows_B11, heads_1K1, slots_BT[:, None]].set(
        new_BTKH.swapaxes(1, 2).astype(cache_GBKSH.dtype), mode="drop"
    )


def _read(cache_GBKSH: jax.Array, group: jax.Array) -> jax.Array:
    """Return one group's cache, [B, S, K, H]."""
    return jax.lax.dynamic_index_in_dim(cache_GBKSH, group, axis=0, keepdims=False).swapaxes(1, 2)


def _merge_over(out: jax.Array, lse: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Merge partial attention across shards: the algebra of `merge_attention` as collectives."""
    if not axes:
        return out
    weight = jnp.exp(lse - jax.lax.pmax(lse, axes))
    total = jax.lax.psum(weight, axes)
    return jax.lax.psum(out * weight[..., None], axes) / jnp.maximum(total, 1e-37)[..., None]


@dataclasses.dataclass(frozen=True)
class _Call:
    """What one shard has of a call with a cache: projections of new tokens, one slot's cache."""

    q_BTNH: jax.Array
    k_BTKH: jax.Array
    v_BTKH: jax.Array
    keys_GBKSH: jax.Array
    values_GBKSH: jax.Array
    group: jax.Array
    lengths_B: jax.Array
    positions_BT: jax.Array

    def stored(self, k_BTKH: jax.Array, v_BTKH: jax.Array, slots_BT: jax.Array) -> "_Call":
        """Store new keys and values at their slots."""
        return dataclasses.replace(
            self,
            keys_GBKSH=_write(self.keys_GBKSH, k_BTKH, slots_BT, self.group),
            values_GBKSH=_write(self.values_GBKSH, v_BTKH, slots_BT, self.group),
        )

    def held(self) -> tuple[jax.Array, jax.Array]:
        """Return the cached keys and values of the group, [B, S, K, H], in the dtype of q."""
        keys, values = _read(self.keys_GBKSH, self.group), _read(self.values_GBKSH, self.group)
        return keys.astype(self.q_BTNH.dtype), values.astype(self.q_BTNH.dtype)


_Result = tuple[jax.Array, jax.Array, jax.Array]


def _attend_whole(divided: dict[str, tuple[str, ...]], call: _Call, sees: Visibility) -> _Result:
    """Attend with a cache that holds token p at slot p, and whose slots may be divided."""
    T, over, slots_over = call.q_BTNH.shape[1], divided["seq"], divided["kv_seq"]
    q, k, v = (_gather(x, over) for x in (call.q_BTNH, call.k_BTKH, call.v_BTKH))
    positions = _gather(call.positions_BT, over)
    S = call.keys_GBKSH.shape[3]
    first = jax.lax.axis_index(slots_over) * S if slots_over else 0
    call = call.stored(k, v, jnp.where(positions < 0, -1, positions - first))
    keys, values = call.held()
    end = jnp.maximum(call.lengths_B, positions.max(1) + 1)
    slot_positions = first + jnp.arange(S)
    kv_positions = jnp.where(slot_positions[None] < end[:, None], slot_positions[None], -1)
    out, lse = chunked_attention(
        q,
        keys,
        values,
        q_positions_BT=positions,
        kv_positions_BS=kv_positions,
        chunk_size=sees.chunk_size,
        temperature=sees.temperature,
        return_lse=True,
    )
    out = _merge_over(out, lse, slots_over).astype(q.dtype)
    return _own(out, over, T), call.keys_GBKSH, call.values_GBKSH


def _attend_chunk(divided: dict[str, tuple[str, ...]], call: _Call, sees: Visibility) -> _Result:
    """Attend with a cache of one chunk, which holds token p at slot p % chunk_size."""
    chunk, over = sees.chunk_size, divided["seq"]
    assert chunk is not None
    k, v = _gather(call.k_BTKH, over), _gather(call.v_BTKH, over)
    positions = _gather(call.positions_BT, over)
    last = jnp.maximum(call.lengths_B - 1, positions.max(1))  # the last token after this call
    is_kept = (positions >= 0) & (positions // chunk == last[:, None] // chunk)
    slots = jnp.where(is_kept, positions % chunk, -1)
    held = jnp.arange(call.keys_GBKSH.shape[3])[None]
    if positions.shape[1] == 1:  # one token: store it, then read the cache in place
        call = call.stored(k, v, slots)
        k, v = call.held()
        kv_positions = last[:, None] // chunk * chunk + held  # stale slots lie in the future
    else:  # several may cross a boundary: read what the cache holds before it is overwritten
        old_k, old_v = call.held()
        before = call.lengths_B[:, None]
        old = jnp.where(held < before % chunk, before // chunk * chunk + held, -1)
        kv_positions = jnp.concatenate([old, positions], axis=1)
        call = call.stored(k, v, slots)
        k, v = jnp.concatenate([old_k, k], axis=1), jnp.concatenate([old_v, v], axis=1)
    out = chunked_attention(
        call.q_BTNH,
        k,
        v,
        q_positions_BT=call.positions_BT,
        kv_positions_BS=kv_positions,
        chunk_size=chunk,
        temperature=sees.temperature,
    )
    assert isinstance(out, jax.Array)
    return out, call.keys_GBKSH, call.values_GBKSH


def cached_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    keys_GBKSH: jax.Array,
    values_GBKSH: jax.Array,
    *,
    group: jax.Array,
    lengths_B: jax.Array,
    positions_BT: jax.Array,
    sees: Visibility,
    is_chunk_cache: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Append new tokens to one group's cache and attend to everything they see.

    A chunk cache holds the tokens of the last chunk only, token p at slot p % chunk_size; crossing
    a boundary starts over. Any other cache holds token p at slot p.

    Args:
        q_BTNH, k_BTKH, v_BTKH: projections of the new tokens.
        keys_GBKSH, values_GBKSH: caches of all groups of this slot.
        group: int32 scalar, the group to use.
        lengths_B: int32 tokens of each row before this call.
        positions_BT: int32 positions of the new tokens, increasing from `lengths_B`; -1 is padding.
        sees: the layer's visibility.
        is_chunk_cache: whether the caches hold one chunk.

    Returns:
        (out_BTNH, keys_GBKSH, values_GBKSH) with the new tokens stored.
    """
    attend = _attend_chunk if is_chunk_cache else _attend_whole
    cache_axes = (None, "batch", "kv_heads", None if is_chunk_cache else "kv_seq", None)
    return per_shard(
        lambda divided, *arrays: attend(divided, _Call(*arrays), sees),
        q_BTNH,
        k_BTKH,
        v_BTKH,
        keys_GBKSH,
        values_GBKSH,
        group,
        lengths_B,
        positions_BT,
        axes=(_QUERIES, _KEYS, _KEYS, cache_axes, cache_axes, (), ("batch",), _TOKENS),
        out=(_QUERIES, cache_axes, cache_axes),
    )
