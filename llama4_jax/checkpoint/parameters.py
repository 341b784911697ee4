"""The parameters of a model by canonical name, and how whoever holds them is read.

A canonical name, such as "layers.3.attention.w_q_DNH", counts layers from the first, and its suffix
says which dimension is which. Names and shapes are those of the model itself, built in shapes
alone; where an array of the model stacks layers, each of them is a parameter of its own.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from llama4_jax import parallel
from llama4_jax.checkpoint.weight_map import file_order
from llama4_jax.config import ModelConfig, layer_pattern
from llama4_jax.layers.param import Buffer, leaf_name
from llama4_jax.model import Llama4

Index = tuple[slice, ...]


class Source(Protocol):
    """A model's parameters under their canonical names and shapes."""

    config: ModelConfig

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype that `read` gives for a parameter."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """Return one slice of a parameter; `index` has a slice with both ends per dimension."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of one model.

    Attributes:
      name: canonical name.
      shape: a size for each letter of the name's suffix.
      keeps_dtype: it has a precision of its own, whatever others are converted to.
    """

    name: str
    shape: tuple[int, ...]
    keeps_dtype: bool

    @functools.cached_property
    def layer(self) -> int | None:
        """The layer, of the decoder or of the vision encoder, or None outside of them."""
        found = _LAYER.search(self.name)
        return int(found[0]) if found else None

    @functools.cached_property
    def template(self) -> str:
        """The name with `{}` for the layer."""
        return _LAYER.sub("{}", self.name, count=1)

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The size of each letter, in the name's order."""
        letters = self.name.rpartition("_")[2]
        return dict(zip(letters, self.shape, strict=True))

    @property
    def size(self) -> int:
        return math.prod(self.shape)


_LAYER = re.compile(r"(?<=layers\.)\d+")
_PLACE = re.compile(r"(decoder\.groups\.slots\.\d+|decoder\.tail\.\d+|vision\.layers)\.(.*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """An array of the model, and the parameters in it.

    Attributes:
      shape: of the whole array.
      names: canonical names: one per index of the leading axis, or just one.
      is_stacked: there is such a leading axis.
      keeps_dtype: see `Parameter`.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    is_stacked: bool
    keeps_dtype: bool


@functools.lru_cache(maxsize=16)
def model_leaves(config: ModelConfig) -> Mapping[str, Leaf]:
    """Return the arrays of a model by name, as `leaf_name` gives it; none is made."""
    skeleton = parallel.unsharded_shapes(lambda: Llama4(config, key=jax.random.key(0)))
    variables, _ = jax.tree_util.tree_flatten_with_path(
        skeleton, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    stacks = _stacks(config)
    leaves = {}
    for path, variable in variables:
        name = leaf_name(path)
        found = _PLACE.fullmatch(name)
        names = [f"{layer}.{found[2]}" for layer in stacks[found[1]]] if found else [name]
        leaves[name] = Leaf(
            shape=variable.get_value().shape,
            names=tuple(names),
            is_stacked=found is not None and not found[1].startswith("decoder.tail"),
            keeps_dtype=isinstance(variable, Buffer),
        )
    return leaves


def _stacks(config: ModelConfig) -> dict[str, list[str]]:
    """Return, for each place in the model where layers are, the canonical names of those layers."""
    stacks: dict[str, list[str]] = {}
    pattern = layer_pattern(config.text)
    for layer in range(config.text.num_layers):
        stacks.setdefault(f"decoder.{pattern.name(layer)[0]}", []).append(f"layers.{layer}")
    if config.vision is not None:
        stacks["vision.layers"] = [f"vision.layers.{i}" for i in range(config.vision.num_layers)]
    return stacks


@functools.lru_cache(maxsize=16)
def parameters(config: ModelConfig) -> Mapping[str, Parameter]:
    """Return every parameter of the model by canonical name, in the order of checkpoint files."""
    found = [
        Parameter(
            name=name,
            shape=leaf.shape[1:] if leaf.is_stacked else leaf.shape,
            keeps_dtype=leaf.keeps_dtype,
        )
        for leaf in model_leaves(config).values()
        for name in leaf.names
    ]
    found.sort(key=lambda parameter: file_order(parameter.template, parameter.layer))
    return {parameter.name: parameter for parameter in found}


def overlap(
    wanted: Index, starts: Sequence[int], sizes: Sequence[int]
) -> tuple[Index, Index] | None:
    """Return what a slice and a box have in common: where it lies in the box, and in the slice.

    None if they have nothing. The box begins at `starts` and has these sizes.
    """
    inside, target = [], []
    for part, start, size in zip(wanted, starts, sizes, strict=True):
        low, high = max(part.start, start), min(part.stop, start + size)
        if low >= high:
            return None
        inside.append(slice(low - start, high - start))
        target.append(slice(low - part.start, high - part.start))
    return tuple(inside), tuple(target)


def np_dtype(name: str) -> np.dtype:
    """Return the numpy dtype called `name`, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
