"""Checkpoints: Hugging Face, Meta and native layouts, in and out."""

from llama4_jax.checkpoint.convert import FORMATS, Format, convert, find_format, open_checkpoint
from llama4_jax.checkpoint.load import (
    GenerationDefaults,
    Pretrained,
    from_pretrained,
    save_pretrained,
)

__all__ = [
    "FORMATS",
    "Format",
    "GenerationDefaults",
    "Pretrained",
    "convert",
    "find_format",
    "from_pretrained",
    "open_checkpoint",
    "save_pretrained",
]
