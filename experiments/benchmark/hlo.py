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
_SAID = re.compile(r'bytes_accessed(?:\\22|")?: ?"?(\d+)')
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_ALIASED = re.compile(r"\{[\d, ]*\}: \((\d+), \{")  # the parameter whose place a result takes
_PARTS = ("body", "condition")
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
    """Count the bytes that a program moves, every loop body once.

    Every operation outside a fusion reads its operands and writes its result; a fusion reads of an
    operand only the slices that it takes, and writes of a result that it updates in place only the
    update.
    """
    inner, total = _fused(program), 0.0
    for name, operations in program.items():
        sizes = {op.name: op.bytes for op in operations}
        if name not in inner:
            total += sum(_moved(program, op, sizes) for op in operations)
    return total


def bytes_of_run(program: Program, entry: str) -> float:
    """Count the bytes that one run of a program moves to and from the memory of the device.

    A loop body counts as often as it runs, where the program says so, a branch as the cheapest of
    its alternatives, and a kernel as it says of itself. Arrays in other memories cost nothing.
    """
    known: dict[str, float] = {}

    def cost(name: str) -> float:
        if name not in known:
            operations = program.get(name, [])
            sizes = {op.name: 0 if op.space else op.bytes for op in operations}
            known[name] = sum(run(op, sizes) for op in operations)
        return known[name]

    def run(op: Operation, sizes: dict[str, int]) -> float:
        if op.kind == "while":
            body, condition = (re.search(rf"{w}=%?([\w.-]+)", op.rest) for w in _PARTS)
            assert body and condition
            return _trips(program, op, condition[1]) * (cost(body[1]) + cost(condition[1]))
        if op.kind == "conditional":
            return min(cost(name) for name in _branches(op.rest))
        if op.kind == "call":
            return sum(cost(name) for name in _FUSED.findall(op.rest))
        said = _SAID.search(op.rest)
        if op.kind == "custom-call" and said:
            return float(said[1])
        return _moved(program, op._replace(bytes=sizes[op.name]), sizes)

    return cost(entry)


def copies_of_kept(text: str, program: Program) -> tuple[str, ...]:
    """Name operations that copy pages of a donated array: those of a layer, or of all of them.

    A donated array is [layers, pages, .., slots, features]. What updates it in place, and kernels,
    which read it where it is, are no copies.
    """
    entry = next((ops for name, ops in program.items() if name == entry_of(text)), [])
    parameters = {op.inside: op for op in entry if op.kind == "parameter"}
    header = text.partition("\n")[0]
    kept = [parameters[n] for n in _ALIASED.findall(header) if n in parameters]
    kept = [op for op in kept if len(op.dims) >= 4]
    return tuple(
        f"{op.name} makes {op.bytes:,} bytes of pages"
        for name, operations in program.items()
        if name not in _fused(program)
        for op in operations
        if not (op.kind in _FREE | _UPDATES.keys() | {"custom-call"} or op.kind.endswith("-start"))
        and any(
            op.dims[-2:] == each.dims[-2:] and op.bytes * each.dims[0] >= each.bytes
            for each in kept
        )
        and not _updates_in_place(program, op)
    )


def _updates_in_place(program: Program, op: Operation) -> bool:
    called = [each for name in _FUSED.findall(op.rest) for each in program.get(name, [])]
    return any(each.kind in _UPDATES and each.bytes >= op.bytes for each in called)


def entry_of(text: str) -> str:
    """Return the name of the computation in which a program begins."""
    found = re.search(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)
    return found[1] if found else ""


def _fused(program: Program) -> set[str]:
    return {name for ops in program.values() for op in ops for name in _FUSED.findall(op.rest)}


def _trips(program: Program, loop: Operation, condition: str) -> int:
    """Return how often a loop runs: as it says, or up to the one constant that ends it; else 1."""
    if said := _TRIPS.search(loop.rest):
        return int(said[1])
    ends = [op.inside for op in program.get(condition, []) if op.kind == "constant"]
    return int(ends[0]) if len(ends) == 1 and ends[0].isdigit() else 1


def _branches(rest: str) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
    text = listed[1] if listed else " ".join(re.findall(r"(?:true|false)_computation=(\S+)", rest))
    return re.findall(r"[\w.-]+", text)


def _moved(program: Program, op: Operation, sizes: dict[str, int]) -> float:
    """Count what an operation moves, given the sizes of its operands."""
    reads = [sizes.get(operand, 0) for operand in op.operands]
    called = _FUSED.findall(op.rest)
    if op.kind == "fusion" and called:
        return _fusion(program, called[0], reads, op.bytes)
    if op.kind in _UPDATES:
        return 2 * reads[_UPDATES[op.kind]]
    if op.kind == "fusion-start" and called:  # of its result, what ends it is the writing
        return _fusion(program, called[0], reads, 0)
    if op.kind.endswith("-start"):
        return 0
    if op.kind.endswith("-done"):
        return op.bytes
    if op.kind in _SLICES:
        return 2 * op.bytes
    return 0 if op.kind in _FREE else op.bytes + sum(reads)


def _fusion(program: Program, name: str, operands: list[int], result: int) -> int:
    """Count what a fusion moves, given the sizes of its operands and of its result."""
    fused = program.get(name, [])
    total = sum(_read(program, name, i, size) for i, size in enumerate(operands))
    sizes = {op.name: op.bytes for op in fused}
    updates = [op for op in fused if op.kind in _UPDATES and op.bytes == result]
    if updates:
        return total + sum(sizes.get(op.operands[_UPDATES[op.kind]], 0) for op in updates)
    return total + result


def _read(program: Program, name: str, index: int, size: int) -> int:
    """Count what a fusion reads of one operand: all of it, unless it only takes slices."""
    fused = program.get(name, [])
    names = {op.name for op in fused if op.kind == "parameter" and op.inside == str(index)}
    total = 0
    for op in fused:
        places = [i for i, operand in enumerate(op.operands) if operand in names]
        if not places:
            continue
        called = _FUSED.findall(op.rest)
        if op.kind == "bitcast":  # the same bytes in another shape
            names.add(op.name)
        elif op.kind in _SLICES and places == [0]:
            total += op.bytes
        elif op.kind == "fusion" and called:
            total += sum(_read(program, called[0], i, size) for i in places)
        elif op.kind not in _UPDATES or places != [0]:
            return size
    is_passed_on = bool(fused) and fused[-1].name in names
    return size if is_passed_on else min(total, size)
