"""Count the bytes that a model keeps: weights, caches, optimizer state, and a device's part."""

import dataclasses

from llama4_jax.config.model import DType, ModelConfig, TextConfig
from llama4_jax.config.pattern import layer_pattern
from llama4_jax.cost.parameters import count_parameters

_WIDTH = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheBytes:
    """Bytes of keys and values.

    Attributes:
        whole: of layers that see everything and keep every token.
        chunk: of layers that see a chunk and keep no more than that.
    """

    whole: int
    chunk: int

    @property
    def total(self) -> int:
        return self.whole + self.chunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes that one device holds between steps; what a step needs besides is not in it."""

    weights: float
    cache: float = 0
    optimizer: float = 0

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.optimizer


def weight_bytes(config: ModelConfig, dtype: DType | None = None) -> int:
    """Count the bytes of all parameters, by default in the dtype of the config."""
    count = count_parameters(config)
    return _WIDTH[dtype or config.dtype] * (count.total - count.buffers) + 4 * count.buffers


def optimizer_bytes(config: ModelConfig, dtype: DType = "float32") -> int:
    """Count AdamW's two moments of every trained parameter; its counters of steps are left out."""
    count = count_parameters(config)
    return 2 * _WIDTH[dtype] * (count.total - count.buffers)


def cache_bytes(
    config: TextConfig, *, rows: int = 1, length: int = 1, dtype: DType = "bfloat16"
) -> CacheBytes:
    """Count the bytes of a cache; with the defaults, those of one token.

    A layer keeps 2 K H numbers of a token, K kv heads of H. Layers with chunks keep one chunk.

    Args:
        config: The decoder.
        rows: Rows that the cache has place for.
        length: Tokens that a row has place for.
        dtype: Of keys and values.
    """
    of_token = 2 * config.num_kv_heads * config.head_dim * _WIDTH[dtype]
    chunks = [kind.visibility.chunk_size for kind in layer_pattern(config).kinds]
    return CacheBytes(
        whole=chunks.count(None) * rows * length * of_token,
        chunk=sum(min(length, chunk) for chunk in chunks if chunk) * rows * of_token,
    )


def serving_memory(
    config: ModelConfig, *, rows: int, length: int, shards: int = 1, context: int = 1
) -> DeviceMemory:
    """Count what a device holds of weights and cache, in the dtype of the config.

    weights / shards + (whole / context + chunk) / shards. Norms, routers and the small arrays of
    the vision encoder, which every device has whole, are counted as divided: under 0.1 % of Scout.

    Args:
        config: The model.
        rows: Rows of a group of `shards` times `context` devices.
        length: Tokens that a row has place for.
        shards: Devices that divide heads, hidden features and experts.
        context: Devices that divide the tokens of layers that keep all of them.
    """
    cache = cache_bytes(config.text, rows=rows, length=length, dtype=config.dtype)
    return DeviceMemory(
        weights=weight_bytes(config) / shards,
        cache=(cache.whole / context + cache.chunk) / shards,
    )


def training_memory(config: ModelConfig, *, shards: int = 1) -> DeviceMemory:
    """Count what a device holds of float32 weights and AdamW's moments: 12 bytes a parameter.

    Args:
        config: The model.
        shards: Devices that divide every weight.
    """
    return DeviceMemory(
        weights=weight_bytes(config, "float32") / shards,
        optimizer=optimizer_bytes(config) / shards,
    )
