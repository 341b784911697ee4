"""Checkpoints: Hugging Face, Meta and native layouts, in and out."""

from llama4_jax.checkpoint.convert import FORMATS, Format, convert, find_format, open_checkpoint

__all__ = [
    "FORMATS",
    "Format",
    "convert",
    "find_format",
    "open_checkpoint",
]
