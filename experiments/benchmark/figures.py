"""What the compiler of a program says of it, as figures of one device."""

import dataclasses
import json
import math
import pathlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from experiments.benchmark import hlo
from experiments.benchmark.topologies import Target

GB = 1_000_000_000
FAILURES = (jax.errors.JaxRuntimeError, NotImplementedError, ValueError)
"""What a program raises that the compiler or a kernel refuses, or that does not fit a device."""

_SCOPED = re.compile(r'"used_scoped_memory_configs":(\[[^\]]*\])')
_COST = re.compile(r'cost_estimate_json = "(\{.*?\})"')
_GPU_KERNEL = "mosaic_gpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of one device.

    Memory is the compiler's own plan. Work is its estimate, in which a kernel counts as it says of
    itself and every loop body once. XLA:GPU makes none: there it is what kernels say, the matrix
    products of the rest, and the bytes that the operations of the rest read and write.

    Attributes:
      arguments: bytes of weights, cache and inputs.
      scratch: bytes that the program needs besides.
      peak: most bytes alive at a time.
      flops: floating-point operations; None if unknown.
      bytes: read and written; None if unknown.
      moved: bytes to and from the device's memory in one run, every loop counted as often as it
        runs, where that is known, and the cheapest of alternatives.
      copied: what copies pages of a donated array; a cache, where there is one.
      declared: of `bytes`, what kernels say that they move; None if there are no kernels.
      vmem, smem: most bytes that one of its kernels uses; 0 if there is none.
      collectives: how many of each kind stand in the program.
      strayed: what kernels copy from HBM, as they declare, and the compiler has put elsewhere.
      in_group: how many of them stand in the loop over groups of layers.
      instructions: size of the program.
      seconds: to compile.
    """

    arguments: int
    scratch: int
    peak: int
    flops: float | None
    bytes: float | None
    moved: float
    copied: tuple[str, ...]
    declared: float | None
    vmem: int
    smem: int
    strayed: tuple[str, ...]
    collectives: dict[str, int]
    in_group: int
    instructions: int
    seconds: float


def compile_traced(traced: jax.stages.Traced, text: pathlib.Path | None = None) -> Figures:
    """Compile a program and read its figures; keep what it was optimised to in a file if named."""
    lowered = traced.lower()
    start = time.monotonic()
    executable = lowered.compile()
    spent = time.monotonic() - start
    if text is not None:
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(executable.as_text() or "", encoding="utf-8")
    return read(executable, traced.jaxpr.jaxpr, seconds=spent)


def read(executable: jax.stages.Compiled, jaxpr: Any, *, seconds: float) -> Figures:
    """Read the figures of a compiled program, of which the jaxpr tells what its kernels declare."""
    memory, text = executable.memory_analysis(), executable.as_text() or ""
    if memory is None:
        raise ValueError("the compiler tells nothing about memory; use another version of it.")
    program = hlo.parse(text)
    operations = [op for ops in program.values() for op in ops]
    said = said_by_gpu_kernels(text)
    cost = executable.cost_analysis() or counted(program, said)
    scoped = [each for found in _SCOPED.findall(text) for each in json.loads(found)]
    return Figures(
        arguments=memory.argument_size_in_bytes,
        scratch=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        flops=cost.get("flops"),
        bytes=cost.get("bytes accessed"),
        moved=hlo.bytes_of_run(program, hlo.entry_of(text)),
        copied=hlo.copies_of_kept(text, program),
        declared=sum(e["bytes_accessed"] for e in said) if said else declared_bytes(jaxpr),
        vmem=max((int(each["size"]) for each in scoped if each["memory_space"] == "1"), default=0),
        smem=declared_smem(jaxpr),
        strayed=strayed(program, jaxpr),
        collectives=hlo.count_collectives(operations),
        in_group=sum(hlo.is_collective(op) and "/slot_" in op.rest for op in operations),
        instructions=len(operations),
        seconds=seconds,
    )


def failed(record: dict[str, Any], error: Exception) -> dict[str, Any]:
    """Return the record of a program that does not compile."""
    return {**record, "faults": [f"does not compile: {str(error)[:500]}"]}


def said_by_gpu_kernels(text: str) -> list[dict[str, float]]:
    """Return what each kernel of a GPU program says of itself."""
    return [json.loads(found.replace(r"\22", '"')) for found in _COST.findall(text)]


def counted(program: hlo.Program, said: list[dict[str, float]]) -> Mapping[str, float]:
    """Count the work of a GPU program: what its kernels say of themselves, and the rest."""
    rest = {
        name: [op for op in operations if _GPU_KERNEL not in op.rest]
        for name, operations in program.items()
    }
    return {
        "flops": hlo.product_flops(rest) + sum(each["flops"] for each in said),
        "bytes accessed": hlo.bytes_moved(rest) + sum(each["bytes_accessed"] for each in said),
    }


def _inside(equation: Any) -> Iterator[Any]:
    """Yield the programs that an equation has for parameters."""

    def inner(value: Any) -> Iterator[Any]:
        if isinstance(value, tuple | list):
            for each in value:
                yield from inner(each)
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr
        elif hasattr(value, "eqns"):
            yield value

    for value in equation.params.values():
        yield from inner(value)


def declared_smem(jaxpr: Any) -> int:
    """Return the most bytes of SMEM that a kernel in a program declares."""

    def own(variables: Any) -> int:
        total = 0
        for variable in variables:
            space = getattr(variable.aval, "memory_space", None)
            dtype = getattr(variable.aval, "dtype", None)
            if str(space).lower() == "smem" and hasattr(dtype, "itemsize"):
                total += math.prod(variable.aval.shape) * dtype.itemsize
        return total

    most = 0
    for equation in jaxpr.eqns:
        for body in _inside(equation):
            declares = equation.primitive.name in ("run_scoped", "pallas_call")
            most = max(most, declared_smem(body) + (own(body.invars) if declares else 0))
    return most


def declared_bytes(jaxpr: Any) -> float | None:
    """Return the bytes that the TPU kernels of a program say they move; None without any."""
    found = []
    for equation in jaxpr.eqns:
        cost = equation.params.get("cost_estimate")
        if equation.primitive.name == "pallas_call":
            found.append(None if cost is None else float(cost.bytes_accessed))
        else:
            found += [declared_bytes(body) for body in _inside(equation)]
    said = [each for each in found if each is not None]
    return sum(said) if said else None


def _kernels(jaxpr: Any) -> Iterator[Any]:
    """Yield the equations that are TPU kernels."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for body in _inside(equation):
                yield from _kernels(body)


