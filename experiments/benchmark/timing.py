"""Time the operations on the device at hand, after checking that they are right."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

from experiments.benchmark.cases import Case, one_pass
from kernels_pallas import chips
from kernels_pallas.attention.visibility import NEGATIVE
from kernels_pallas.chips import Chip

REPEATS = 10
LONG = 2e-3  # seconds of a call beside which its dispatch is nothing
# A result is rounded to 8 bits, and so are probabilities before they are multiplied: 2^-9 of the
# largest value in each, and in gradients once more. Blocks left out show as errors near 1: in the
# norm if they are many, in the largest difference if it is one tile among thousands.
TOLERANCE = 0.02  # norm of the difference over the norm
LARGEST_TOLERANCE = 0.05  # largest difference over the largest value
REPETITIONS = 30  # runs that must agree bit for bit: no kernel adds in an order of chance

Action = Literal["check", "repeat", "time"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """The device that is measured.

    Attributes:
      kind: jax's name for it.
      platform: "cpu", "gpu" or "tpu".
      chip: what its maker says of it; None if nothing is known.
      copying: bytes/s read and written by a large copy, measured; NaN if it was not asked for.
    """

    kind: str
    platform: str
    chip: Chip | None
    copying: float


def machine(*, times_copies: bool = True) -> Machine:
    """Find the device, and measure how fast it copies unless nothing will be timed."""
    device = jax.devices()[0]
    copying = math.nan
    if times_copies:
        size = 1 << (26 if device.platform == "cpu" else 30)
        x = jnp.ones(size // 4, jnp.float32)
        copying = 2 * size / min(seconds(run, (x,)) for run in (jnp.copy, jnp.negative))
    return Machine(
        kind=device.device_kind,
        platform=device.platform,
        chip=chips.find(device.device_kind),
        copying=copying,
    )


def compiled(run: Callable, arguments: tuple) -> tuple[Any, tuple]:
    """Compile a program, and lay its arguments out as it wants them.

    Inside a model the operations before a kernel write its inputs as it reads them; on TPUs, where
    layouts differ, a program alone would begin with copies.
    """
    if jax.default_backend() != "tpu":
        return jax.jit(run).lower(*arguments).compile(), arguments
    auto = Format(Layout.AUTO)
    abstract = jax.eval_shape(lambda *a: a, *arguments)
    program = jax.jit(run, in_shardings=auto, out_shardings=auto).lower(*abstract).compile()
    return program, jax.device_put(arguments, program.input_formats[0])


def chained(run: Callable, times: int) -> Callable:
    """Make a program that runs another several times, each run waiting for the one before."""

    def repeat(*arguments: Any) -> Any:
        def again(_: jax.Array, state: tuple) -> tuple:
            # The arguments may change, as far as the compiler knows: nothing leaves the loop.
            held, _ = jax.lax.optimization_barrier(state)
            return held, run(*held)

        out = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, *arguments))
        return jax.lax.fori_loop(0, times, again, (arguments, out))[1]

    return repeat


def seconds(run: Callable, arguments: tuple) -> float:
    """Return the seconds of one run: the median of repeated measurements after a warm-up.

    A short program is repeated inside of one, so that starting it does not count.
    """
    program, arguments = compiled(run, arguments)
    jax.block_until_ready(program(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    once = time.perf_counter() - start
    inside = 1
    if once < LONG:
        inside = min(100, math.ceil(5 * LONG / once))
        program, arguments = compiled(chained(run, inside), arguments)
        jax.block_until_ready(program(*arguments))
    outside = 3 if once < 1 else 1
    measured = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        out = None
        for _ in range(outside):
            out = program(*arguments)
        jax.block_until_ready(out)
        measured.append((time.perf_counter() - start) / (outside * inside))
    return statistics.median(measured)


class Difference(NamedTuple):
    """How far a result is from another, over all its arrays; NaN if anything found is.

    Attributes:
      absolute: largest difference.
      relative: largest, over arrays, of the norm of the difference over the norm of what is wanted.
      largest: largest, over arrays, of the largest difference over the largest value wanted.
    """

    absolute: float
    relative: float
    largest: float


def differences(found: Any, wanted: Any) -> Difference:
    """Compare two results. The log-sum-exp of no keys is equal to itself alone."""

    @jax.jit
    def compare(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        is_none = b <= NEGATIVE / 2
        a = jnp.where(is_none, jnp.where(a <= NEGATIVE / 2, 0, jnp.nan), a)
        b = jnp.where(is_none, 0, b)
        apart = jnp.abs(a - b)
        sizes = jnp.stack([jnp.sqrt(jnp.square(b).sum()), jnp.abs(b).max()])
        spread = jnp.stack([jnp.sqrt(jnp.square(apart).sum()), apart.max()])
        return jnp.append(apart.max(), spread / jnp.maximum(sizes, 1e-30))

    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    worst = jnp.stack([compare(a, b) for a, b in pairs]).max(0)
    return Difference(*(float(each) for each in worst))


def runs_that_differ(run: Callable, arguments: tuple, wanted: Any, times: int) -> int:
    """Run a compiled program again and again; return how often a bit differs from the first."""

    @jax.jit
    def is_same(found: Any, wanted: Any) -> jax.Array:
        def bits(x: jax.Array) -> jax.Array:
            return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")

        same = jax.tree.map(lambda a, b: (bits(a) == bits(b)).all(), found, wanted)
        return jnp.stack(jax.tree.leaves(same)).all()

    return sum(not is_same(run(*arguments), wanted) for _ in range(times))


def measure(
    case: Case,
    here: Machine,
    backend: str | None,
    actions: Collection[Action] = ("check", "time"),
) -> Iterator[dict[str, Any]]:
    """Check and time each pass of a case, and its peers.

    Args:
      case: what to run.
      here: the device.
      backend: of the operation; None is the device's own, or the reference if that refuses.
      actions: "check" compares with the reference, "repeat" runs 30 times and compares bits,
        "time" measures the operation and its peers.

    Yields:
      For each pass, as soon as it is done, a record with its faults.
    """
    arrays = jax.jit(case.build)(jax.random.key(0))
    chosen, refused = _choose(case, here, backend, arrays)
    for direction, floor in case.floors.items():
        record: dict[str, Any] = {
            "operation": case.operation, "pass": direction, "shape": case.shape,
            "backend": chosen, "refused": refused, "faults": [],
        }  # fmt: skip
        try:
            spent = _judge(case, direction, chosen, here, arrays, actions, record)
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            record["faults"].append(f"does not run: {str(error).splitlines()[0][:300]}")
            spent = None
        if spent is not None:
            record |= {"tflops": floor.flops / spent / 1e12, "gbps": floor.bytes / spent / 1e9}
            record["of_copying"] = floor.bytes / spent / here.copying
            if here.chip is not None:
                least = max(floor.flops / here.chip.bf16, floor.bytes / here.chip.bandwidth)
                record["of_limit"] = least / spent
            record["ratios"] = {name: s / spent for name, s in record["peers"].items()}
        yield record


def _choose(case: Case, here: Machine, backend: str | None, arrays: Any) -> tuple[str, str | None]:
    """Return the backend, and why it is not the device's own."""
    if backend is not None:
        return backend, None
    if here.platform == "cpu":
        return "reference", None
    try:
        jax.eval_shape(lambda arrays: case.function(**arrays, backend=here.platform), arrays)
    except NotImplementedError as error:
        return "reference", str(error)
    return here.platform, None


