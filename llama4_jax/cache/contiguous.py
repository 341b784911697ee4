"""A contiguous cache: every row has its slots in one array, which may be sharded.

Layers that see everything hold token p at slot p. Chunk layers hold one chunk, token p at slot
p % chunk_size: they never need a token of an earlier chunk, so their cache starts over at every
boundary, however long the text. Every shard attends to its own slots, and partial results are
merged by their log-sum-exps. A cache is read where it lies: the kernel gets the arrays of all
groups and, as a page table, this group's rows.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.attention.api import chunked_attention, merge_attention
from kernels_pallas.decode.api import MAX_QUERIES, decode_attention
from kernels_pallas.prefill.api import prefill_attention
from llama4_jax.config.model import TextConfig
from llama4_jax.config.pattern import Visibility
from llama4_jax.parallel.axes import Axes
from llama4_jax.parallel.sequence import KEYS, QUERIES, TOKENS
from llama4_jax.parallel.shard import per_shard, shard


def _gather(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.all_gather(x, axes, axis=1, tiled=True) if axes else x


def _own(x: jax.Array, axes: tuple[str, ...], length: int) -> jax.Array:
    """Keep this shard's `length` tokens of a gathered array."""
    if not axes:
        return x
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * length, length, axis=1)


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


def merge_over(out: jax.Array, lse: jax.Array, axes: tuple[str, ...]) -> jax.Array:
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

    def attend(
        self, starts_B: jax.Array, held_B: jax.Array, visibility: Visibility
    ) -> tuple[jax.Array, jax.Array]:
        """Attend to the group's cache, whose first slots hold tokens. Returns float32 out, lse.

        Args:
            starts_B: int32 position of slot 0.
            held_B: int32 slots that hold a token.
            visibility: the layer's visibility.
        """
        B, T = self.positions_BT.shape
        groups, _, K, S, H = self.keys_GBKSH.shape
        k, v = (
            cache.reshape(groups * B, K, S, H).swapaxes(1, 2)
            for cache in (self.keys_GBKSH, self.values_GBKSH)
        )
        attend = decode_attention if T <= MAX_QUERIES else prefill_attention
        result = attend(
            self.q_BTNH,
            k,
            v,
            lengths_B=held_B,
            q_positions_BT=self.positions_BT,
            kv_start_B=starts_B,
            page_table_BP=(self.group * B + jnp.arange(B))[:, None],
            chunk_size=visibility.chunk_size,
            temperature=visibility.temperature,
            return_lse=True,
        )
        assert isinstance(result, tuple)
        return result


_Result = tuple[jax.Array, jax.Array, jax.Array]


def _attend_whole(
    sharded: dict[str, tuple[str, ...]], call: _Call, visibility: Visibility
) -> _Result:
    """Attend with a cache that holds token p at slot p, and whose slots may be sharded."""
    T, over, slots_over = call.q_BTNH.shape[1], sharded["seq"], sharded["kv_seq"]
    q, k, v = (_gather(x, over) for x in (call.q_BTNH, call.k_BTKH, call.v_BTKH))
    positions = _gather(call.positions_BT, over)
    S = call.keys_GBKSH.shape[3]
    first = jax.lax.axis_index(slots_over) * S if slots_over else 0
    call = call.stored(k, v, jnp.where(positions < 0, -1, positions - first))
    end_B = jnp.maximum(call.lengths_B, positions.max(1) + 1)
    call = dataclasses.replace(call, q_BTNH=q, positions_BT=positions)
    out, lse = call.attend(jnp.full_like(end_B, first), jnp.clip(end_B - first, 0, S), visibility)
    out = merge_over(out, lse, slots_over).astype(q.dtype)
    return _own(out, over, T), call.keys_GBKSH, call.values_GBKSH


