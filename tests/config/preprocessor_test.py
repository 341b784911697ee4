"""Hugging Face's image processor configs: the number of tiles is honoured, the rest checked."""

import json

import pytest

from llama4_jax.config import VisionConfig
from llama4_jax.config.preprocessor import read_max_tiles, with_max_tiles

RELEASED = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "Llama4ImageProcessorFast",
    "max_patches": 16,
    "processor_class": "Llama4Processor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "resize_to_max_canvas": False,
    "size": {"height": 336, "width": 336},
}


def read(folder, values, name="preprocessor_config.json"):
    (folder / name).write_text(json.dumps(values))
    return read_max_tiles(folder, VisionConfig())


def test_the_number_of_tiles_is_read_in_either_file(tmp_path):
    assert read_max_tiles(tmp_path, VisionConfig()) is None
    nested = {"image_processor": {**RELEASED, "max_patches": 4}, "processor_class": "x"}
    assert read(tmp_path, nested, "processor_config.json") == 4
    assert read(tmp_path, RELEASED) == 16
    assert read(tmp_path, {"processor_class": "x"}) == 4


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("max_patches", 0, r"max_patches \(0\) must be a whole number from 1"),
        ("max_patches", "x", "max_patches"),
        ("resize_to_max_canvas", True, "resize_to_max_canvas .*read in no other way"),
        ("image_mean", [0.4, 0.5, 0.5], "image_mean"),
        ("resample", 3, "resample"),
        ("size", {"height": 336, "width": 300}, r"size: width \(300\) .* image_size of the model"),
        ("size", 3, "size must be a JSON object"),
    ],
)
def test_images_that_would_be_read_otherwise_are_refused_by_key(tmp_path, key, value, says):
    with pytest.raises(ValueError, match=says):
        read(tmp_path, {**RELEASED, key: value})


def test_another_number_is_written_where_there_is_one():
    assert with_max_tiles(RELEASED, 4) == {**RELEASED, "max_patches": 4}
    nested = {"image_processor": RELEASED}
    assert with_max_tiles(nested, 4)["image_processor"]["max_patches"] == 4
    assert with_max_tiles({"a": 1}, 4) == {"a": 1}
