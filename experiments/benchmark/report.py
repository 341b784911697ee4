"""How benchmarks tell what they found: tables, faults, and files that are whole or not there."""

import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from experiments.benchmark.timing import Machine

Record = Mapping[str, Any]


class Column(NamedTuple):
    """A column: its title, where in a record its value stands, how it is aligned, how written.

    "figures.scratch" leads to that figure, an empty path to the record itself. A number is divided
    by its unit; a function in its place writes any value.
    """

    title: str
    path: str
    align: str = ">9"
    unit: float | Callable[[Any], str] = 1.0

    def value(self, record: Record) -> Any:
        """Return what stands in a record, None if it has no such thing."""
        value: Any = record
        for name in filter(None, self.path.split(".")):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def cell(self, record: Record) -> str:
        """Write what stands in a record."""
        value = self.value(record)
        if value is None:
            value = "n/a"
        elif callable(self.unit):
            value = self.unit(value)
        elif not isinstance(value, str):
            value = f"{value / self.unit:.4g}"
        return format(value, self.align)


def texts(widths: str) -> tuple[Column, ...]:
    """Return columns of text, titled as a record has them: "shape:22 pass:8"."""
    pairs = (each.split(":") for each in widths.split())
    return tuple(Column(name, name, f"<{width}") for name, width in pairs)


class Table(NamedTuple):
    """Columns that say what a record is about, columns of what was found, and how to read those."""

    names: tuple[Column, ...]
    values: tuple[Column, ...]
    notes: str

    def header(self) -> str:
        """Write the titles."""
        return " ".join(format(each.title, each.align) for each in (*self.names, *self.values))

    def line(self, record: Record) -> str:
        """Lay a record out; one in which nothing was found says why."""
        cells = [column.cell(record) for column in self.names]
        if any(column.path and column.value(record) is not None for column in self.values):
            cells += [column.cell(record) for column in self.values]
        else:
            cells.append(record.get("skipped") or ("FAULT" if record["faults"] else "-"))
        return " ".join(cells).rstrip()

    def show[R: Record](self, records: Iterable[R]) -> list[R]:
        """Print each record with what is wrong as soon as it is known; return them all."""
        shown: list[R] = []
        for record in records:
            head = [] if shown else [self.header()]
            print("\n".join([*head, self.line(record), *fault_lines(record)]), flush=True)
            shown.append(record)
        print(f"\n{self.notes}" if shown else "nothing to do")
        return shown


def fault_lines(record: Record) -> list[str]:
    """Say what is wrong with what a record is about."""
    names = ("target", "operation", "name", "pass", "shape", "mesh", "transport")
    where = " ".join(str(record[name]) for name in names if name in record)
    return [f"FAULT {where}: {fault}" for fault in record["faults"]]


def conclude(found: Mapping[str, Any], path: str | os.PathLike | None) -> None:
    """Keep what was found in a file if one is named.

    Raises:
      ValueError: some record has faults.
    """
    if path:
        write_json(path, found)
    records = found["records"]
    count = sum(bool(record["faults"]) for record in records)
    if count:
        raise ValueError(f"{count} of {len(records)} have faults; see above.")


def appended[R: Record](
    path: str | os.PathLike | None, device: str, records: Iterable[R]
) -> Iterator[R]:
    """Append each record, if a file is named, as a line of JSON that is on disk at once."""
    for record in records:
        if path:
            target = pathlib.Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**_stamp(), "device": device, **record}) + "\n")
        yield record


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


def machine_line(here: Machine) -> str:
    """Describe the device in one line."""
    known = "limits unknown"
    if here.chip is not None:
        peak, bandwidth = here.chip.bf16 / 1e12, here.chip.bandwidth / 1e9
        known = f"peak {peak:.0f} TFLOP/s and {bandwidth:.0f} GB/s"
    return f"{here.kind}: {known}, copies at {here.copying / 1e9:.0f} GB/s; jax {jax.__version__}"


def duration(seconds: float) -> str:
    """Write a time with a fitting unit."""
    for unit, size in (("s ", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3f} {unit}"
    return f"{seconds * 1e6:.1f} us"


def _beside(record: Record) -> str:
    ratios = [f"{name} {ratio:.2f}" for name, ratio in record.get("ratios", {}).items()]
    return ", ".join([*ratios, *(f"{n}: does not run" for n in record.get("peers_not_run", ()))])


TIMES = Table(
    names=texts("operation:18 pass:8 shape:22 backend:9"),
    values=(
        Column("error", "relative_error", unit="{:.1e}".format),
        Column("largest", "largest_error", unit="{:.1e}".format),
        Column("time", "seconds", ">10", duration),
        Column("TFLOP/s", "tflops", unit="{:.1f}".format),
        Column("GB/s", "gbps", unit="{:.1f}".format),
        Column("of limit", "of_limit", unit="{:.1%}".format),
        Column("of copy", "of_copying", unit="{:.1%}".format),
        Column(" times as fast as", "", "<", _beside),
    ),
    notes="""\
FLOPs and bytes are the least that the operation needs, so rates fall where work is done in vain. of
limit: the time that the device's peak FLOP/s and bandwidth allow, over the time taken; of copy: the
rate of bytes over that of a large copy in the same run. error: the norm of the difference from the
reference over the norm; of the reference itself, from the nearest peer. largest: the largest
difference over the largest value. dense: as many FLOPs for as many rows, all with one expert's
matrices.""",
)

FIGURES = (
    Column("args GB", "figures.arguments", unit=1e9),
    Column("scratch", "figures.scratch", unit=1e9),
    Column("peak", "figures.peak", unit=1e9),
    Column("GFLOP", "figures.flops", unit=1e9),
    Column("GB moved", "figures.bytes", unit=1e9),
    Column("VMEM MiB", "figures.vmem", unit=2**20),
    Column("SMEM KiB", "figures.smem", unit=2**10),
    Column("compile s", "figures.seconds", unit="{:.0f}".format),
)
"""The columns of whatever is compiled: `figures.Figures`."""

FIGURES_NOTES = """\
Per device. args: weights, cache, inputs; scratch: what a program needs besides; peak: most bytes
alive at a time; all in GB. GFLOP and GB moved count every loop body once, and a kernel as it says
of itself; on GPUs, whose compiler estimates nothing, they are what kernels say, other matrix
products, and what other operations read and write. VMEM: the most that a kernel uses at a time;
SMEM: scalars of TPU kernels, shared memory of a block of threads on GPUs, as kernels declare them.
"""
