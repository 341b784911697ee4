"""Tensors of Hugging Face's and Meta's layouts, and the way from them to parameters and back.

A layout says which tensors a checkpoint must hold and which parameters lie in each. A reader finds
them in files and makes slices of them, of which `FileSource` puts parameters together; a writer
puts tensors together from the parameters of any source.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping

import numpy as np

from llama4_jax.checkpoint.file_tensors import FileTensor
from llama4_jax.checkpoint.parameters import (
    Index,
    Parameter,
    Source,
    np_dtype,
    overlap,
    parameters,
)
from llama4_jax.checkpoint.soundness import check_finite_values
from llama4_jax.checkpoint.weight_map import Layout, find_weight
from llama4_jax.config import ModelConfig
from llama4_jax.cost import count_parameters

BLOCK_BYTES = 64 << 20
"""Tensors are read, rearranged and written in blocks of about this many bytes."""
_DEQUANTISE_ELEMENTS = 4 << 20
_MOST_MISSING = 16
"""A checkpoint that holds less than one part in so many is not examined tensor by tensor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A parameter inside a stored tensor; in Meta's files, what one rank has of it.

    Attributes:
      axes: letters of each stored axis, the slowest first, such as ("NH", "D").
      sizes: of each of the parameter's letters, in this part.
      shard: the letter that ranks divide, along whose axis parts of a tensor follow each other.
      start: where this one begins there.
    """

    parameter: Parameter
    axes: tuple[str, ...]
    sizes: Mapping[str, int]
    shard: str | None
    start: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[x] for x in axis) for axis in self.axes)

    @property
    def fused_axis(self) -> int:
        """The stored axis along which parts follow each other."""
        return next((i for i, axis in enumerate(self.axes) if self.shard in [*axis]), 0)

    def view(self, stored: np.ndarray, axes: tuple[str, ...]) -> np.ndarray:
        """Return the part of an array with these stored axes, without copying it.

        The result has an axis per letter, in the parameter's order, of size 1 for a letter that the
        stored axes lack.
        """
        for axis, letters in enumerate(axes):
            if self.shard is not None and self.shard in letters:
                stop = self.start + math.prod(self.sizes[x] for x in letters)
                stored = stored[(slice(None),) * axis + (slice(self.start, stop),)]
        order = "".join(axes)
        value = stored.reshape([self.sizes[x] for x in order])
        value = value.transpose([order.index(x) for x in self.sizes if x in order])
        return np.expand_dims(value, tuple(i for i, x in enumerate(self.sizes) if x not in order))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutTensor:
    """One tensor that a layout stores: a parameter, or several fused along one axis."""

    key: str
    parts: tuple[Part, ...]

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        shape, axis = list(self.parts[0].shape), self.parts[0].fused_axis
        shape[axis] = sum(part.shape[axis] for part in self.parts)
        return tuple(shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def check_size(config: ModelConfig, tensors: Collection[FileTensor], where: str) -> None:
    """Refuse a config of quite another size than its files, before its many tensors are listed.

    Raises:
      ValueError: gives both sizes.
    """
    held = sum(math.prod(tensor.shape) for tensor in tensors)
    needed = count_parameters(config).total
    layers = config.text.num_layers + (config.vision.num_layers if config.vision else 0)
    if needed > _MOST_MISSING * held or layers > len(tensors):
        raise ValueError(
            f"{where} has a config of {layers} layers with {needed:,} parameters in all, but holds "
            f"{len(tensors)} tensors with {held:,} elements; one of the two is of another model"
        )


def layout_tensors(
    config: ModelConfig, layout: Layout, *, ranks: int = 1, present: Container[str] = ()
) -> dict[str, LayoutTensor]:
    """Return the tensors that one file set (one of Meta's `ranks`) of a checkpoint must hold.

    Args:
      config: of the model.
      layout: "hf" or "meta".
      ranks: number of Meta's files.
      present: keys that there are, where a layout has several for the same weight.

    Raises:
      ValueError: a dimension does not divide over the ranks, or the layout has no place for a
        parameter.
    """
    groups: dict[str, list[Part]] = {}
    for parameter in parameters(config).values():
        weight = find_weight(parameter.template, is_moe=parameter.layer in config.text.moe_layers)
        if weight is None:
            raise ValueError(
                f"the {layout} layout has no place for {parameter.name}; convert to orbax instead"
            )
        places = (weight.hf,) if layout == "hf" else weight.meta
        keys = [_stored_key(place.key, parameter, config) for place in places]
        chosen = next((i for i, key in enumerate(keys) if key in present), 0)
        group = groups.setdefault(keys[chosen], [])
        part = Part(
            parameter=parameter,
            axes=places[chosen].axes,
            sizes=_rank_sizes(parameter, weight.shard, ranks),
            shard=weight.shard,
            start=sum(before.shape[before.fused_axis] for before in group),
        )
        group.append(part)
    return {key: LayoutTensor(key=key, parts=tuple(parts)) for key, parts in groups.items()}


def _stored_key(key: str, parameter: Parameter, config: ModelConfig) -> str:
    """Return the stored name; without vision there is no `language_model.` prefix."""
    key = key.format(parameter.layer)
    return key if config.vision is not None else key.removeprefix("language_model.")


def _rank_sizes(parameter: Parameter, shard: str | None, ranks: int) -> dict[str, int]:
    """Return the size of each letter within one of `ranks` files."""
    if shard is None:
        return parameter.sizes
    whole = parameter.sizes[shard]
    if whole % ranks:
        raise ValueError(
            f"{parameter.name}: {shard} ({whole}) must be divisible by the number of "
            f"model-parallel files ({ranks})"
        )
    return {**parameter.sizes, shard: whole // ranks}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Factors of a quantised tensor; an axis of size 1, or an empty one, is broadcast."""

    tensor: FileTensor
    axes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSlice:
    """A box of one parameter inside a tensor of a file.

    Attributes:
      part: what the tensor has of the parameter.
      starts: where that begins in the parameter, for letters that are cut.
      scale: multiply by it in float32 (quantised tensors only).
    """

    tensor: FileTensor
    part: Part
    starts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    scale: Scale | None = None

    def view(self) -> np.ndarray:
        """Return the box with one axis per letter, in the parameter's order, without copying."""
        return self.part.view(self.tensor.view(), self.part.axes)

    def fill(self, out: np.ndarray, index: Index) -> None:
        """Copy what the box has of the parameter's slice `index` into its place in `out`."""
        starts = [self.starts.get(letter, 0) for letter in self.part.sizes]
        common = overlap(index, starts, [*self.part.sizes.values()])
        if common is None:
            return
        inside, target = common
        value, place = self.view()[inside], out[target]
        if self.scale is None:
            place[...] = value
            return
        # A scale of one element is shared by the whole tensor, whatever its number of axes.
        shared = math.prod(self.scale.tensor.shape) == 1
        factors = self.part.view(self.scale.tensor.view(), () if shared else self.scale.axes)
        pick = [p if n > 1 else slice(0, 1) for p, n in zip(inside, factors.shape, strict=True)]
        _dequantise(place, value, factors[tuple(pick)])


def _dequantise(out: np.ndarray, value: np.ndarray, factors: np.ndarray) -> None:
    """Write value * factors, computed in float32 by blocks of rows, rounded once to `out`."""
    factors = np.broadcast_to(factors.astype(np.float32), value.shape)
    axis = int(np.argmax(value.shape))
    step = max(1, _DEQUANTISE_ELEMENTS // (value.size // value.shape[axis]))
    for start in range(0, value.shape[axis], step):
        rows = (slice(None),) * axis + (slice(start, start + step),)
        out[rows] = (value[rows].astype(np.float32) * factors[rows]).astype(out.dtype)


class FileSource:
    """Parameters put together from slices of tensors; quantised ones come out dequantised."""

    def __init__(self, config: ModelConfig, slices: Mapping[str, tuple[TensorSlice, ...]]) -> None:
        self.config = config
        self._slices = slices

    def dtype(self, name: str) -> np.dtype:
        slices = self._slices[name]
        if any(box.scale is not None for box in slices):
            return np_dtype(self.config.dtype)
        return _widest(box.tensor.dtype for box in slices)

    def read(self, name: str, index: Index) -> np.ndarray:
        """Return one slice of a parameter.

        The memory order of the result follows the file, so that a writer of the same layout copies
        rows and not columns.
        """
        slices = self._slices[name]
        if len(slices) == 1 and slices[0].scale is None:
            return np.array(slices[0].view()[index], order="K")
        out = np.empty([part.stop - part.start for part in index], self.dtype(name))
        for box in slices:
            box.fill(out, index)
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewTensor:
    """A tensor to be written: what it is made of, in which precision, and from where."""

    tensor: LayoutTensor
    dtype: np.dtype
    source: Source

    @property
    def header(self) -> tuple[tuple[int, ...], np.dtype]:
        return self.tensor.shape, self.dtype

    @property
    def num_bytes(self) -> int:
        return self.tensor.size * self.dtype.itemsize

    def blocks(self, advance: Callable[[int], object], *, rank: int = 0) -> Iterator[np.ndarray]:
        """Yield the values in stored order, as C-contiguous arrays of about BLOCK_BYTES.

        Args:
          advance: told of the bytes of each block when the next one is asked for.
          rank: which slice of a letter that is divided over Meta's ranks.

        Raises:
          ValueError: a value is not finite in the precision that is written.
        """
        parts, axis = self.tensor.parts, self.tensor.parts[0].fused_axis
        side_by_side = len(parts) > 1 and axis != 0
        for run in [parts] if side_by_side else [(part,) for part in parts]:
            extent = run[0].sizes[run[0].axes[0][0]]
            row_size = sum(math.prod(p.sizes.values()) for p in run) // extent
            step = max(1, BLOCK_BYTES // (row_size * self.dtype.itemsize))
            for start in range(0, extent, step):
                rows = slice(start, min(start + step, extent))
                values = [_block(self.source, part, rows, rank) for part in run]
                values = [value.astype(self.dtype, copy=False) for value in values]
                joined = np.concatenate(values, axis) if side_by_side else values[0]
                block = np.ascontiguousarray(joined)
                check_finite_values(self.tensor.key, block)
                yield block
                advance(joined.nbytes)


def new_tensors(
    source: Source, layout: Layout, dtype: np.dtype | None, *, ranks: int = 1
) -> dict[str, NewTensor]:
    """Return the tensors to write for one file set of a layout.

    Args:
      source: where the parameters come from.
      layout: "hf" or "meta".
      dtype: of the values; None is the one that holds what the tensor's parameters are, whose bits
        then all pass through.
      ranks: number of Meta's files.
    """

    def plan(tensor: LayoutTensor) -> NewTensor:
        own = _widest(source.dtype(part.parameter.name) for part in tensor.parts)
        return NewTensor(tensor=tensor, dtype=dtype or own, source=source)

    tensors = layout_tensors(source.config, layout, ranks=ranks)
    return {key: plan(tensor) for key, tensor in tensors.items()}


def _block(source: Source, part: Part, rows: slice, rank: int) -> np.ndarray:
    """Return rows of the leading letter of a part, in stored axes."""
    order = "".join(part.axes)
    index = {letter: slice(0, size) for letter, size in part.sizes.items()}
    index[order[0]] = rows
    if part.shard is not None:
        cut, offset = index[part.shard], rank * part.sizes[part.shard]
        index[part.shard] = slice(offset + cut.start, offset + cut.stop)
    value = source.read(part.parameter.name, tuple(index.values()))
    value = value.transpose([[*index].index(letter) for letter in order])
    sizes = dict(zip(order, value.shape, strict=True))
    return value.reshape([math.prod(sizes[x] for x in axis) for axis in part.axes])


def _widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Return the one dtype among `dtypes`, or float32, which holds them all, if they differ."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else np.dtype(np.float32)
