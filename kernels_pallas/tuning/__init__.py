"""Block sizes found by measuring, one JSON file per chip; `experiments/benchmark.py` writes them."""

import functools
import json
import pathlib
from collections.abc import Mapping

from kernels_pallas import backend

FOLDER = pathlib.Path(__file__).parent


def chip(device_kind: str) -> str:
    """Return the file name of a chip: "TPU v5p" and "TPU v5" give "tpu_v5p"."""
    known = {
        "TPU v5 lite": "tpu_v5e", "TPU v5e": "tpu_v5e", "TPU v5": "tpu_v5p", "TPU v5p": "tpu_v5p",
        "TPU v6 lite": "tpu_v6e", "TPU v6e": "tpu_v6e", "TPU7x": "tpu_7x",
    }  # fmt: skip
    if device_kind in known:
        return known[device_kind]
    words = device_kind.lower().split()
    return "_".join(words[:2])


@functools.cache
def _table(name: str) -> list[dict]:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text("utf-8"))["entries"] if path.exists() else []


def lookup(operation: str, default: Mapping[str, int], **shape: int | str) -> dict[str, int]:
    """Return the block sizes measured best for this chip, operation and shape, else the default.

    Args:
        operation: such as "chunked_attention.forward".
        default: block sizes where nothing was measured.
        **shape: what the entry must agree with, such as head_dim=128; an entry that does not
            mention a key agrees with any value of it.
    """
    for entry in _table(chip(backend.device_kind())):
        wanted = entry["shape"]
        if entry["operation"] == operation and all(
            shape.get(key) == value for key, value in wanted.items()
        ):
            return {**default, **entry["blocks"]}
    return dict(default)
