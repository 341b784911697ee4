"""Compile the operations for chips that are not there, and judge what the compilers say of them.

A Pallas call enters a compiler's estimate with what the kernel says of itself, so that the figures
are also counted from the schedule of blocks (`schedule`), and a kernel that asserts other
bytes than it copies is a fault, as is one beyond its bounds.
"""

import dataclasses
import functools
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.layout import Format, Layout

from experiments.benchmark import report
from experiments.benchmark.cases import Bound, Case, one_pass
from experiments.benchmark.hlo_bytes import bytes_moved
from experiments.benchmark.schedule import Work
from experiments.benchmark.topologies import Target
from kernels_pallas import tuning

HONEST = 0.05  # relative error of a kernel's estimate of its bytes
CHIPS = ("v5e", "v5p", "v6e", "tpu7x", "h100")

HEADER = (
    f"{'chip':6} {'operation':18} {'pass':8} {'shape':22} {'blocks':>16} {'GFLOP':>9} "
    f"{'/floor':>6} {'in blocks':>9} {'GB':>8} {'/floor':>6} {'in blocks':>9} {'temp MB':>8} "
    f"{'VMEM KB':>8} {'SMEM KB':>8} {'s':>4}  peer: GFLOP, GB in blocks, temp MB, VMEM KB"
)
NOTES = """
GFLOP and GB: the compiler's figures, in which a kernel counts as it says of itself (on GPUs, whose
compiler estimates nothing, what the kernels say and the bytes of the operations around them). in
blocks: what the schedule of blocks multiplies and copies, counted from positions or from who goes
to which expert; bytes that kernels say must agree with that. VMEM: the most that a kernel uses at a
time, by the compiler; SMEM: scalars in TPU kernels, shared memory of a block of threads on GPUs, as
the kernel declares them.
Attention: the floor of FLOPs is that of visible pairs; of bytes, going forward, that each block of
queries reads the keys it needs and no others; going back, what its blocks copy. On GPUs a block
belongs to one head, so that the bytes of long attention are copies, most of which the L2 cache
serves. Splash estimates nothing; both its figures are in blocks.
Experts: the floor of bytes is matrices of experts that are hit, tokens, result, and hidden rows
each way, once. Kernels take no notice of who goes where when they say their FLOPs, six for a token,
D and F. What they multiply, in blocks, are whole chunks of rows (the number after the stroke, after
window x columns), about half a chunk more for each expert: with 128 experts twice the floor, in a
time that the bytes of their matrices decide. On GPUs what blocks in turn read from L2 is not
counted again. Megablox' figures are in blocks, too."""