def _in_hbm(kernel: Any) -> list[bool]:
    """Tell of each operand of a kernel whether it is declared to be in HBM."""
    mapping = kernel.params["grid_mapping"]
    inputs = mapping.block_mappings[: mapping.num_inputs]
    spaces = [str(block.transformed_block_aval.memory_space) for block in inputs]
    before = len(kernel.invars) - len(spaces)  # bounds of the grid, and scalars
    return [False] * before + [space == "hbm" for space in spaces]


def strayed(program: hlo.Program, jaxpr: Any) -> tuple[str, ...]:
    """Name the operands that kernels declare to be in HBM and that XLA has put elsewhere.

    What is copied from VMEM to VMEM arrives in order, not beside the arithmetic, and on v4 wrongly.
    """
    # One without a name, as peers have, may be any that reads as many operands.
    declared = [(kernel.params["name"] or "", _in_hbm(kernel)) for kernel in _kernels(jaxpr)]
    found = []
    for operations in program.values():
        spaces = {op.name: op.space for op in operations}
        for op in operations:
            if 'custom_call_target="tpu_custom_call"' not in op.rest:
                continue
            # A transformation writes itself around the name of a kernel.
            alike = [(n, o) for n, o in declared if n in op.name and len(o) == len(op.operands)]
            if not alike:
                found.append(f"what {op.name} reads is not known")
            longest = max((name for name, _ in alike), key=len, default="")
            same = [operands for name, operands in alike if name == longest]
            found += [
                f"{operand} of {op.name} is in memory space {spaces[operand]}"
                for operand, *is_in_hbm in zip(op.operands, *same, strict=True)
                if any(is_in_hbm) and spaces.get(operand, 0)
            ]
    return tuple(found)


def memory_faults(found: Figures, target: Target, scratch: float = math.inf) -> Iterator[str]:
    """Yield what is wrong with the memory of a program that may need so much scratch at most."""
    needed = max(found.peak, found.arguments + found.scratch)
    if needed > target.memory:
        yield f"needs {needed / GB:.1f} GB of the device's {target.memory / GB:.1f}"
    if found.scratch > scratch:
        yield (
            f"needs {found.scratch / GB:.2f} GB of scratch memory where {scratch / GB:.2f} should "
            "do: look for copies of weights or of the cache"
        )
    yield from (f"{each}, and its kernel copies it from HBM" for each in found.strayed)
