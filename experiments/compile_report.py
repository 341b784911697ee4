"""What a compiled program tells about itself, as figures, as a line of a table, as faults."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import jax

from experiments.benchmark.hlo_bytes import bytes_moved
from experiments.benchmark.programs import Program
from experiments.benchmark.topologies import Target

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip

NOTES = """
Per device. args: weights, cache, inputs; peak: most bytes alive at a time. GFLOP and GB moved count
every loop body once: one of the groups of 4 layers, one block of queries in long attention, and of
the routed experts one block of rows, whose number is known at run time only. GFLOP of GPUs are the
matrix products of the program, their bytes those that its operations read and write. Collectives:
all that stand in the program (those in the loop over groups of layers, which repeats them). ar
all-reduce, ag all-gather, rs reduce-scatter, aa all-to-all, cp collective-permute."""

HEADER = (
    f"{'target':6} {'program':13} {'layers':>6} {'mesh':18} {'preset':12} {'args GB':>8} "
    f"{'scratch':>8} {'peak':>7} {'GFLOP':>9} {'GB moved':>8}  {'collectives':27} {'compile s':>9}"
)
_SHORT = dict(zip(COLLECTIVES, ("ar", "ag", "rs", "aa", "cp"), strict=True))

_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?([\w.-]+) = \(?(\w+)\[([\d,]*)\][^=]*? ([\w-]+)\(([^)]*)\)(.*)"
)
_COLLECTIVE = re.compile(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of one device.

    Attributes:
      arguments: bytes of weights, cache and inputs.
      scratch: bytes the program needs besides.
      peak: most bytes alive at a time.
      flops: floating-point operations, every loop body counted once; None if unknown.
      bytes_moved: bytes read and written, every loop body counted once; None if unknown.
      collectives: how many of each kind stand in the program.
      in_group: how many of them stand in the loop over groups of layers.
      instructions: size of the program.
      seconds: time to compile.
    """

    arguments: int
    scratch: int
    peak: int
    flops: float | None
    bytes_moved: float | None
    collectives: dict[str, int]
    in_group: int
    instructions: int
    seconds: float


def read(compiled: jax.stages.Compiled, *, seconds: float) -> Figures:
    """Read the figures of a compiled program.

    Memory is the compiler's own plan and covers the whole program. Work is the compiler's estimate
    on TPUs; XLA:GPU makes none, so that FLOPs are those of the matrix products in its program and
    bytes those that its operations read and write.
    """
    text = compiled.as_text() or ""
    memory = compiled.memory_analysis()
    if memory is None:
        raise ValueError("the compiler tells nothing about memory; use another version of it.")
    cost = compiled.cost_analysis() or {}
    found = [(match[1], line) for line in text.splitlines() if (match := _COLLECTIVE.search(line))]
    kinds = collections.Counter(kind for kind, _ in found)
    return Figures(
        arguments=memory.argument_size_in_bytes,
        scratch=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        flops=cost.get("flops") or product_flops(text),
        bytes_moved=cost.get("bytes accessed") or bytes_moved(text),
        collectives={kind: kinds[kind] for kind in COLLECTIVES if kinds[kind]},
        in_group=sum("/slot_" in line for _, line in found),
        instructions=sum(_INSTRUCTION.match(line) is not None for line in text.splitlines()),
        seconds=seconds,
    )


def product_flops(text: str) -> float | None:
    """Count the FLOPs of the matrix products in an optimised program; None if there are none."""
    found = [m for m in map(_INSTRUCTION.match, text.splitlines()) if m]
    shapes = {m[1]: [int(n) for n in m[3].split(",") if n] for m in found}
    total = 0.0
    for match in found:
        contracted = _CONTRACTED.search(match[6])
        if match[4] not in ("dot", "custom-call") or not contracted:
            continue
        left = shapes.get(match[5].split(",")[0].split()[-1].lstrip("%"))
        dims = [int(n) for n in re.findall(r"\d+", contracted[1])]
        if left and shapes[match[1]]:
            total += 2.0 * math.prod(shapes[match[1]]) * math.prod(left[d] for d in dims)
    return total or None


def line(target: Target, program: Program, found: Figures) -> str:
    """Lay the figures of a program out as one line of the table."""
    kinds = " ".join(f"{_SHORT[kind]} {count}" for kind, count in found.collectives.items())
    work = [f"{n / 1e9:.4g}" if n else "n/a" for n in (found.flops, found.bytes_moved)]
    return (
        f"{target.name:6} {program.name:13} {program.layers:6} {program.mesh:18} "
        f"{program.preset:12} {found.arguments / 1e9:8.2f} {found.scratch / 1e9:8.2f} "
        f"{found.peak / 1e9:7.2f} {work[0]:>9} {work[1]:>8}  "
        f"{f'{kinds} ({found.in_group})' if kinds else 'none':27} {found.seconds:9.0f}"
    )


def faults(target: Target, program: Program, found: Figures) -> Iterator[str]:
    """Yield what is wrong with a program that compiles."""
    if found.peak > target.memory:
        yield f"needs {found.peak / 1e9:.1f} GB of the device's {target.memory / 1e9:.1f}"
    if found.scratch > program.scratch:
        yield (
            f"needs {found.scratch / 1e9:.2f} GB of scratch memory where "
            f"{program.scratch / 1e9:.2f} should do: look for copies of weights or cache in the "
            "program that --hlo writes"
        )


def growth(deep: Figures, shallow: Figures) -> Iterator[str]:
    """Yield a complaint if a deeper model makes a larger program or takes longer to compile."""
    if deep.instructions > 1.1 * shallow.instructions or deep.seconds > 3 * shallow.seconds + 30:
        yield (
            f"grows with depth: {deep.instructions} instructions in {deep.seconds:.0f} s, but "
            f"{shallow.instructions} in {shallow.seconds:.0f} s where it is shallow"
        )


def dearer(divided: Figures, whole: Figures) -> Iterator[str]:
    """Yield complaints if a program whose experts are divided costs more than the undivided one."""
    if divided.scratch > 1.3 * whole.scratch:
        yield (
            f"needs {divided.scratch / whole.scratch:.2f} times the scratch memory of undivided "
            "experts where 1.3 should do"
        )
    if divided.flops and whole.flops and divided.flops > 1.1 * whole.flops:
        yield (
            f"takes {divided.flops / whole.flops:.2f} times the FLOPs of undivided experts where "
            "1.1 should do"
        )