_SCOPED = re.compile(r'"used_scoped_memory_configs":(\[[^\]]*\])')
_COST = re.compile(r'cost_estimate_json = "(\{.*?\})"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What a compiler says of one program.

    Attributes:
      flops, bytes: estimated; None where nobody says.
      declared: bytes that its kernels say they move; None if there are none.
      arguments, temp: bytes of memory.
      vmem, smem: most bytes that one of its kernels uses; 0 if there is none.
      seconds: to compile.
    """

    flops: float | None
    bytes: float | None
    declared: float | None
    arguments: int
    temp: int
    vmem: int
    smem: int
    seconds: float


def _on(device: jax.Device) -> Any:
    """Return a context in which kernels take the device for theirs: they ask the mesh in force."""
    return jax.sharding.use_abstract_mesh(jax.sharding.Mesh([device], ("device",)).abstract_mesh)


def abstract_pass(
    function: Callable, case: Case, direction: str, device: jax.Device
) -> tuple[Callable, tuple]:
    """Return the program of one pass, and its arguments without numbers.

    Raises:
      NotImplementedError: the function refuses these arrays there.
    """
    way = one_pass(function, case.wrt, direction)
    arrays = jax.eval_shape(case.build, jax.random.key(0))
    with _on(device):
        arguments = jax.eval_shape(way.prepare, arrays)
        jax.eval_shape(way.run, *arguments)
    return way.run, arguments


def compile_pass(run: Callable, arguments: tuple, device: jax.Device) -> Figures:
    """Compile one program for a device, its arrays laid out as it wants them, and read figures."""
    place = jax.sharding.SingleDeviceSharding(device)
    where = Format(Layout.AUTO, place) if device.platform == "tpu" else place
    with _on(device):
        traced = jax.jit(run, in_shardings=where, out_shardings=where).trace(*arguments)
        return compile_traced(traced, device.platform)


def compile_traced(traced: jax.stages.Traced, platform: str) -> Figures:
    """Compile a program that is traced for devices of a platform, and read figures."""
    lowered = traced.lower()
    start = time.monotonic()
    executable = lowered.compile()
    spent = time.monotonic() - start
    memory, text = executable.memory_analysis(), executable.as_text() or ""
    cost = executable.cost_analysis() or {}
    if platform == "gpu":
        cost = _gpu_cost(text)
    scoped = [each for found in _SCOPED.findall(text) for each in json.loads(found)]
    return Figures(
        flops=cost.get("flops"),
        bytes=cost.get("bytes accessed"),
        declared=cost.get("declared", declared_bytes(traced.jaxpr.jaxpr)),
        arguments=memory.argument_size_in_bytes if memory else 0,
        temp=memory.temp_size_in_bytes if memory else 0,
        vmem=max((int(each["size"]) for each in scoped if each["memory_space"] == "1"), default=0),
        smem=declared_smem(traced.jaxpr.jaxpr),
        seconds=spent,
    )


def _gpu_cost(text: str) -> dict[str, float]:
    """Add up what the kernels of a GPU program say of themselves, and the bytes of the rest."""
    said = [json.loads(found.replace(r"\22", '"')) for found in _COST.findall(text)]
    if not said:
        return {}
    rest = "\n".join(line for line in text.splitlines() if "mosaic_gpu" not in line)
    declared = sum(each["bytes_accessed"] for each in said)
    return {
        "flops": sum(each["flops"] for each in said),
        "bytes accessed": declared + (bytes_moved(rest) or 0),
        "declared": declared,
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


def judge(case: Case, direction: str, target: Target, found: Figures, work: Work | None):
    """Yield what is wrong with a pass that compiles."""
    if found.arguments + found.temp > target.memory:
        yield f"needs {(found.arguments + found.temp) / 1e9:.1f} GB of memory"
    if direction not in case.bounds or work is None:
        return
    bound, floor = case.bounds[direction].on(target.name), case.floors[direction].flops
    multiplied = bound.flops if bound.multiplied is None else bound.multiplied
    for name, source, value, least, most in (
        ("FLOPs", "estimate", found.flops, floor, bound.flops),
        ("FLOPs", "schedule", work.flops, floor, multiplied),
        ("bytes", "estimate", found.bytes, work.needed, bound.bytes),
        ("bytes", "schedule", work.bytes, work.needed, bound.bytes),
    ):
        if value is not None and value > most * least:
            yield f"{name} by {source} are {value / least:.3f} times the floor, over {most}"
    own = work.bytes - work.around
    if found.declared is not None and abs(found.declared - own) > HONEST * own:
        said = found.declared / 1e9
        yield f"says that it moves {said:.3f} GB, and its blocks are {own / 1e9:.3f} GB"


def judge_peers(bound: Bound, record: dict[str, Any]) -> Iterator[str]:
    """Yield which peers need too few bytes, by the compiler's figures or by their schedules."""
    for name, least in bound.peers.items():
        theirs = record["peers"].get(name)
        if theirs is None or record["work"] is None:
            continue
        if "fails" in theirs:
            yield f"{name}, to compare with, fails: {theirs['fails']}"
            continue
        for source, own, other in (
            ("estimate", record["figures"]["bytes"], theirs["bytes"]),
            ("schedule", record["work"]["bytes"], theirs["work"]["bytes"]),
        ):
            if other < least * own:
                yield f"{name} moves {other / own:.2f} times our bytes by {source}, under {least}"


def judge_beside(cases: list[Case], records: list[dict[str, Any]]) -> None:
    """Add faults to shapes that need too many FLOPs, by the compiler, beside another of the run."""
    found = {(r["chip"], r["shape"], r["pass"]): r for r in records if "figures" in r}
    bounds = {(case.shape, way): bound for case in cases for way, bound in case.bounds.items()}
    for (chip, shape, way), record in found.items():
        other, most = getattr(bounds.get((shape, way)), "beside", None) or (None, 0.0)
        beside, own = found.get((chip, other, way)), record["figures"]["flops"]
        if beside is None or own is None:
            continue
        ratio = own / beside["figures"]["flops"]
        if ratio > most:
            record["faults"].append(f"needs {ratio:.3f} times the FLOPs of {other}, over {most}")


def compile_case(case: Case, target: Target) -> Iterator[dict[str, Any]]:
    """Compile each pass of a case and its peers for a target, and yield the records."""
    device = target.devices(1)[0]
    for direction, floor in case.floors.items():
        record: dict[str, Any] = {
            "chip": target.name, "operation": case.operation, "pass": direction,
            "shape": case.shape, "floor": dataclasses.asdict(floor), "peers": {}, "faults": [],
        }  # fmt: skip
        try:
            with tuning.recorded() as blocks:
                backend, run, arguments = _own_pass(case, direction, device, record)
                size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments))
                if size > 0.9 * target.memory:
                    yield {**record, "skipped": f"{size / 1e9:.0f} GB of arrays do not fit"}
                    continue
                found = compile_pass(run, arguments, device)
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            yield {**record, "faults": [f"does not compile: {str(error)[:500]}"]}
            continue
        work = None
        if backend != "reference":
            with _on(device):
                work = case.work(direction, device.platform, blocks)
        record["figures"] = dataclasses.asdict(found)
        record["work"] = None if work is None else dataclasses.asdict(work)
        record["faults"] = list(judge(case, direction, target, found, work))
        for peer in case.peers:
            counted = None if peer.work is None else peer.work(direction)
            if device.platform not in peer.platforms or counted is None:
                continue
            try:
                theirs = compile_pass(
                    *abstract_pass(peer.function, case, direction, device), device
                )
                record["peers"][peer.name] = {
                    **dataclasses.asdict(theirs),
                    "work": dataclasses.asdict(counted),
                }
            except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
                record["peers"][peer.name] = {"fails": str(error)[:200]}
        if direction in case.bounds:
            record["faults"] += judge_peers(case.bounds[direction], record)
        yield record


