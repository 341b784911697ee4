"""Carry out a plan: units first, into a directory beside the target, which is renamed at the end.

Until the rename there is no target; what an interrupted run leaves is `<target>.partial`, without a
config and with a journal of the large units that are finished. The same conversion run again leaves
those out, any other starts afresh.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

from llama4_jax.checkpoint.sink import Advance, Plan

JOURNAL = "conversion.json"
Progress = Callable[[int], AbstractContextManager[Advance]]
"""Given the bytes to write, enters a context that is told of every few bytes written."""

_SLACK_BYTES = 64 << 20
_WORTH_KEEPING_BYTES = 64 << 20
"""A finished unit of this size is kept for a resumed run; a smaller one is sooner written again."""


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
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} already exists; name a new directory or remove it first")


def write_checkpoint(
    plan: Plan,
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
    identity = hashlib.sha256(
        json.dumps([fingerprint, plan.kind, [[u.name, u.num_bytes] for u in plan.units]]).encode()
    ).hexdigest()
    with _locked(partial):
        done = _read_journal(partial, identity, resumable=fingerprint is not None)
        _check_space(plan, done, target)
        if not done and partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(exist_ok=True)
        _write_journal(partial, identity, done)
        try:
            _write_units(plan, partial, identity, done, progress)
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


def _write_units(
    plan: Plan, partial: pathlib.Path, identity: str, done: list[str], progress: Progress
) -> None:
    """Write the units that are not done yet; note large ones, once safe on disk, in the journal."""
    with progress(plan.num_bytes) as advance:
        for unit in plan.units:
            if unit.name in done:
                advance(unit.num_bytes)
                continue
            unit.write(partial, advance)
            if unit.num_bytes >= _WORTH_KEEPING_BYTES:
                for path in unit.paths:
                    _sync(partial / path)
                done.append(unit.name)
                _write_journal(partial, identity, done)


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


def _read_journal(partial: pathlib.Path, identity: str, *, resumable: bool) -> list[str]:
    """Return the units that an interrupted run of the same work finished, if it is to go on.

    Raises:
      ValueError: the partial directory is somebody else's.
    """
    if not partial.exists():
        return []
    try:
        journal = json.loads((partial / JOURNAL).read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"{partial} is in the way and was not left by a conversion; remove it first"
        ) from error
    except json.JSONDecodeError:
        return []
    return list(journal["done"]) if resumable and journal["identity"] == identity else []


def _write_journal(partial: pathlib.Path, identity: str, done: list[str]) -> None:
    _write_text(partial / JOURNAL, json.dumps({"identity": identity, "done": done}))


def _check_space(plan: Plan, done: list[str], target: pathlib.Path) -> None:
    needed = sum(unit.num_bytes for unit in plan.units if unit.name not in done) + _SLACK_BYTES
    free = shutil.disk_usage(target.parent).free
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
