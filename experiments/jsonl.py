"""Requests in and answers out as JSON lines: errors name the line, and no answer is ever lost."""

import contextlib
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Self

from tqdm import tqdm

from llama4_jax.untrusted import parse_json

MAX_LINE_BYTES = 256 << 20
"""Longest line that is read; ten million token ids have 80 MB."""


class LineError(ValueError):
    """A line that cannot be used; the message begins with `file:line:`."""


def read_lines[T](path: str | os.PathLike, parse: Callable[[dict[str, Any]], T]) -> list[T]:
    """Read a file of JSON objects, one on each line; blank lines are skipped.

    Args:
      path: of the file, UTF-8.
      parse: makes of one object what the caller needs, raising ValueError or OSError if it cannot.

    Returns:
      The parsed objects in the order of the file.

    Raises:
      LineError: for the first line that is not a JSON object or that `parse` refuses.
    """
    return [parsed for _, parsed in _parsed_lines(pathlib.Path(path), parse)]


def _parsed_lines[T](path: pathlib.Path, parse: Callable) -> Iterator[tuple[int, T]]:
    for number, line in _numbered_lines(path):
        try:
            # utf-8-sig: some editors begin a file with a byte-order mark.
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            value = parse_json(text, "the line")
            if not isinstance(value, dict):
                raise ValueError(f"expected a JSON object, found {type(value).__name__}")
            yield number, parse(value)
        except (ValueError, OSError) as error:
            raise LineError(f"{path}:{number}: {error}") from error


def _numbered_lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file that are not blank, and their numbers."""
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES + 1)
            if len(line) > MAX_LINE_BYTES:
                raise LineError(f"{path}:{number}: the line has over {MAX_LINE_BYTES} bytes")
            if not line:
                return
            if line.strip():
                yield number, line


@contextlib.contextmanager
def naming_lines(path: str | os.PathLike | None) -> Iterator[None]:
    """Let an error of a request name the line of the file that the request came from.

    Args:
      path: of the file that `read_lines` read, or None where requests came from elsewhere.

    Raises:
      LineError: in place of a RequestError.
    """
    from llama4_jax.serve.requests import RequestError

    try:
        yield
    except RequestError as error:
        if path is None:
            raise
        numbers = (number for number, _ in _numbered_lines(pathlib.Path(path)))
        number = next(itertools.islice(numbers, error.index, None))
        raise LineError(f"{path}:{number}: {error}") from error


class LineWriter:
    """Write JSON lines so that the file under its own name is always complete.

    Lines go to `PATH.partial` and are flushed one by one; leaving the `with` block without an
    error renames it to PATH. After an error or an interrupt the partial file stays, holding
    every line written so far. A terminal sees a bar of lines.

    Args:
      path: of the complete file.
      expected: lines that it will have.
    """

    def __init__(self, path: str | os.PathLike, expected: int):
        self.path, self.expected = pathlib.Path(path), expected
        self.partial = partial_path(path)

    def __enter__(self) -> Self:
        self._file = self.partial.open("x", encoding="utf-8")
        self._bar = tqdm(total=self.expected, unit="answer", disable=None, file=sys.stderr)
        return self

    def write(self, value: dict[str, Any]) -> None:
        """Append one object as one line, and hand it to the operating system at once."""
        self._file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        self._bar.update()

    def __exit__(self, kind, error, traceback) -> None:
        self._bar.close()
        if error is None:
            os.fsync(self._file.fileno())
        self._file.close()
        if error is None:
            self.partial.rename(self.path)
        elif self.partial.stat().st_size == 0:
            self.partial.unlink()
        else:
            error.add_note(f"The answers written so far are in {self.partial}.")


def partial_path(path: str | os.PathLike) -> pathlib.Path:
    """Return where lines wait until the file is complete."""
    path = pathlib.Path(path)
    return path.with_name(path.name + ".partial")


def check_writable(path: str | os.PathLike) -> None:
    """Refuse, before any work is done, an output that could not be written or would be replaced.

    Raises:
      ValueError: the file or its partial one exists, or its folder does not.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise ValueError(f"{path} exists; remove it or name another file.")
    if partial_path(path).exists():
        raise ValueError(
            f"{partial_path(path)} holds the answers of a run that did not end; "
            "remove it, or move it if you need them."
        )
    if not path.parent.is_dir():
        raise ValueError(f"the folder {path.parent} does not exist; make it first.")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"the folder {path.parent} may not be written to.")
