"""What a checkpoint says of how its images are cut: the configs of Hugging Face's processors.

One number of them is a choice: `max_patches`, the most tiles of an image. All else is part of what
the model was trained on and is computed in one way only, so another value is refused.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from llama4_jax.config.json_section import Section
from llama4_jax.config.model import VisionConfig
from llama4_jax.untrusted import load_json

FILES = ("preprocessor_config.json", "processor_config.json")
_KEY = "max_patches"
_COMPUTED: Mapping[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resize_to_max_canvas": False,
    "resample": 2,  # Pillow's number of the bilinear filter
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def read_max_tiles(directory: pathlib.Path, vision: VisionConfig) -> int | None:
    """Return the most tiles of an image that a checkpoint's folder asks for, or None.

    Raises:
      ValueError: the images are to be cut in a way that is not computed here.
    """
    for name in FILES:
        if not (directory / name).is_file():
            continue
        values = _of_images(load_json(directory / name))
        section = Section(values, str(directory / name))
        for key, computed in _COMPUTED.items():
            if section.get(key, computed) != computed:
                raise section.fail(key, f"{computed}: Llama 4's images are read in no other way")
        size = section.section("size")
        for side in size.values:
            if size.integer(side) != vision.image_size:
                raise size.fail(side, f"the image_size of the model ({vision.image_size})")
        if _KEY in section:
            return section.integer(_KEY, least=1)
    return None


def with_max_tiles(values: Mapping[str, Any], max_tiles: int) -> dict[str, Any]:
    """Return the contents of one of FILES with another number of tiles, where it has one."""
    if isinstance(values.get("image_processor"), Mapping):
        return {**values, "image_processor": with_max_tiles(values["image_processor"], max_tiles)}
    return {**values, _KEY: max_tiles} if values.get(_KEY) is not None else dict(values)


def _of_images(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part on images of a config that may be on text and video too."""
    inner = values.get("image_processor")
    return inner if isinstance(inner, Mapping) else values
