"""Where parameters come from: named canonical arrays, read slice by slice from any files."""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Protocol

import ml_dtypes
import numpy as np

from llama4_jax.checkpoint.weight_map import parameters
from llama4_jax.config import ModelConfig

Index = tuple[slice, ...]

_DEQUANTISE_ELEMENTS = 4 << 20


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
class StoredTensor:
    """The place of one tensor's bytes in a file.

    Attributes:
      offset: of its first element, in bytes.
      strides: in elements; None means C order.
    """

    path: pathlib.Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...] | None = None

    def view(self) -> np.ndarray:
        """Map the tensor into memory read-only; pages are read as they are touched."""
        strides = self.strides or _c_strides(self.shape)
        length = 1 + sum((n - 1) * s for n, s in zip(self.shape, strides, strict=True))
        flat = np.memmap(self.path, self.dtype, mode="r", offset=self.offset, shape=(length,))
        scaled = [stride * self.dtype.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, scaled, writeable=False)


def _c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Factors of a quantised piece; an axis of size 1, or an empty one, is broadcast."""

    tensor: StoredTensor
    axes: tuple[str, ...]
    fuse: int | None = None
    start: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A box of one parameter inside one stored tensor.

    Attributes:
      axes: letters of each axis of the stored tensor, as in the weight table.
      sizes: of the box, for every letter of the parameter.
      starts: where the box begins in the parameter, for letters that are cut.
      fuse, start: the stored axis on which other parameters lie too, and where this one begins.
      scale: multiply by it in float32 (quantised tensors only).
    """

    tensor: StoredTensor
    axes: tuple[str, ...]
    sizes: Mapping[str, int]
    starts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    fuse: int | None = None
    start: int = 0
    scale: Scale | None = None

    def view(self, letters: str) -> np.ndarray:
        """Return the box with one axis per letter, in the parameter's order, without copying."""
        return _view(self.tensor, self.axes, self.fuse, self.start, self.sizes, letters)

    def scale_view(self, letters: str) -> np.ndarray:
        """Return the factors, broadcastable against `view`."""
        assert self.scale is not None
        scale = self.scale
        # A scale of one element is shared by the whole tensor, whatever its number of axes.
        axes = () if math.prod(scale.tensor.shape) == 1 else scale.axes
        return _view(scale.tensor, axes, scale.fuse, scale.start, self.sizes, letters)


def _view(
    tensor: StoredTensor,
    axes: tuple[str, ...],
    fuse: int | None,
    start: int,
    sizes: Mapping[str, int],
    letters: str,
) -> np.ndarray:
    value = tensor.view()
    if fuse is not None and axes:
        axis = fuse % len(axes)
        extent = math.prod(sizes[x] for x in axes[axis])
        value = value[(slice(None),) * axis + (slice(start, start + extent),)]
    stored = [x for axis in axes for x in axis]
    value = value.reshape([sizes[x] for x in stored])
    value = value.transpose([stored.index(x) for x in letters if x in stored])
    return np.expand_dims(value, tuple(i for i, x in enumerate(letters) if x not in stored))


class FileSource:
    """Parameters assembled from pieces of stored tensors; quantised pieces come out dequantised."""

    def __init__(self, config: ModelConfig, pieces: Mapping[str, tuple[Piece, ...]]) -> None:
        self.config = config
        self._pieces = pieces
        self._parameters = parameters(config)

    def dtype(self, name: str) -> np.dtype:
        pieces = self._pieces[name]
        if any(piece.scale is not None for piece in pieces):
            return np.dtype(np_dtype(self.config.dtype))
        return widest(piece.tensor.dtype for piece in pieces)

    def read(self, name: str, index: Index) -> np.ndarray:
        """Return one slice of a parameter.

        The memory order of the result follows the file, so that a writer of the same layout copies
        rows and not columns.
        """
        letters = self._parameters[name].weight.letters
        pieces = self._pieces[name]
        if len(pieces) == 1 and pieces[0].scale is None:
            return np.array(pieces[0].view(letters)[index], order="K")
        out = np.empty([part.stop - part.start for part in index], self.dtype(name))
        for piece in pieces:
            _fill(out, piece, letters, index)
        return out


def _fill(out: np.ndarray, piece: Piece, letters: str, index: Index) -> None:
    """Copy what `piece` has of the slice `index` into its place in `out`."""
    inside, target = [], []
    for letter, part in zip(letters, index, strict=True):
        begin = piece.starts.get(letter, 0)
        low = max(part.start, begin)
        high = min(part.stop, begin + piece.sizes[letter])
        if low >= high:
            return
        inside.append(slice(low - begin, high - begin))
        target.append(slice(low - part.start, high - part.start))
    value = piece.view(letters)[tuple(inside)]
    place = out[tuple(target)]
    if piece.scale is None:
        place[...] = value
        return
    factors = piece.scale_view(letters)
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


def np_dtype(name: str) -> np.dtype:
    """Return the numpy dtype called `name`, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Return the one dtype among `dtypes`, or float32, which holds them all, if they differ."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else np.dtype(np.float32)
