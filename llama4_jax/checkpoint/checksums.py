"""Checksums of files: a changed byte is noticed when it is read, and its file named."""

import json
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from llama4_jax.untrusted import load_json

FILE = "crc32.json"
"""Holds the checksums of all other files of its directory."""
_SEAL = "crc32"
_PIECE_BYTES = 1 << 20


def seal(values: Mapping[str, Any]) -> str:
    """Return values as the text of a JSON file that tells of itself whether it is as written."""
    return _text({**values, _SEAL: f"{zlib.crc32(_text(values).encode()):08x}"})


def unseal(path: pathlib.Path) -> tuple[dict[str, Any], bool]:
    """Read a JSON file.

    Returns:
      Its values, and whether they are sealed: older files are not.

    Raises:
      ValueError: it is sealed and not as it was written, or is no JSON object.
    """
    values = load_json(path)
    found = {name: value for name, value in values.items() if name != _SEAL}
    if _SEAL not in values:
        return found, False
    if seal(found) != path.read_text("utf-8"):
        raise ValueError(f"{path} is damaged or was edited: it does not match its own checksum")
    return found, True


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"


class Checksums:
    """The checksums of a directory's files; each file is read for its own no more than once."""

    def __init__(self, directory: pathlib.Path, sums: Mapping[str, str]) -> None:
        self._directory = directory
        self._sums = sums
        self._checked: set[str] = set()

    @classmethod
    def read(cls, directory: pathlib.Path) -> Self:
        """Read what `write_checksums` has written.

        Raises:
          ValueError: it is missing or damaged.
        """
        path = directory / FILE
        values, is_sealed = unseal(path) if path.is_file() else ({}, False)
        if not is_sealed:
            raise ValueError(f"{path}, which holds the checksums of its folder, is missing")
        return cls(directory, values["files"])

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the files, relative to the directory."""
        return iter(self._sums)

    def check(self, names: Iterable[str]) -> None:
        """Read files, several at a time, unless they have been read before.

        Raises:
          ValueError: names the first that is missing or has changed.
        """
        fresh = [name for name in names if name not in self._checked]
        with ThreadPoolExecutor() as pool:
            for name, found in zip(fresh, pool.map(self._crc32, fresh), strict=True):
                if found != self._sums.get(name):
                    what = "is missing" if found is None else "is damaged: its checksum differs"
                    raise ValueError(f"{self._directory / name} {what}")
        self._checked.update(fresh)

    def _crc32(self, name: str) -> str | None:
        path = self._directory / name
        return file_crc32(path) if path.is_file() else None


def write_checksums(directory: pathlib.Path) -> None:
    """Write the checksums of all files below a directory beside them."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    sums = {path.relative_to(directory).as_posix(): file_crc32(path) for path in paths}
    (directory / FILE).write_text(seal({"files": sums}), encoding="utf-8")


def file_crc32(path: pathlib.Path) -> str:
    """Return the CRC-32 of a file as eight hexadecimal digits."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            value = zlib.crc32(piece, value)
    return f"{value:08x}"
