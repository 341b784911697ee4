"""Write training metrics where people and programs read them."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter

Metrics = Mapping[str, float | list[float]]
"""Named numbers, and lists with a number for each of several things, such as experts."""


class Writer(Protocol):
    """Takes the metrics of a step."""

    def write(self, step: int, metrics: Metrics) -> None:
        """Record the metrics of one step."""

    def close(self) -> None:
        """Finish writing."""


class JsonLinesWriter:
    """Append one JSON object per call to a file: {"step": 10, "train/loss": 2.5}; lists as lists.

    JSON has no number that is not finite; null stands for it. A run that resumes from an earlier
    step drops the lines beyond it, so that the file reads like that of an uninterrupted run.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():  # replaced in one step: a kill in between loses no line
            kept = path.with_name(path.name + ".new")
            lines = _lines_up_to(path, resume_step)
            kept.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            kept.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Metrics) -> None:
        line = {"step": step} | {name: _or_null(value) for name, value in metrics.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """Write event files that TensorBoard shows; steps after `resume_step` are purged.

    A list becomes a histogram whose bar i, from i to i + 1, is as high as number i.
    """

    def __init__(self, directory: Path, *, resume_step: int = 0) -> None:
        self._summary = SummaryWriter(str(directory), purge_step=resume_step + 1)

    def write(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if isinstance(value, list):
                self._write_bars(step, name, value)
            else:
                self._summary.add_scalar(name, value, step)

    def _write_bars(self, step: int, name: str, heights: list[float]) -> None:
        self._summary.add_histogram_raw(
            name,
            min=0,
            max=len(heights),
            num=sum(heights),
            sum=sum(i * height for i, height in enumerate(heights)),
            sum_squares=sum(i * i * height for i, height in enumerate(heights)),
            bucket_limits=[float(i + 1) for i in range(len(heights))],
            bucket_counts=heights,
            global_step=step,
        )

    def close(self) -> None:
        self._summary.close()


class WriterGroup:
    """Hand every call to several writers."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = tuple(writers)

    def write(self, step: int, metrics: Metrics) -> None:
        for writer in self._writers:
            writer.write(step, metrics)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def open_writers(workdir: Path, *, resume_step: int = 0) -> WriterGroup:
    """Open the files every run writes: metrics.jsonl and TensorBoard events in tensorboard/."""
    return WriterGroup(
        [
            JsonLinesWriter(workdir / "metrics.jsonl", resume_step=resume_step),
            TensorBoardWriter(workdir / "tensorboard", resume_step=resume_step),
        ]
    )


def _or_null(value: float | list[float]) -> Any:
    if isinstance(value, list):
        return [_or_null(item) for item in value]
    return value if math.isfinite(value) else None


def _lines_up_to(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a killed run may be cut short
        if record["step"] <= step:
            kept.append(line)
    return kept
