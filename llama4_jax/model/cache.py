"""The key-value cache: one chunk for chunk layers, the whole length for NoPE layers."""

import dataclasses

import jax
import jax.numpy as jnp

from llama4_jax.config.model import TextConfig
from llama4_jax.config.pattern import LayerKind, layer_pattern
from llama4_jax.layers.attention import LayerCache
from llama4_jax.parallel.shard import shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, and how many tokens each row holds.

    A chunk layer never needs a token of an earlier chunk, so its cache holds `chunk_size` slots and
    starts over at every chunk boundary, however long the text. For Scout at 1M tokens this is a
    quarter of what caching every layer in full would take.

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
        """Make an empty cache for `batch_size` rows of up to `max_length` tokens.

        Raises:
            ValueError: `max_length` is beyond the positions the model was made for.
        """
        if not 0 < max_length <= config.max_positions:
            raise ValueError(
                f"max_length ({max_length}) must lie in 1..max_positions ({config.max_positions})"
            )
        pattern = layer_pattern(config)

        def layer(kind: LayerKind, groups: int) -> LayerCache:
            is_whole = kind.is_nope or config.chunk_size is None
            length = max_length if is_whole else min(max_length, config.chunk_size or max_length)
            shape = (groups, batch_size, config.num_kv_heads, length, config.head_dim)
            axes = (None, "batch", "kv_heads", "kv_seq" if is_whole else None, None)
            return LayerCache(
                shard(jnp.zeros(shape, dtype), axes), shard(jnp.zeros(shape, dtype), axes)
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