def _own_pass(
    case: Case, direction: str, device: jax.Device, record: dict[str, Any]
) -> tuple[str, Callable, tuple]:
    """Return the backend that takes the shape on this device, and its pass; record a refusal."""

    def operation(backend: str) -> Callable:
        return functools.partial(case.function, backend=backend)

    try:
        return device.platform, *abstract_pass(operation(device.platform), case, direction, device)
    except NotImplementedError as error:
        if direction in case.bounds:
            raise
        record["refused"] = str(error)
        return "reference", *abstract_pass(operation("reference"), case, direction, device)


def line(record: dict[str, Any]) -> str:
    """Lay a record out as one line of the table."""
    head = f"{record['chip']:6} {record['operation']:18} {record['pass']:8} {record['shape']:22} "
    if "figures" not in record:
        return f"{head} {record.get('skipped', 'FAULT')}"
    found, work, floor = record["figures"], record["work"] or {}, record["floor"]
    least = work.get("needed") or floor["bytes"]

    def scaled(value: float | None, unit: float) -> str:
        return "n/a" if value is None or unit == 0 else f"{value / unit:.4g}"

    theirs = [
        f"{name} {each['fails'].splitlines()[0][:60]}"
        if "fails" in each
        else f"{name} {scaled(each['work']['flops'], 1e9)}, {scaled(each['work']['bytes'], 1e9)}, "
        f"{each['temp'] / 1e6:.0f}, {each['vmem'] / 1024:.0f}"
        for name, each in record["peers"].items()
    ]
    blocks = "reference" if "refused" in record else work.get("blocks", "n/a")
    return (
        f"{head}{blocks:>16} {scaled(found['flops'], 1e9):>9} "
        f"{scaled(found['flops'], floor['flops']):>6} {scaled(work.get('flops'), 1e9):>9} "
        f"{scaled(found['bytes'], 1e9):>8} {scaled(found['bytes'], least):>6} "
        f"{scaled(work.get('bytes'), 1e9):>9} {found['temp'] / 1e6:8.1f} "
        f"{found['vmem'] / 1024:8.0f} {found['smem'] / 1024:8.0f} {found['seconds']:4.0f}  "
        f"{'; '.join(theirs)}"
    )


def run(cases: list[Case], targets: list[Target]) -> dict[str, Any]:
    """Compile cases for targets, print the table and what is wrong, and return the figures."""
    print(HEADER)
    records = []
    for target in targets:
        for case in cases:
            for record in compile_case(case, target):
                records.append(record)
                print(line(record), flush=True)
    judge_beside(cases, records)
    print("\n".join(each for record in records for each in report.fault_lines(record)))
    print(NOTES)
    return {"shapes": {case.shape: case.sizes for case in cases}, "records": records}
