"""Tensors as files hold them: where their bytes lie, and whether they are those a model needs.

What is wrong with a checkpoint is said before any of it is used, from names and shapes alone.
"""

import dataclasses
import difflib
import fnmatch
import math
import pathlib
from collections.abc import Collection, Mapping

import numpy as np

from llama4_jax.untrusted import shown

Shape = tuple[int, ...]

_SHOWN = 12
_LONGEST_NAME = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileTensor:
    """The place of one tensor's bytes in a file.

    Attributes:
      offset: of its first element, in bytes.
      strides: in elements; None means C order.
    """

    path: pathlib.Path
    offset: int
    shape: Shape
    dtype: np.dtype
    strides: tuple[int, ...] | None = None

    @property
    def is_quantised(self) -> bool:
        return self.dtype.itemsize == 1

    def view(self) -> np.ndarray:
        """Map the tensor into memory read-only; pages are read as they are touched."""
        ndim = len(self.shape)
        strides = self.strides or [math.prod(self.shape[i + 1 :]) for i in range(ndim)]
        length = 1 + sum((n - 1) * s for n, s in zip(self.shape, strides, strict=True))
        flat = np.memmap(self.path, self.dtype, mode="r", offset=self.offset, shape=(length,))
        scaled = [stride * self.dtype.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, scaled, writeable=False)


class FileTensors(dict[str, FileTensor]):
    """The tensors that a checkpoint has, and the shapes of those that a model needs of it.

    Args:
      where: the checkpoint, for messages.
      found: its tensors by name.
    """

    def __init__(self, where: str, found: Mapping[str, FileTensor]) -> None:
        super().__init__(found)
        self._where = where
        self._needed: dict[str, Shape] = {}

    def need(self, key: str, shape: Shape) -> FileTensor | None:
        """Return a tensor, for now in whatever shape, or None; `check` tells if it was missing."""
        self._needed[key] = shape
        return self.get(key)

    def check(self, ignored: Collection[str]) -> None:
        """Compare what is needed with what there is.

        Args:
          ignored: patterns of names that may be there and are not needed.

        Raises:
          ValueError: see `check_tensors`.
        """
        shapes = {
            key: tensor.shape
            for key, tensor in self.items()
            if key in self._needed or not any(fnmatch.fnmatch(key, p) for p in ignored)
        }
        check_tensors(self._where, self._needed, shapes)


def check_tensors(where: str, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Compare the tensors that a model needs with those that a checkpoint has.

    Args:
      where: the checkpoint, for the message.
      expected: shape of every tensor that must be there.
      found: shape of every tensor that is there, without those that may be ignored.

    Raises:
      ValueError: names every missing, misnamed, misshapen and unexpected tensor, with both shapes.
    """
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    lines = [
        f"{key} has shape {shown(found[key])}, expected {shape}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    for key in missing:
        # Searching for names is slow; what is not shown is only counted.
        twin = _twin(key, expected[key], extra, found) if len(lines) < _SHOWN else None
        if twin is None:
            lines.append(f"{key} {expected[key]} is missing")
        else:
            extra.remove(twin)
            lines.append(
                f"{key} {expected[key]} is missing; is it misnamed as {twin} {found[twin]}?"
            )
    lines += [f"{shown(key)[1:-1]} {shown(found[key])} is not part of this model" for key in extra]
    if lines:
        listed = "".join(f"\n  {line}" for line in lines[:_SHOWN])
        rest = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise ValueError(
            f"{where} does not hold the model that its config describes:{listed}{rest}"
        )


def _twin(key: str, shape: Shape, extra: list[str], found: Mapping[str, Shape]) -> str | None:
    """Return the unexpected tensor of the same shape whose name is nearest to a missing one's."""
    candidates = [n for n in extra if found[n] == shape and len(n) <= _LONGEST_NAME]
    near = difflib.get_close_matches(key, candidates[:200], n=1, cutoff=0.6)
    return near[0] if near else None
