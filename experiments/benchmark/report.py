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
    f"{'operation':18} {'pass':8} {'shape':22} {'backend':9} {'error':>8} {'largest':>8} "
    f"{'time':>10} "
    f"{'TFLOP/s':>8} {'GB/s':>8} {'of limit':>8} {'of copy':>8}  times as fast as"
)
RATES = ("tflops", "gbps")
TIMES_NOTES = """
FLOPs and bytes are the least that the operation needs, so rates fall where work is done in vain. of
limit: the time that the device's peak FLOP/s and bandwidth allow, over the time taken; of copy: the
rate of bytes over that of a large copy in the same run. error: the norm of the difference from the
reference over the norm; of the reference itself, from the nearest peer. largest: the largest
difference over the largest value. dense: as many FLOPs for as
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
    if here.chip is not None:
        peak, bandwidth = here.chip.bf16 / 1e12, here.chip.bandwidth / 1e9
        known = f"peak {peak:.0f} TFLOP/s and {bandwidth:.0f} GB/s"
    return f"{here.kind}: {known}, copies at {here.copying / 1e9:.0f} GB/s; jax {jax.__version__}"


def times_line(record: Mapping[str, Any]) -> str:
    """Lay out what was measured of one pass."""

    def share(name: str) -> str:
        return f"{record[name]:8.1%}" if name in record else f"{'n/a':>8}"

    def number(name: str) -> str:
        return f"{record[name]:.1e}" if name in record else "n/a"

    head = (
        f"{record['operation']:18} {record['pass']:8} {record['shape']:22} {record['backend']:9} "
        f"{number('relative_error'):>8} {number('largest_error'):>8}"
    )
    if "seconds" not in record:
        return f"{head} {'-':>10}"
    rates = [
        f"{record[name]:8.1f}" if name in record else f"{'n/a':>8}" for name in ("tflops", "gbps")
    ]
    ratios = [f"{name} {ratio:.2f}" for name, ratio in record.get("ratios", {}).items()]
    ratios += [f"{name}: does not run" for name in record.get("peers_not_run", ())]
    return (
        f"{head} {duration(record['seconds']):>10} {' '.join(rates)} "
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


def append_record(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Append a line of JSON with the date and the version of jax; it is on disk when this ends."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**_stamp(), **record}) + "\n")


def keep(path: str | os.PathLike | None, device: str, record: Mapping[str, Any]) -> None:
    """Print what was measured of one pass, after appending it to a file if one is named."""
    if path:
        append_record(path, {"device": device, **record})
    print("\n".join([times_line(record), *fault_lines(record)]), flush=True)


def _stamp() -> dict[str, str]:
    return {"date": time.strftime("%Y-%m-%d"), "jax": jax.__version__}


def write_json(path: str | os.PathLike, value: Mapping[str, Any]) -> None:
    """Write a file that appears when it is complete, with the date and the version of jax."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    stamped = {**_stamp(), **value}
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(json.dumps(stamped, indent=1) + "\n", encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
