"""What a model costs: parameters, FLOPs and bytes, as pure functions of its configuration."""

from llama4_jax.cost.flops import forward_flops, train_flops
from llama4_jax.cost.memory import (
    CacheBytes,
    DeviceMemory,
    cache_bytes,
    optimizer_bytes,
    serving_memory,
    training_memory,
    weight_bytes,
)
from llama4_jax.cost.parameters import Parameters, count_parameters

__all__ = [
    "CacheBytes",
    "DeviceMemory",
    "Parameters",
    "cache_bytes",
    "count_parameters",
    "forward_flops",
    "optimizer_bytes",
    "serving_memory",
    "train_flops",
    "training_memory",
    "weight_bytes",
]
