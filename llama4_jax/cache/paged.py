"""A paged cache: rows of any length share pools of pages, and a table says whose pages are whose.

There are two pools. Layers that see everything keep token p in slot p % page of the row's page
p // page, for as long as the row lives. Chunk layers keep the row's current chunk alone: their
table lists the pages from the beginning of the chunk in which a call begins to where it ends. One
table serves all layers of a kind, because page n is the same page in each of them.

Where `kv_seq` is sharded, every page of the layers that see everything is: each device keeps an
equal stretch of its slots, whatever the table says, so all devices have the same work at any
length. A device's slots then are not consecutive positions; it counts how many of them each query
sees, and folds the temperature, which goes by true positions, into the query.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention.visibility import attention_temperature
from kernels_pallas.decode.api import MAX_QUERIES, decode_attention
from kernels_pallas.prefill.api import prefill_attention
from llama4_jax.cache.contiguous import merge_over
from llama4_jax.cache.layers import Cache
from llama4_jax.config.model import TextConfig
from llama4_jax.config.pattern import LayerKind, Visibility, layer_pattern
from llama4_jax.parallel.axes import Axes
from llama4_jax.parallel.shard import per_shard, shard

KVCache = Literal["auto", "int8", "fp8"]
"""What keys and values are stored in: the model's dtype; int8 with a scale for each token and head;
or float8_e4m3fn."""

_FP8 = jnp.float8_e4m3fn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Store:
    """The keys, or the values, of one layer slot over all groups, in pages.

    Attributes:
        data_GPKSH: pages of every group; S is the page size.
        scale_GPKS: float32 factor of each token and head in int8; else None.
    """

    data_GPKSH: jax.Array
    scale_GPKS: jax.Array | None

    @staticmethod
    def create(shape: tuple[int, ...], axes: Axes, *, dtype: str, kv_cache: KVCache) -> "Store":
        """Make zeroed pages [G, P, K, S, H]."""
        stored = {"auto": dtype, "int8": jnp.int8, "fp8": _FP8}[kv_cache]
        scale = shard(jnp.zeros(shape[:-1]), axes[:-1]) if kv_cache == "int8" else None
        return Store(shard(jnp.zeros(shape, stored), axes), scale)

    def encode(self, x_BTKH: jax.Array) -> "Store":
        """Return new tokens as they are stored, with heads before tokens and no groups."""
        x_BKTH = x_BTKH.swapaxes(1, 2)
        if self.scale_GPKS is not None:
            x_BKTH = x_BKTH.astype(jnp.float32)
            scale_BKT = jnp.maximum(jnp.abs(x_BKTH).max(-1), 1e-30) / 127
            return Store(jnp.round(x_BKTH / scale_BKT[..., None]).astype(jnp.int8), scale_BKT)
        if self.data_GPKSH.dtype == _FP8:  # numbers beyond its range would become NaN
            largest = float(jnp.finfo(_FP8).max)
            x_BKTH = jnp.clip(x_BKTH.astype(jnp.float32), -largest, largest)
        return Store(x_BKTH.astype(self.data_GPKSH.dtype), None)


class _Rows(NamedTuple):
    """Where the tokens of a call stand in this device's part of their rows.

    Attributes:
        group: int32 scalar.
        table_BW: pages of each row.
        slots_BT: slot of each token among all slots of its row; -1 is padding.
        first: of each page, the first slot that this device keeps.
        page: slots of a whole page, those on other devices included.
    """

    group: jax.Array
    table_BW: jax.Array
    slots_BT: jax.Array
    first: jax.Array | int
    page: int


def _write(store: Store, new_BTKH: jax.Array, at: _Rows) -> Store:
    """Store new tokens in their pages: one by one if they are few, else page by page."""
    write = _write_tokens if new_BTKH.shape[1] <= MAX_QUERIES else _write_pages
    return jax.tree.map(lambda pages, new: write(pages, new, at), store, store.encode(new_BTKH))


def _write_tokens(pages_GPKS: jax.Array, new_BKT: jax.Array, at: _Rows) -> jax.Array:
    _, P, K, S = pages_GPKS.shape[:4]
    slot_BT = at.slots_BT % at.page - at.first
    is_own_BT = (at.slots_BT >= 0) & (slot_BT >= 0) & (slot_BT < S)
    page_BT = jnp.take_along_axis(at.table_BW, jnp.maximum(at.slots_BT, 0) // at.page, axis=1)
    page_B1T = jnp.where(is_own_BT, page_BT, P)[:, None]  # one that is not there: dropped
    heads_1K1 = jnp.arange(K)[None, :, None]
    return pages_GPKS.at[at.group, page_B1T, heads_1K1, slot_BT[:, None]].set(new_BKT, mode="drop")


def _write_pages(pages_GPKS: jax.Array, new_BKT: jax.Array, at: _Rows) -> jax.Array:
    """Merge new tokens, which are consecutive, into the pages that they touch."""
    (_, P, K, S), (B, _, T) = pages_GPKS.shape[:4], new_BKT.shape[:3]
    start_B, count_B = at.slots_BT[:, 0], (at.slots_BT >= 0).sum(1)
    touched = min(-(-(T - 1) // at.page) + 1, at.table_BW.shape[1])
    index_Bw = jnp.maximum(start_B, 0)[:, None] // at.page + jnp.arange(touched)
    slot_BwS = index_Bw[..., None] * at.page + at.first + jnp.arange(S)
    token_BwS = slot_BwS - start_B[:, None, None]
    is_new_BwS = (token_BwS >= 0) & (token_BwS < count_B[:, None, None])
    page_Bw = jnp.take_along_axis(at.table_BW, index_Bw, axis=1, mode="clip")
    old_BwKS = pages_GPKS[at.group, page_Bw]
    ones = (1,) * (new_BKT.ndim - 3)
    token_B1s = jnp.clip(token_BwS, 0, T - 1).reshape(B, 1, touched * S, *ones)
    new_BKwS = jnp.take_along_axis(new_BKT, token_B1s, axis=2)
    new_BwKS = new_BKwS.reshape(B, K, touched, S, *new_BKT.shape[3:]).swapaxes(1, 2)
    merged = jnp.where(is_new_BwS.reshape(B, touched, 1, S, *ones), new_BwKS, old_BwKS)
    page_Bw = jnp.where(is_new_BwS.any(-1), page_Bw, P)
    return pages_GPKS.at[at.group, page_Bw].set(merged, mode="drop")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedLayer:
    """Pages of one layer slot over all groups, and the rows that they belong to in this call.

    Attributes:
        keys, values: the pages.
        table_BW: int32, the pages of each row in order; entries past its tokens may hold anything.
            For chunk layers those from the chunk of a call's first token on.
    """

    keys: Store
    values: Store
    table_BW: jax.Array

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
    ) -> tuple[jax.Array, "PagedLayer"]:
        """Append new tokens to one group's pages and attend to everything they see.

        Args:
            q_BTNH, k_BTKH, v_BTKH: projections of the new tokens.
            group: int32 scalar, the group to use.
            lengths_B: unused; a row's positions say where it stands.
            positions_BT: int32, consecutive along a row, -1 at its right is padding.
            visibility: what the layer sees.

        Returns:
            out_BTNH, and the layer with the new tokens stored.
        """
        # Rows share the pool, so no mesh axis divides them here.
        queries: Axes = (None, None if visibility.chunk_size is None else "seq", "q_heads", None)
        new: Axes = (None, None, "kv_heads", None)
        leaves, structure = jax.tree.flatten((self.keys, self.values))
        pages = tuple(page_axes(visibility)[: leaf.ndim] for leaf in leaves)

        def local(sharded: dict[str, tuple[str, ...]], q, k, v, q_at, at, group, table, *leaves):
            keys, values = jax.tree.unflatten(structure, leaves)
            over = sharded.get("kv_seq", ())
            out, keys, values = _attend(
                q, k, v, q_at, at, group, table, keys, values, over, visibility
            )
            return out, *jax.tree.leaves((keys, values))

        out_BTNH, *leaves = per_shard(
            local,
            q_BTNH,
            k_BTKH,
            v_BTKH,
            positions_BT,
            positions_BT,
            group,
            self.table_BW,
            *leaves,
            axes=(queries, new, new, queries[:2], (None, None), (), (None, None), *pages),
            out=(queries, *pages),
        )
        keys, values = jax.tree.unflatten(structure, leaves)
        return out_BTNH, PagedLayer(keys, values, self.table_BW)


def _attend(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    q_positions_BT,
    positions_BT,
    group,
    table_BW,
    keys,
    values,
    over,
    visibility,
):
    """Store and attend on one device; `q_positions_BT` are those of its queries."""
    S = keys.data_GPKSH.shape[3]
    end_B = positions_BT.max(1) + 1  # after this call; 0 in a row of padding
    base_B = jnp.zeros_like(end_B)
    if visibility.chunk_size is not None:
        base_B = jnp.maximum(positions_BT[:, 0], 0) // visibility.chunk_size * visibility.chunk_size
    slots_BT = jnp.where(positions_BT < 0, -1, positions_BT - base_B[:, None])
    shards = jax.lax.axis_size(over) if over else 1
    first = jax.lax.axis_index(over) * S if over else 0
    at = _Rows(group, table_BW, slots_BT, first, S * shards)
    keys, values = _write(keys, k_BTKH, at), _write(values, v_BTKH, at)

    temperature, dtype = visibility.temperature, q_BTNH.dtype

    def own(slots: jax.Array) -> jax.Array:
        """Count the slots on this device among the first so many."""
        return slots // at.page * S + jnp.clip(slots % at.page - first, 0, S)

    if over:
        if temperature is not None:
            warm_BT = attention_temperature(q_positions_BT, temperature)
            q_BTNH = (q_BTNH * warm_BT[..., None, None]).astype(dtype)
            temperature = None
        q_positions_BT = own(jnp.maximum(q_positions_BT + 1, 0)) - 1
    held_B = own(jnp.where(end_B > 0, end_B - base_B, 0))
    P, kernel = keys.data_GPKSH.shape[1], decode_attention
    if q_BTNH.shape[1] > MAX_QUERIES:
        kernel = prefill_attention
    k, v = (  # pages of all groups: page n of group g is g * P + n
        jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]).swapaxes(1, 2), store)
        for store in (keys, values)
    )
    out, lse = kernel(
        q_BTNH,
        k.data_GPKSH,
        v.data_GPKSH,
        k_scale=k.scale_GPKS,
        v_scale=v.scale_GPKS,
        lengths_B=held_B,
        q_positions_BT=q_positions_BT,
        kv_start_B=base_B,
        page_table_BP=group * P + table_BW,
        chunk_size=visibility.chunk_size,
        temperature=temperature,
        return_lse=True,
    )
    return merge_over(out, lse, over).astype(dtype), keys, values


def page_axes(visibility: Visibility) -> Axes:
    """Return the logical axes of pages [G, P, K, S, H]: a chunk is never sharded."""
    return (None, None, "kv_heads", "kv_seq" if visibility.chunk_size is None else None, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pools:
    """The pages of every layer, without the rows that use them.

    Attributes:
        slots: keys and values of the repeating layers, one pair for each slot.
        tail: those of the layers after the last whole group.
    """

    slots: tuple[tuple[Store, Store], ...]
    tail: tuple[tuple[Store, Store], ...]

    @staticmethod
    def create(
        config: TextConfig,
        *,
        whole_pages: int,
        chunk_pages: int,
        page_size: int,
        dtype: str = "bfloat16",
        kv_cache: KVCache = "auto",
    ) -> "Pools":
        """Make empty pools.

        Args:
            config: of the decoder.
            whole_pages: pages of each layer that sees everything.
            chunk_pages: pages of each chunk layer.
            page_size: tokens of a page; divides the chunk size.
            dtype: of keys and values, unless `kv_cache` says otherwise.
            kv_cache: what they are stored in.

        Raises:
            ValueError: pages do not divide a chunk.
        """
        if config.chunk_size is not None and config.chunk_size % page_size:
            raise ValueError(
                f"page_size ({page_size}) must divide the chunk size ({config.chunk_size})"
            )

        def stores(kind: LayerKind, groups: int) -> tuple[Store, Store]:
            count = whole_pages if kind.visibility.chunk_size is None else chunk_pages
            shape = (groups, count, config.num_kv_heads, page_size, config.head_dim)
            made = [
                Store.create(shape, page_axes(kind.visibility), dtype=dtype, kv_cache=kv_cache)
                for _ in range(2)
            ]
            return made[0], made[1]

        pattern = layer_pattern(config)
        return Pools(
            slots=tuple(stores(kind, pattern.num_groups) for kind in pattern.slots),
            tail=tuple(stores(kind, 1) for kind in pattern.tail),
        )

    def cache(self, config: TextConfig, whole_BW: jax.Array, chunk_BW: jax.Array) -> Cache:
        """Return the cache of the rows whose pages these tables list.

        Args:
            config: of the decoder.
            whole_BW: int32 pages of each row in layers that see everything.
            chunk_BW: int32 pages of each row in chunk layers, from the beginning of the chunk in
                which a call begins.
        """
        pattern = layer_pattern(config)

        def layers(kinds: tuple[LayerKind, ...], stores) -> tuple[PagedLayer, ...]:
            tables = [
                whole_BW if kind.visibility.chunk_size is None else chunk_BW for kind in kinds
            ]
            return tuple(
                PagedLayer(keys, values, table)
                for (keys, values), table in zip(stores, tables, strict=True)
            )

        lengths_B = jnp.zeros(whole_BW.shape[0], jnp.int32)
        return Cache(layers(pattern.slots, self.slots), layers(pattern.tail, self.tail), lengths_B)

    @staticmethod
    def of(cache: Cache) -> "Pools":
        """Return the pools of a paged cache, after a call has stored its tokens there."""

        def stores(layers) -> tuple[tuple[Store, Store], ...]:
            return tuple((layer.keys, layer.values) for layer in layers)

        return Pools(slots=stores(cache.slots), tail=stores(cache.tail))

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values with their scales."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


def page_bytes(
    config: TextConfig, *, page_size: int, dtype: str, kv_cache: KVCache = "auto"
) -> tuple[int, int]:
    """Return the bytes of one page over all layers: those that see everything, and chunk layers."""

    def size(**pages: int) -> int:
        made = jax.eval_shape(
            lambda: Pools.create(
                config, **pages, page_size=page_size, dtype=dtype, kv_cache=kv_cache
            )
        )
        return made.num_bytes

    return size(whole_pages=1, chunk_pages=0), size(whole_pages=0, chunk_pages=1)
