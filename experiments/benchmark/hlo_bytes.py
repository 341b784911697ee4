"""Count the bytes that an optimised program moves, where the compiler gives no estimate.

Every operation outside a fusion reads its operands and writes its result; a fusion reads of an
operand only the slices that it takes, and writes of a result that it updates in place only the
update. Loop bodies are counted once. Caches are not modelled.
"""

import math
import re
from typing import NamedTuple

_WIDTHS = {"pred": 1, "bf16": 2, "f8e4m3fn": 1, "f8e5m2": 1}
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*?)\)(.*)$")
_FUSED = re.compile(r"\b(?:calls|to_apply)=%?([\w.-]+)")
# These name or group arrays and move nothing.
_FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "iota", "while",
    "conditional", "call", "after-all", "partition-id", "replica-id",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand is the update


class _Operation(NamedTuple):
    name: str
    bytes: int
    kind: str
    operands: list[str]
    rest: str
    is_root: bool
    text: str


def _size(shapes: str) -> int:
    total = 0
    for kind, dims in _ARRAY.findall(shapes):
        bits = re.search(r"\d+", kind)
        width = _WIDTHS.get(kind) or (int(bits[0]) // 8 if bits else 0)
        total += width * math.prod(int(n) for n in dims.split(",") if n)
    return total


def _parse(text: str) -> dict[str, list[_Operation]]:
    computations: dict[str, list[_Operation]] = {}
    current: list[_Operation] = []
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            current = computations.setdefault(opened[1], [])
        elif found := _OPERATION.match(line):
            root, name, shapes, kind, inside, rest = found.groups()
            operands = re.findall(r"%([\w.-]+)", inside)
            current.append(
                _Operation(name, _size(shapes), kind, operands, rest, bool(root), inside)
            )
    return computations


def _fusion(fused: list[_Operation], operands: list[int], result: int) -> int:
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
            total += operands[int(op.text)]
    updates = [op for op in fused if op.kind in _UPDATES and op.bytes == result]
    if updates:
        return total + sum(sizes.get(op.operands[_UPDATES[op.kind]], 0) for op in updates)
    return total + result


def bytes_moved(text: str) -> float | None:
    """Count the bytes that a program moves; None if it has no operation that moves any."""
    computations = _parse(text)
    inner = {
        name for ops in computations.values() for op in ops for name in _FUSED.findall(op.rest)
    }
    total = 0
    for name, operations in computations.items():
        if name in inner:
            continue
        sizes = {op.name: op.bytes for op in operations}
        for op in operations:
            reads = [sizes.get(operand, 0) for operand in op.operands]
            called = _FUSED.findall(op.rest)
            if op.kind == "fusion" and called:
                total += _fusion(computations.get(called[0], []), reads, op.bytes)
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
    return float(total) or None
