"""What others wrote, read without trusting it: small files, JSON, and values quoted in messages."""

import json
import pathlib
import reprlib
import stat
from typing import Any

MAX_DEPTH = 64
"""JSON nested deeper is refused: whatever walks through a value may call itself so often."""
MAX_JSON_BYTES = 64 << 20
"""Largest JSON file that is read; the largest of a checkpoint, an index, has 5 MB."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def parse_json(text: str | bytes, what: str) -> Any:
    """Return the value of a JSON text.

    Args:
      text: the text, or its bytes in UTF-8.
      what: the name of the text, which error messages begin with.

    Raises:
      ValueError: it is not JSON, or is nested deeper than MAX_DEPTH.
    """
    too_deep = f"{what} is nested deeper than {MAX_DEPTH} lists and objects"
    try:
        value = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError as error:
        raise ValueError(too_deep) from error
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}") from error
    if is_deep(value):
        raise ValueError(too_deep)
    return value


def is_deep(value: Any) -> bool:
    """Return whether a JSON value is nested deeper than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        boxes = (x for x in level if isinstance(x, dict | list))
        level = [item for x in boxes for item in (x.values() if isinstance(x, dict) else x)]
    return bool(level)


def load_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
      ValueError: the file is too large, not valid JSON, nested too deep, or not an object.
    """
    value = parse_json(read_bytes(path, MAX_JSON_BYTES), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_bytes(path: pathlib.Path, most: int) -> bytes:
    """Read a whole file, after looking at its kind and size.

    Raises:
      ValueError: it is a device or a pipe, has more than `most` bytes, or is a pointer of Git LFS.
      OSError: it cannot be read.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{path} is a device or a pipe; only files are read")
    if found.st_size > most:
        raise ValueError(f"{path} has {found.st_size} bytes, more than the {most} that it may have")
    with path.open("rb") as file:
        data = file.read(most)
    refuse_pointer(path, data)
    return data


def refuse_pointer(path: pathlib.Path, head: bytes) -> None:
    """Refuse a file whose first bytes say that Git LFS has not replaced it by what it stands for.

    Raises:
      ValueError: names the file and what to do.
    """
    if head.startswith(_LFS_POINTER):
        raise ValueError(
            f"{path} is a pointer of Git LFS and not the file itself; fetch it with `git lfs pull`"
        )


def shown(value: Any) -> str:
    """Return `repr(value)` for a message, cut to about a line however large the value is."""
    return _SHOWN.repr(value)


_SHOWN = reprlib.Repr(
    maxlevel=3, maxdict=4, maxlist=8, maxtuple=8, maxset=4, maxstring=80, maxlong=40, maxother=80
)
