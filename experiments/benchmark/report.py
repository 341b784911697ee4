"""How benchmarks tell what they found: lines of a table, and a file that is whole or not there."""

import json
import os
import pathlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from experiments.benchmark.timing import Machine

TIMES_HEADER = (
    f"{'operation':18} {'pass':8} {'shape':22} {'backend':9} {'error':>8} {'time':>10} "
    f"{'TFLOP/s':>8} {'GB/s':>8} {'of limit':>8} {'of copy':>8}  times as fast as"
)
TIMES_NOTES = """
FLOPs and bytes are the least that the operation needs, so rates fall where work is done in vain. of
limit: the time that the device's peak FLOP/s and bandwidth allow, over the time taken; of copy: the
rate of bytes over that of a large copy in the same run. error: the norm of the difference from the
reference over the norm; of the reference itself, from the nearest peer. dense: as many FLOPs for as
many rows, all with one expert's matrices."""


def duration(seconds: float) -> str:
    """Write a time with a fitting unit."""
    for unit, size in (("s ", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3f} {unit}"
    return f"{seconds * 1e6:.1f} us"


def machine_line(here: Machine) -> str:
    """Describe the device in one line."""
    known = "limits unknown"
    if here.limits is not None:
        known = (
            f"peak {here.limits.flops / 1e12:.0f} TFLOP/s and "
            f"{here.limits.bandwidth / 1e9:.0f} GB/s"
        )
    return f"{here.kind}: {known}, copies at {here.copying / 1e9:.0f} GB/s; jax {jax.__version__}"


def times_line(record: Mapping[str, Any]) -> str:
    """Lay out what was measured of one pass."""

    def share(name: str) -> str:
        return f"{record[name]:8.1%}" if name in record else f"{'n/a':>8}"

    error = record.get("relative_error")
    head = (
        f"{record['operation']:18} {record['pass']:8} {record['shape']:22} {record['backend']:9} "
        f"{'n/a' if error is None else f'{error:.1e}':>8}"
    )
    if "tflops" not in record:
        return f"{head} {'-':>10}"
    ratios = [f"{name} {ratio:.2f}" for name, ratio in record["ratios"].items()]
    ratios += [f"{name}: does not run" for name in record["peers_not_run"]]
    return (
        f"{head} {duration(record['seconds']):>10} {record['tflops']:8.2f} {record['gbps']:8.1f} "
        f"{share('of_limit')} {share('of_copying')}  {', '.join(ratios)}"
    )


def fault_lines(record: Mapping[str, Any]) -> Iterable[str]:
    """Say what is wrong with one pass."""
    where = " ".join(str(record[name]) for name in ("operation", "pass", "shape"))
    return [f"FAULT {record.get('chip', '')} {where}: {fault}" for fault in record["faults"]]


def together(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the shapes and the records of several runs."""
    found: dict[str, Any] = {"shapes": {}, "records": []}
    for part in parts:
        found["shapes"] |= part["shapes"]
        found["records"] += part["records"]
    return found


def write_json(path: str | os.PathLike, value: Mapping[str, Any]) -> None:
    """Write a file that appears when it is complete, with the date and the version of jax."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    stamped = {"date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, **value}
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(json.dumps(stamped, indent=1) + "\n", encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
