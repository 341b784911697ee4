"""The atomic writer of checkpoints: a plan's units go beside the target, which appears complete.

Until the last rename there is no target. What an interrupted run leaves is `<target>.partial` and,
from before it is made until after it is renamed, the journal `<target>.partial.json`: it says whose
that directory is and which large units are finished. The same work run again leaves those out and
any other starts afresh, wherever the interruption came.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager

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


def journal_path(target: pathlib.Path) -> pathlib.Path:
    """Return the file that says what the partial directory is and how far it is."""
    return target.with_name(target.name + ".partial.json")


def check_target(target: pathlib.Path) -> None:
    """Refuse a target that can be neither made nor taken nor, as far as is known here, finished.

    Raises:
      ValueError: names the target and what to do.
    """
    if target.is_symlink():
        raise ValueError(f"{target} is a symbolic link; name the directory that it leads to")
    if os.path.ismount(target):
        raise ValueError(f"{target} is where a disk is mounted; name a directory inside it")
    if not journal_path(target).exists():
        _check_unused(target)


def _check_unused(target: pathlib.Path) -> None:
    if target.exists() and not _is_empty(target):
        raise ValueError(f"{target} already exists; name a new directory or remove it first")


def _is_empty(directory: pathlib.Path) -> bool:
    return directory.is_dir() and not any(directory.iterdir())


def write_checkpoint(
    plan: WritePlan,
    target: pathlib.Path,
    *,
    files: Mapping[str, pathlib.Path],
    fingerprint: object = None,
    progress: Progress = no_progress,
) -> None:
    """Write a planned checkpoint to `target`, which appears only when it is complete.

    An exception that ends it while the disk is written has a note that says what is kept.

    Args:
      plan: what to write.
      target: a directory that does not exist or is empty.
      files: files to copy by the name they get, such as the tokenizer's.
      fingerprint: JSON values that say where the parameters come from; an interrupted run is
        resumed if they are equal. None never resumes.
      progress: told of the bytes written.

    Raises:
      ValueError: the target is in use, or the disk has too little space.
      OSError: reading or writing failed.
    """
    target = pathlib.Path(os.path.abspath(target))
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        journal = _Journal(target, plan, fingerprint)
        if journal.is_finished():
            journal.remove()
            return
        _check_unused(target)
        _check_space(plan, journal, target)
        partial = journal.begin()
        try:
            _write_units(plan, partial, journal, progress)
            for name, path in files.items():
                shutil.copyfile(path, partial / name)
            for name, text in plan.texts.items():
                _write_text(partial / name, text)
            os.sync()  # a power cut after the rename must not find files without their contents
            os.rename(partial, target)
        except BaseException as error:
            then = "" if fingerprint is None else "; run it again to go on"
            error.add_note(f"what is done so far is kept in {partial}{then}")
            raise
        journal.remove()


class _Journal:
    """What an interrupted run left: whose the partial directory is, and its finished units.

    Raises:
      ValueError: the partial directory is somebody else's.
    """

    def __init__(self, target: pathlib.Path, plan: WritePlan, fingerprint: object) -> None:
        work = [fingerprint, plan.kind, [[u.name, u.num_bytes] for u in plan.units]]
        self._identity = hashlib.sha256(json.dumps(work).encode()).hexdigest()
        self._target, self._partial = target, partial_directory(target)
        self._path = journal_path(target)
        self._is_ours = False
        self.done: list[str] = []
        if not self._path.is_file():
            is_there = self._partial.exists() or self._partial.is_symlink()
            if is_there and not _is_empty(self._partial):
                raise ValueError(
                    f"{self._partial} is in the way and was not left by a conversion; move it away"
                )
            return
        # A power cut may have left anything in it; then the work starts afresh.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads(self._path.read_text("utf-8"))
            self._is_ours = fingerprint is not None and found["identity"] == self._identity
            if self._is_ours:
                self.done = [u.name for u in plan.units if u.name in found["done"] and self._has(u)]

    def _has(self, unit: WriteUnit) -> bool:
        return all((self._partial / path).exists() for path in unit.paths)

    def is_finished(self) -> bool:
        """Return whether this very work is done but for removing the journal."""
        is_there = self._target.exists() and not _is_empty(self._target)
        return self._is_ours and is_there and not self._partial.exists()

    def begin(self) -> pathlib.Path:
        """Return the partial directory, emptied unless it holds finished units of this work."""
        self.save()
        if not self.done and self._partial.exists():
            shutil.rmtree(self._partial)  # a link is refused by rmtree
        self._partial.mkdir(exist_ok=True)
        return self._partial

    def save(self) -> None:
        _write_text(self._path, json.dumps({"identity": self._identity, "done": self.done}))
        _sync(self._path.parent)

    def remove(self) -> None:
        self._path.unlink()


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
                roots = [partial / path for path in unit.paths]
                for made in (partial, *roots, *(p for root in roots for p in root.rglob("*"))):
                    _sync(made)
                journal.done.append(unit.name)
                journal.save()


@contextlib.contextmanager
def _locked(target: pathlib.Path) -> Generator[None]:
    """Hold a lock beside the target, so that two conversions never mix.

    The lock ends with its process; the file that it is on may stay and means nothing.
    """
    path = target.with_name(target.name + ".partial.lock")
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed it between the two lines before this one.
            is_current = os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            is_current = False
        if not is_current:
            raise ValueError(f"{target} is being written by another process")
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
    """Replace a small file in one step, power cut or not."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    _sync(fresh)
    os.replace(fresh, path)


def _sync(path: pathlib.Path) -> None:
    """Make a file, or the entries of a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