def _attend_chunk(
    sharded: dict[str, tuple[str, ...]], call: _Call, visibility: Visibility
) -> _Result:
    """Attend with a cache of one chunk, which holds token p at slot p % chunk_size."""
    chunk, over, dtype = visibility.chunk_size, sharded["seq"], call.q_BTNH.dtype
    assert chunk is not None
    k, v = _gather(call.k_BTKH, over), _gather(call.v_BTKH, over)
    positions = _gather(call.positions_BT, over)
    last_B = jnp.maximum(call.lengths_B - 1, positions.max(1))  # the last token after this call
    is_kept = (positions >= 0) & (positions // chunk == last_B[:, None] // chunk)
    stored = call.stored(k, v, jnp.where(is_kept, positions % chunk, -1))
    if positions.shape[1] == 1:  # the cache holds all that one token sees
        out, _ = stored.attend(
            last_B // chunk * chunk, jnp.where(last_B < 0, 0, last_B % chunk + 1), visibility
        )
        return out.astype(dtype), stored.keys_GBKSH, stored.values_GBKSH
    # Several may cross a boundary and overwrite what the first of them see: attend to what the
    # cache holds before, and to the new tokens.
    before_B = call.lengths_B
    old = call.attend(before_B // chunk * chunk, before_B % chunk, visibility)
    new = chunked_attention(
        call.q_BTNH,
        k,
        v,
        q_positions_BT=call.positions_BT,
        kv_positions_BS=positions,
        chunk_size=chunk,
        temperature=visibility.temperature,
        return_lse=True,
    )
    assert isinstance(new, tuple)
    out, _ = merge_attention(*(jnp.stack(pair) for pair in zip(old, new, strict=True)))
    return out.astype(dtype), stored.keys_GBKSH, stored.values_GBKSH


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContiguousLayer:
    """Keys and values of one layer slot over all groups; S is one chunk or the whole length."""

    keys_GBKSH: jax.Array
    values_GBKSH: jax.Array

    @staticmethod
    def create(
        config: TextConfig,
        visibility: Visibility,
        *,
        groups: int,
        rows: int,
        max_length: int,
        dtype: str,
    ) -> "ContiguousLayer":
        """Make the empty cache of a slot of `groups` layers that see this."""
        chunk = visibility.chunk_size
        length = max_length if chunk is None else min(max_length, chunk)
        shape = (groups, rows, config.num_kv_heads, length, config.head_dim)
        axes = _axes(visibility)
        return ContiguousLayer(
            shard(jnp.zeros(shape, dtype), axes), shard(jnp.zeros(shape, dtype), axes)
        )

    def attend(
        self,
        q_BTNH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        *,
        group: jax.Array,
        lengths_B: jax.Array,
        positions_BT: jax.Array,
        visibility: Visibility,
    ) -> tuple[jax.Array, "ContiguousLayer"]:
        """Append new tokens to one group's cache and attend to everything they see.

        Args:
            q_BTNH, k_BTKH, v_BTKH: projections of the new tokens.
            group: int32 scalar, the group to use.
            lengths_B: int32 tokens of each row before this call.
            positions_BT: int32 positions of the new tokens, increasing from `lengths_B`; -1 is
                padding.
            visibility: what the layer sees.

        Returns:
            out_BTNH, and the cache with the new tokens stored.
        """
        attend = _attend_whole if visibility.chunk_size is None else _attend_chunk
        axes = _axes(visibility)
        out_BTNH, keys, values = per_shard(
            lambda sharded, *arrays: attend(sharded, _Call(*arrays), visibility),
            q_BTNH,
            k_BTKH,
            v_BTKH,
            self.keys_GBKSH,
            self.values_GBKSH,
            group,
            lengths_B,
            positions_BT,
            axes=(QUERIES, KEYS, KEYS, axes, axes, (), ("batch",), TOKENS),
            out=(QUERIES, axes, axes),
        )
        return out_BTNH, ContiguousLayer(keys, values)


def _axes(visibility: Visibility) -> Axes:
    """Return the logical axes of a slot's arrays: a chunk is never sharded."""
    return (None, "batch", "kv_heads", "kv_seq" if visibility.chunk_size is None else None, None)
