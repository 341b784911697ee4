"""Meshes from a short description, such as `"expert:4,tensor:2"`."""

import math
import re
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from llama4_jax.parallel.rules import MESH_AXES


def parse_mesh(description: str) -> dict[str, int]:
    """Return the axis sizes of a description like `"fsdp:4,expert:2"`; the empty string is no axes.

    Raises:
        ValueError: an entry is not `axis:size`, the axis is unknown or named twice.
    """
    sizes: dict[str, int] = {}
    for entry in filter(None, (part.strip() for part in description.split(","))):
        match = re.fullmatch(r"(\w+):(\d+)", entry)
        if match is None or int(match[2]) < 1:
            raise ValueError(f"mesh entry {entry!r} must read axis:size, as in 'expert:4,tensor:2'")
        axis = match[1]
        if axis not in MESH_AXES:
            raise ValueError(f"unknown mesh axis {axis!r}; choose from {', '.join(MESH_AXES)}")
        if axis in sizes:
            raise ValueError(f"mesh axis {axis!r} is named twice in {description!r}")
        sizes[axis] = int(match[2])
    return sizes


def make_mesh(description: str, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh with explicit axes over the first devices that the description needs.

    Axes are laid out in the order data, fsdp, expert, tensor, context, whatever the order of the
    description, so that `tensor` and `context` neighbours are near each other.

    Raises:
        ValueError: the description is malformed or needs more devices than there are.
    """
    sizes = parse_mesh(description) or {"data": 1}
    names = tuple(axis for axis in MESH_AXES if axis in sizes)
    shape = tuple(sizes[axis] for axis in names)
    devices = jax.devices() if devices is None else devices
    needed = math.prod(shape)
    if needed > len(devices):
        raise ValueError(
            f"mesh {description!r} needs {needed} devices but there are {len(devices)}; "
            "make its sizes multiply to at most that"
        )
    return jax.make_mesh(
        shape, names, axis_types=(AxisType.Explicit,) * len(names), devices=list(devices)[:needed]
    )
