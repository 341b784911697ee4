"""The atomic writer of checkpoints: a plan's units go beside the target, which appears complete.

Until the last rename there is no target; what an interrupted run leaves is `<target>.partial`,
without a config and with a journal of the large units that are finished. The same conversion run
again leaves those out, any other starts afresh.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

JOURNAL = "conversion.json"

Advance = Callable[[int], object]
"""Called with the number of bytes that have just been written."""
Progress = Callable[[int], AbstractContextManager[Advance]]
"""Given the bytes to write, enters a context that is told of every few bytes written."""

_SLACK_BYTES = 64 << 20
_WORTH_KEEPING_BYTES = 64 << 20
"""A finished unit of this size is kept for a resumed run; a smaller one is sooner written again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteUnit:
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
class WritePlan:
    """A whole checkpoint to be written: the units, and text files that are written last."""

    kind: str
    units: tuple[WriteUnit, ...]
    texts: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        return sum(unit.num_bytes for unit in self.units)


@contextlib.contextmanager
def no_progress(_: int) -> Iterator[Advance]:
    """Report progress to nobody."""
    yield lambda _: None


def partial_directory(target: pathlib.Path) -> pathlib.Path:
    """Return where a checkpoint lies until it is complete."""
    return target.with_name(target.name + ".partial")


def check_target(target: pathlib.Path) -> None:
    """Refuse a target that exists and is not an empty directory.

    Raises:
      ValueError: names the target and what to do.
    """
    is_empty = target.is_dir() and not any(target.iterdir())
    if not is_empty and (target.exists() or target.is_symlink()):
        raise ValueError(f"{target} already exists; name a new directory or remove it first")


def write_checkpoint(
    plan: WritePlan,
    target: pathlib.Path,
    *,
    files: Mapping[str, pathlib.Path],
    fingerprint: object = None,
    progress: Progress = no_progress,
) -> None:
    """Write a planned checkpoint to `target`, which appears only when it is complete.

    Args:
      plan: what to write.
      target: a directory that does not exist or is empty.
      files: files to copy by the name they get, such as the tokenizer's.
      fingerprint: JSON values that say where the parameters come from; an interrupted run is
        resumed if they are equal. None never resumes.
      progress: told of the bytes written.

    Raises:
      ValueError: the target is in use, or the disk has too little space.
      OSError: reading or writing failed; the partial directory stays for another attempt.
    """
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_directory(target)
    with _locked(partial):
        journal = _Journal(partial, plan, fingerprint)
        _check_space(plan, journal, target)
        if not journal.done and partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(exist_ok=True)
        journal.save()
        try:
            _write_units(plan, partial, journal, progress)
        except (KeyboardInterrupt, OSError) as error:
            error.add_note(f"what is done so far is kept in {partial}; run it again to go on")
            raise
        for name, path in files.items():
            shutil.copyfile(path, partial / name)
        for name, text in plan.texts.items():
            _write_text(partial / name, text)
        (partial / JOURNAL).unlink()
        os.sync()  # a power cut after the rename must not find files without their contents
        os.rename(partial, target)


class _Journal:
    """The large units that an interrupted run of the same work has finished.

    Raises:
      ValueError: the partial directory is somebody else's.
    """

    def __init__(self, partial: pathlib.Path, plan: WritePlan, fingerprint: object) -> None:
        work = [fingerprint, plan.kind, [[u.name, u.num_bytes] for u in plan.units]]
        self._identity = hashlib.sha256(json.dumps(work).encode()).hexdigest()
        self._path = partial / JOURNAL
        if partial.exists() and not self._path.is_file():
            raise ValueError(
                f"{partial} is in the way and was not left by a conversion; remove it first"
            )
        self.done: list[str] = []
        if partial.exists() and fingerprint is not None:
            with contextlib.suppress(json.JSONDecodeError):
                found = json.loads(self._path.read_text())
                self.done = list(found["done"]) if found["identity"] == self._identity else []

    def save(self) -> None:
        _write_text(self._path, json.dumps({"identity": self._identity, "done": self.done}))


def _write_units(
    plan: WritePlan, partial: pathlib.Path, journal: _Journal, progress: Progress
) -> None:
    """Write the units that are not done yet; note large ones, once safe on disk, in the journal."""
    with progress(plan.num_bytes) as advance:
        for unit in plan.units:
            if unit.name in journal.done:
                advance(unit.num_bytes)
                continue
            unit.write(partial, advance)
            if unit.num_bytes >= _WORTH_KEEPING_BYTES:
                for path in unit.paths:
                    _sync(partial / path)
                journal.done.append(unit.name)
                journal.save()


@contextlib.contextmanager
def _locked(partial: pathlib.Path) -> Iterator[None]:
    """Hold a lock beside the partial directory, so that two conversions never mix."""
    path = partial.with_name(partial.name + ".lock")
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{partial} is being written by another process") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _check_space(plan: WritePlan, journal: _Journal, target: pathlib.Path) -> None:
    missing = sum(unit.num_bytes for unit in plan.units if unit.name not in journal.done)
    needed, free = missing + _SLACK_BYTES, shutil.disk_usage(target.parent).free
    if needed > free:
        raise ValueError(
            f"{target.parent} has {free / 1e9:.1f} GB free and the checkpoint needs "
            f"{needed / 1e9:.1f} GB; free space or choose another disk"
        )


def _write_text(path: pathlib.Path, text: str) -> None:
    """Replace a small file in one step."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def _sync(path: pathlib.Path) -> None:
    """Make a file, or every file under a directory, survive a power cut."""
    paths = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    for file_path in paths:
        with file_path.open("rb") as file:
            os.fsync(file.fileno())
