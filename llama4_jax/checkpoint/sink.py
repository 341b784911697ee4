"""What a writer intends to do: units of work that can be repeated, and small text files."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

Advance = Callable[[int], object]
"""Called with the number of bytes that have just been written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of a checkpoint that is written in one go; if interrupted, it is written again.

    Attributes:
      name: unique in its plan and the same whenever the plan is made again.
      paths: files or directories that it makes, relative to the checkpoint.
      num_bytes: of its values.
      write: makes them inside the given directory.
    """

    name: str
    paths: tuple[str, ...]
    num_bytes: int
    write: Callable[[pathlib.Path, Advance], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole checkpoint to be written: the units, and text files that are written last."""

    kind: str
    units: tuple[Unit, ...]
    texts: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        return sum(unit.num_bytes for unit in self.units)
