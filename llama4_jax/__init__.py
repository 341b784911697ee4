"""Llama 4 in JAX: load a checkpoint, generate, score, save.

The names below are imported when first used, so that `import llama4_jax.config` stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama4_jax.config import behemoth_preview, maverick, nano, scout
    from llama4_jax.model import Cache, Llama4
    from llama4_jax.pretrained import Pretrained, from_pretrained, save_pretrained
    from llama4_jax.serve import Options, Request, Sampling, generate, score

__version__ = "0.1.0"

_HOMES = {
    "Pretrained": "pretrained",
    "from_pretrained": "pretrained",
    "save_pretrained": "pretrained",
    "behemoth_preview": "config",
    "maverick": "config",
    "nano": "config",
    "scout": "config",
    "Cache": "model",
    "Llama4": "model",
    "Options": "serve",
    "Request": "serve",
    "Sampling": "serve",
    "generate": "serve",
    "score": "serve",
}

__all__ = [
    "Cache",
    "Llama4",
    "Options",
    "Pretrained",
    "Request",
    "Sampling",
    "behemoth_preview",
    "from_pretrained",
    "generate",
    "maverick",
    "nano",
    "save_pretrained",
    "scout",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"llama4_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