def _judge(
    case: Case,
    direction: str,
    backend: str,
    here: Machine,
    arrays: Any,
    actions: Collection[Action],
    record: dict,
) -> float | None:
    """Fill in errors, repetitions, seconds and the peers' seconds; return the seconds if timed."""

    def outcome(function: Callable, arrays: Any = arrays) -> tuple[Any, Callable, tuple]:
        wrt = tuple(name for name in case.wrt if name in arrays)
        way = one_pass(function, wrt, direction)
        arguments = way.prepare(arrays)
        run = jax.jit(way.run)
        return run(*arguments), run, arguments

    def bound(name: str) -> Callable:
        return lambda **given: case.function(**given, backend=name)

    mine, run, arguments = outcome(bound(backend))
    if "repeat" in actions:
        record["repetitions"] = REPETITIONS
        record["differing"] = runs_that_differ(run, arguments, mine, REPETITIONS)
        if record["differing"]:
            record["faults"].append(
                f"{record['differing']} of {REPETITIONS} runs differ in some bit: a race"
            )
    if "check" in actions:
        if math.isnan(differences(mine, mine).relative):
            record["faults"].append("a result is not a number, though nothing that counts is such")
        if backend != "reference":
            wanted, *_ = outcome(bound("reference"))
            record["error"], *errors = differences(mine, wanted)
            record["relative_error"], record["largest_error"] = errors
            record["faults"] += _beyond(*errors)
            del wanted
    if "time" not in actions:
        return None
    record["seconds"] = spent = seconds(run, arguments)
    del arguments
    record["peers"], record["peer_errors"], record["peers_not_run"] = {}, {}, {}
    for peer in case.peers:
        if here.platform not in peer.platforms:
            continue
        try:
            given = arrays if peer.arrays is None else jax.jit(peer.arrays)(arrays)
            theirs, run, arguments = outcome(peer.function, given)
            if peer.computes_the_same:
                record["peer_errors"][peer.name] = differences(theirs, mine).relative
            del given, theirs
            record["peers"][peer.name] = seconds(run, arguments)
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError, RuntimeError) as error:
            record["peers_not_run"][peer.name] = str(error).splitlines()[0][:300]
    if backend == "reference" and record["peer_errors"]:
        record["relative_error"] = min(record["peer_errors"].values())
        if not record["relative_error"] <= TOLERANCE:
            record["faults"].append("the reference agrees with none of its peers")
    return spent


def _beyond(relative: float, largest: float) -> Iterator[str]:
    """Yield what is wrong with errors that are no rounding."""
    if not relative <= TOLERANCE:
        yield (
            f"differs from the reference by {relative:.2g} of its norm, where {TOLERANCE} is "
            "rounding"
        )
    if not largest <= LARGEST_TOLERANCE:
        yield (
            f"differs from the reference by up to {largest:.2g} of its largest value, where "
            f"{LARGEST_TOLERANCE} is rounding"
        )
