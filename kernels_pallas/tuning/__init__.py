"""Block sizes, one JSON file per chip; `experiments/benchmark.py` measures them."""

import contextlib
import contextvars
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping

import jax

from kernels_pallas import backend

FOLDER = pathlib.Path(__file__).parent

# Part of what jax.jit keeps programs by: other sizes give another program.
_overrides = jax.make_user_context(default_value=())
_found: contextvars.ContextVar[dict | None] = contextvars.ContextVar("found", default=None)


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
        default: block sizes where nothing was measured. An entry may set others besides, which
            belong to another kernel of the same operation and are left out.
        **shape: what the entry must agree with, such as head_dim=128; an entry that does not
            mention a key agrees with any value of it.
    """
    blocks: Mapping[str, int] = {}
    for entry in _table(chip(backend.device_kind())):
        if entry["operation"] == operation and all(
            shape.get(key) == value for key, value in entry["shape"].items()
        ):
            blocks = entry["blocks"]
            break
    blocks = {**blocks, **dict(dict(_overrides.value).get(operation, ()))}
    sizes = {**default, **{name: size for name, size in blocks.items() if name in default}}
    found = _found.get()
    if found is not None:
        before = found.get(operation, {"shape": shape})["shape"]
        shared = {key: value for key, value in shape.items() if before.get(key) == value}
        found[operation] = {"blocks": sizes, "shape": shared}
    return sizes


@contextlib.contextmanager
def overridden(blocks: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """Let kernels that are traced inside use other block sizes.

    Args:
        blocks: of each operation, the sizes that differ.
    """
    with _overrides(tuple((name, tuple(sizes.items())) for name, sizes in blocks.items())):
        yield


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, dict]]:
    """Collect what kernels that are traced inside look up: of each operation, blocks and shape.

    Where several kernels look up the same operation, what their shapes agree in.
    """
    found: dict[str, dict] = {}
    token = _found.set(found)
    try:
        yield found
    finally:
        _found.reset(token)
