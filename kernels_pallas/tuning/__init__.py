"""Block sizes, one JSON file per chip; `experiments.benchmark --tune` measures them."""

import contextlib
import contextvars
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping

import jax

from kernels_pallas import backend, chips

FOLDER = pathlib.Path(__file__).parent

# Part of what jax.jit keeps programs by: other sizes give another program.
_overrides = jax.make_user_context(default_value=())
_found: contextvars.ContextVar[dict | None] = contextvars.ContextVar("found", default=None)


def chip(device_kind: str) -> str:
    """Return the file name of a chip: "tpu_v5p", "nvidia_h100"; of others two words of the kind."""
    known = chips.find(device_kind)
    if known is None:
        return "_".join(device_kind.lower().split()[:2])
    family = {"tpu": "tpu", "gpu": "nvidia"}[known.platform]
    return f"{family}_{known.name.removeprefix('tpu')}"


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
