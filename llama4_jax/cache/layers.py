"""The caches of all layers: what a model passes through its layers, whatever each is made of."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from llama4_jax.cache.contiguous import ContiguousLayer
from llama4_jax.config.model import TextConfig
from llama4_jax.config.pattern import LayerKind, Visibility, layer_pattern
from llama4_jax.parallel.shard import shard


class LayerCache(Protocol):
    """Keys and values of one layer slot over all groups: a pytree that takes tokens and attends."""

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
    ) -> "tuple[jax.Array, LayerCache]":
        """Append new tokens to one group's cache and attend to everything they see."""
        ...


@dataclasses.dataclass(frozen=True)
class CacheView:
    """One layer's place in a cache: its slot, its group, and each row's length so far."""

    layer: LayerCache
    group: jax.Array
    lengths_B: jax.Array

    def attend(
        self,
        q_BTNH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        *,
        positions_BT: jax.Array,
        visibility: Visibility,
    ) -> tuple[jax.Array, LayerCache]:
        """Append new tokens and attend. Returns out_BTNH, and the slot's cache with them."""
        return self.layer.attend(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            group=self.group,
            lengths_B=self.lengths_B,
            positions_BT=positions_BT,
            visibility=visibility,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, and how many tokens each row holds.

    For Scout at 1M tokens chunk layers that hold one chunk make it a quarter of what caching every
    layer in full would take.

    Attributes:
        slots: caches of the repeating layers, one entry per slot with a leading axis of groups.
        tail: caches of the layers after the last whole group, with a leading axis of one.
        lengths_B: int32 tokens stored per row.
    """

    slots: tuple[LayerCache, ...]
    tail: tuple[LayerCache, ...]
    lengths_B: jax.Array

    @staticmethod
    def create(
        config: TextConfig, *, batch_size: int, max_length: int, dtype: str = "bfloat16"
    ) -> "Cache":
        """Make an empty contiguous cache for `batch_size` rows of up to `max_length` tokens.

        Raises:
            ValueError: `max_length` is beyond the positions the model was made for.
        """
        if not 0 < max_length <= config.max_positions:
            raise ValueError(
                f"max_length ({max_length}) must lie in 1..max_positions ({config.max_positions})"
            )
        pattern = layer_pattern(config)

        def layer(kind: LayerKind, groups: int) -> ContiguousLayer:
            return ContiguousLayer.create(
                config,
                kind.visibility,
                groups=groups,
                rows=batch_size,
                max_length=max_length,
                dtype=dtype,
            )

        return Cache(
            slots=tuple(layer(kind, pattern.num_groups) for kind in pattern.slots),
            tail=tuple(layer(kind, 1) for kind in pattern.tail),
            lengths_B=shard(jnp.zeros(batch_size, jnp.int32), ("batch",)),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((self.slots, self.tail)))

    def __repr__(self) -> str:
        """Say how much it holds, not what."""
        rows = self.lengths_B.shape[0]
        return f"Cache({rows} rows, {self.num_bytes:,} bytes in {len(self.slots)} slots)"
