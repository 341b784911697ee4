"""How long libtpu's schedules of kernels are, beside the time that copies of one step take.

A bundle is what a core issues in a cycle. Those of a kernel are counted as they stand in it: every
loop body and every branch once. So a kernel that copies a tile, or a block, in each step is bound
by memory if it has fewer of them than the copies of a step take cycles.
"""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kernels_pallas.chips import Chip

_ANALYSIS = "schedule-analysis_final_bundles"
_TOTAL = re.compile(r"total scheduled bundles:\s+(\d+)")
# The one operation of an analysis: "%expert_mlp_forward.2.given_resident_0_ = ...".
_KERNEL = re.compile(
    r'\(100\.00%\): %([\w-]+)(?:\.(\d+))?\S* = .*custom_call_target="tpu_custom_call"'
)
_MULTIPLIERS = 4  # of a core, in the number and size that give its chip's products


def write_to(folder: str | os.PathLike) -> None:
    """Let libtpu write its schedules into a folder; call it before libtpu is loaded."""
    wanted = {"dump_to": folder, "dump_llo_text": "true", "dump_llo_pass_label_regex": "final_bund"}
    flags = [f"--xla_jf_{name}={value}" for name, value in wanted.items()]
    before = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([before, *flags]).strip()


class Schedule(NamedTuple):
    """A kernel: its name, its number among those that have the same, and its bundles."""

    kernel: str
    number: int
    bundles: int


def parse(analysis: str) -> Schedule | None:
    """Return the kernel that an analysis is about; None if it is something of XLA's."""
    kernel, total = _KERNEL.search(analysis), _TOTAL.search(analysis)
    if kernel is None or total is None:
        return None
    return Schedule(kernel[1], int(kernel[2] or 0), int(total[1]))


def take(folder: str | os.PathLike) -> list[Schedule]:
    """Return the kernels that were compiled since the last call, in order within a name."""
    found = []
    for path in pathlib.Path(folder).iterdir():
        if _ANALYSIS in path.name:
            found.append(parse(path.read_text("utf-8", "replace")))
        path.unlink()
    return sorted({each for each in found if each is not None})


def cycles(bytes_copied: float, chip: Chip) -> int:
    """Return how many cycles of a TPU's core a copy takes, which has its part of the bandwidth."""
    clock = chip.bf16 / (2 * _MULTIPLIERS * chip.multiplier**2 * chip.cores)
    return round(bytes_copied * chip.cores / chip.bandwidth * clock)


def beside(
    schedules: Sequence[Schedule], steps: Mapping[str, Sequence[int]], chip: Chip
) -> list[dict[str, Any]]:
    """Set schedules beside the cycles that the copies of a step take, where these are known.

    Args:
      schedules: of the kernels of a pass.
      steps: bytes that a step copies, of each kernel of a name, in their order.
      chip: a TPU.
    """
    found = []
    for name in dict.fromkeys(each.kernel for each in schedules):
        alike = [each for each in schedules if each.kernel == name]
        known = steps.get(name, ())
        copies = (
            [cycles(n, chip) for n in known] if len(known) == len(alike) else [None] * len(alike)
        )
        found += [
            {"kernel": name, "bundles": each.bundles, "cycles": copy}
            for each, copy in zip(alike, copies, strict=True)
        ]
    return found


def cell(record: Mapping[str, Any]) -> str:
    """Write bundles / cycles of each kernel of a record."""
    pairs = ((each["bundles"], each["cycles"]) for each in record.get("bundles", ()))
    texts = [f"{bundles}/{'n/a' if cycles is None else cycles}" for bundles, cycles in pairs]
    return " ".join(texts) or "n/a"
