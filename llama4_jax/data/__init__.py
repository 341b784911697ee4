"""Pictures as tiles and tokens, training documents, packing and input pipelines."""

from llama4_jax.data.images import (
    Canvas,
    ImageTiles,
    ImageTokenIds,
    choose_canvas,
    image_tokens,
    layout_tokens,
    load_image,
    preprocess,
    stack_tiles,
)

__all__ = [
    "Canvas",
    "ImageTiles",
    "ImageTokenIds",
    "choose_canvas",
    "image_tokens",
    "layout_tokens",
    "load_image",
    "preprocess",
    "stack_tiles",
]
