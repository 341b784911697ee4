"""Model and run configurations."""

from llama4_jax.config.families import FAMILIES, behemoth_preview, maverick, nano, scout
from llama4_jax.config.model import (
    DType,
    ModelConfig,
    RopeScaling,
    Temperature,
    TextConfig,
    VisionConfig,
)
from llama4_jax.config.pattern import LayerKind, LayerPattern, Visibility, layer_pattern

__all__ = [
    "FAMILIES",
    "DType",
    "LayerKind",
    "LayerPattern",
    "ModelConfig",
    "RopeScaling",
    "Temperature",
    "TextConfig",
    "Visibility",
    "VisionConfig",
    "behemoth_preview",
    "layer_pattern",
    "maverick",
    "nano",
    "scout",
]
