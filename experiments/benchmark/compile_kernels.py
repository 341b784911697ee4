"""Compile the operations for chips that are not there, and judge what the compilers say of them.

A Pallas call enters a compiler's estimate with what the kernel says of itself, so that the figures
are also counted from the schedule of blocks (`schedule`), and a kernel that asserts other
bytes than it copies is a fault, as is one beyond its bounds.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.layout import Format, Layout

from experiments.benchmark import bundles
from experiments.benchmark.cases import Bound, Case, Floor, one_pass
from experiments.benchmark.figures import FAILURES, Figures, compile_traced, failed, memory_faults
from experiments.benchmark.report import FIGURES, FIGURES_NOTES, Column, Record, Table, texts
from experiments.benchmark.schedule import Work
from experiments.benchmark.topologies import Target
from kernels_pallas import tuning

HONEST = 0.05  # relative error of a kernel's estimate of its bytes


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
        return compile_traced(
            jax.jit(run, in_shardings=where, out_shardings=where).trace(*arguments)
        )


def judge(
    case: Case, direction: str, target: Target, found: Figures, work: Work | None
) -> Iterator[str]:
    """Yield what is wrong with a pass that compiles."""
    bound = case.bounds[direction].on(target.name) if direction in case.bounds else None
    yield from memory_faults(found, target, math.inf if bound is None else bound.scratch)
    if bound is None or work is None:
        return
    floor = case.floors[direction].flops
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


def judge_peers(bound: Bound, record: Record) -> Iterator[str]:
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


def judge_beside(bound: Bound, record: Record, seen: list[dict[str, Any]]) -> Iterator[str]:
    """Yield whether a shape needs too many FLOPs, by the compiler, beside another seen before."""
    shape, most = bound.beside or (None, 0.0)
    same = {"target": record["target"], "pass": record["pass"], "shape": shape}
    for other in seen:
        if "figures" in other and same.items() <= other.items():
            ratio = record["figures"]["flops"] / other["figures"]["flops"]
            if ratio > most:
                yield f"needs {ratio:.3f} times the FLOPs of {shape}, over {most}"


def compile_case(
    case: Case, target: Target, schedules: str | None = None
) -> Iterator[dict[str, Any]]:
    """Compile each pass of a case and its peers for a target, and yield the records.

    Args:
      case: the operation on a shape.
      target: the chip.
      schedules: folder into which libtpu writes its schedules, if it does.
    """
    device = target.devices(1)[0]
    for direction, floor in case.floors.items():
        record: dict[str, Any] = {
            "target": target.name, "operation": case.operation, "pass": direction,
            "shape": case.shape, "floor": dataclasses.asdict(floor), "peers": {}, "faults": [],
        }  # fmt: skip
        try:
            with tuning.recorded() as blocks:
                backend, run, arguments = _own_pass(case, direction, device, record)
                size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments))
                if size > 0.9 * target.memory:
                    yield {**record, "skipped": f"{size / 1e9:.0f} GB of arrays do not fit"}
                    continue
                bundles.take(schedules) if schedules else None
                found = compile_pass(run, arguments, device)
        except FAILURES as error:
            yield failed(record, error)
            continue
        work = None
        if backend != "reference":
            with _on(device):
                work = case.work(direction, device.platform, blocks)
        record["figures"] = dataclasses.asdict(found)
        record["work"] = None if work is None else dataclasses.asdict(work)
        if schedules and target.chip.platform == "tpu":
            steps = {} if work is None else work.steps
            record["bundles"] = bundles.beside(bundles.take(schedules), steps, target.chip)
        record["of_floor"] = _of_floor(found, floor, work)
        record["faults"] = list(judge(case, direction, target, found, work))
        for peer in case.peers:
            counted = None if peer.work is None else peer.work(direction)
            if device.platform not in peer.platforms or counted is None:
                continue
            try:
                program = abstract_pass(peer.function, case, direction, device)
                theirs = dataclasses.asdict(compile_pass(*program, device))
                record["peers"][peer.name] = {**theirs, "work": dataclasses.asdict(counted)}
            except FAILURES as error:
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


def _of_floor(found: Figures, floor: Floor, work: Work | None) -> dict[str, float | None]:
    """Relate figures to the least: bytes to those that are needed in blocks, if there are any."""
    needed = floor.bytes if work is None else work.needed
    pairs = {"flops": (found.flops, floor.flops), "bytes": (found.bytes, needed)}
    return {name: own and least and own / least for name, (own, least) in pairs.items()}


def _blocks(record: Record) -> str:
    return "reference" if "refused" in record else (record.get("work") or {}).get("blocks", "n/a")


def _peers(record: Record) -> str:
    return "; ".join(
        f"{name} {each['fails'].splitlines()[0][:60]}"
        if "fails" in each
        else f"{name} {each['work']['flops'] / 1e9:.4g}, {each['work']['bytes'] / 1e9:.4g}, "
        f"{each['scratch'] / 1e9:.4g}, {each['vmem'] / 2**20:.4g}"
        for name, each in record["peers"].items()
    )


TABLE = Table(
    names=texts("target:6 operation:18 pass:8 shape:22"),
    values=(
        Column("blocks", "", ">16", _blocks),
        *FIGURES,
        Column("/floor", "of_floor.flops"),
        Column("in blocks", "work.flops", unit=1e9),
        Column("/floor", "of_floor.bytes"),
        Column("in blocks", "work.bytes", unit=1e9),
        Column("bundles/copy", "", ">12", bundles.cell),
        Column(" peer: GFLOP, GB in blocks, scratch GB, VMEM MiB", "", "<", _peers),
    ),
    notes=FIGURES_NOTES
    + """\
/floor: GFLOP, and then GB moved, over the least. in blocks, after each: what the schedule of blocks
multiplies and copies, counted from positions or from who goes to which expert; bytes that kernels
say must agree with that. bundles/copy: of each TPU kernel, how many bundles its schedule has, each
a cycle, with every loop and branch counted once; and the cycles in which the copies of one step
arrive: a tile of an expert's matrices, a block of a cache, or one of keys and values of a head.
Attention: the floor of FLOPs is that of visible pairs; of bytes, going forward, that each block of
queries reads the keys it needs and no others; going back, what its blocks copy. On GPUs a block
belongs to one head, so that the bytes of long attention are copies, most of which the L2 cache
serves. Splash estimates nothing; both its figures are in blocks.
Experts: the floor of bytes is matrices of experts that are hit, tokens, result, and hidden rows
each way, once. Kernels take no notice of who goes where when they say their FLOPs, six for a token,
D and F. What they multiply, in blocks, are whole chunks of rows (the number after the stroke, after
block x columns), about half a chunk more for each expert: with 128 experts twice the floor, in a
time that the bytes of their matrices decide. On GPUs what blocks in turn read from L2 is not
counted again. Megablox' figures are in blocks, too.""",
)


def records(
    cases: list[Case], targets: list[Target], schedules: str | None = None
) -> Iterator[dict[str, Any]]:
    """Compile cases for targets and yield the records; see `compile_case`."""
    seen: list[dict[str, Any]] = []
    for target in targets:
        for case in cases:
            for record in compile_case(case, target, schedules):
                bound = case.bounds.get(record["pass"])
                if bound is not None and "figures" in record:
                    record["faults"] += judge_beside(bound, record, seen)
                seen.append(record)
                yield record
