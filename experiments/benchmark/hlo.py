"""What the text of an optimised program tells: the bytes that it moves, products, collectives.

Loop bodies are counted once. Caches are not modelled.
"""

import collections
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip

_WIDTHS = {"pred": 1, "bf16": 2, "f8e4m3fn": 1, "f8e5m2": 1}
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*?)\)(.*)$")
_SPACE = re.compile(r"S\((\d+)\)")
_FUSED = re.compile(r"\b(?:calls|to_apply)=%?([\w.-]+)")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]')
# These name or group arrays and move nothing.
_FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "iota", "while",
    "conditional", "call", "after-all", "partition-id", "replica-id",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand is the update


class Operation(NamedTuple):
    """A line of a program: its result's name, what it does, and to what.

    `bytes` are those of the result, `dims` of the first one if there are several; `inside` is what
    stands between the brackets, `rest` what follows them. `space` is the memory that the result is
    in, as XLA numbers them: 0 is that of the device, HBM on TPUs.
    """

    name: str
    kind: str
    bytes: int
    dims: list[int]
    operands: list[str]
    inside: str
    rest: str
    space: int


Program = dict[str, list[Operation]]
"""The operations of each computation by its name."""


def parse(text: str) -> Program:
    """Read a program."""
    current: list[Operation] = []
    computations = {"": current}
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            current = computations.setdefault(opened[1], [])
        elif found := _OPERATION.match(line):
            name, shapes, kind, inside, rest = found.groups()
            arrays = [(dtype, _numbers(dims)) for dtype, dims in _ARRAY.findall(shapes)]
            size = sum(_width(dtype) * math.prod(dims) for dtype, dims in arrays)
            dims = arrays[0][1] if arrays else []
            operands = re.findall(r"%([\w.-]+)", inside)
            space = _SPACE.search(shapes)
            where = int(space[1]) if space else 0
            current.append(Operation(name, kind, size, dims, operands, inside, rest, where))
    return computations


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _width(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return _WIDTHS.get(dtype) or (int(bits[0]) // 8 if bits else 0)


def is_collective(op: Operation) -> bool:
    """Tell whether an operation is a collective, or begins one."""
    return op.kind.removesuffix("-start") in COLLECTIVES


def count_collectives(operations: Iterable[Operation]) -> dict[str, int]:
    """Count the collectives of each kind."""
    found = collections.Counter(op.kind.removesuffix("-start") for op in operations)
    return {kind: found[kind] for kind in COLLECTIVES if found[kind]}


def product_flops(program: Program) -> float:
    """Count the FLOPs of the matrix products that are no kernels."""
    total = 0.0
    for operations in program.values():
        dims = {op.name: op.dims for op in operations}
        for op in operations:
            summed = _CONTRACTED.search(op.rest)
            left = dims.get(op.operands[0]) if op.operands else None
            if op.kind in ("dot", "custom-call") and summed and left:
                depth = math.prod(left[axis] for axis in _numbers(summed[1]))
                total += 2.0 * math.prod(op.dims) * depth
    return total


def bytes_moved(program: Program) -> float:
    """Count the bytes that a program moves.

    Every operation outside a fusion reads its operands and writes its result; a fusion reads of an
    operand only the slices that it takes, and writes of a result that it updates in place only the
    update.
    """
    inner = {name for ops in program.values() for op in ops for name in _FUSED.findall(op.rest)}
    total = 0
    for name, operations in program.items():
        if name in inner:
            continue
        sizes = {op.name: op.bytes for op in operations}
        for op in operations:
            reads = [sizes.get(operand, 0) for operand in op.operands]
            called = _FUSED.findall(op.rest)
            if op.kind == "fusion" and called:
                total += _fusion(program.get(called[0], []), reads, op.bytes)
            elif op.kind in _UPDATES:
                total += 2 * reads[_UPDATES[op.kind]]
            elif op.kind.endswith("-start"):
                continue
            elif op.kind.endswith("-done"):
                total += op.bytes
            elif op.kind in _SLICES:
                total += 2 * op.bytes
            elif op.kind not in _FREE:
                total += op.bytes + sum(reads)
    return float(total)


def _fusion(fused: list[Operation], operands: list[int], result: int) -> int:
    """Count what a fusion moves, given the sizes of its operands and of its result."""
    total = 0
    sizes = {op.name: op.bytes for op in fused}
    for op in fused:
        if op.kind != "parameter":
            continue
        names = {op.name}  # of the same bytes in other shapes
        for other in fused:
            if other.kind == "bitcast" and names & set(other.operands):
                names.add(other.name)
        uses = [use for use in fused if use.kind != "bitcast" and names & set(use.operands)]
        if uses and all(use.kind in _SLICES and use.operands[0] in names for use in uses):
            total += sum(use.bytes for use in uses)
        elif not any(use.kind in _UPDATES and use.operands[0] in names for use in uses):
            total += operands[int(op.inside)]
    updates = [op for op in fused if op.kind in _UPDATES and op.bytes == result]
    if updates:
        return total + sum(sizes.get(op.operands[_UPDATES[op.kind]], 0) for op in updates)
    return total + result
