"""Time the operations on the device at hand, after checking that they are right."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

from experiments.benchmark.cases import Case, one_pass
from kernels_pallas.attention.visibility import NEGATIVE

REPEATS = 10
LONG = 2e-3  # seconds of a call beside which its dispatch is nothing
# A result is rounded to 8 bits, and so are probabilities before they are multiplied: 2^-9 of the
# largest value in each, and in gradients once more. Blocks left out show as errors near 1.
TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a device can do: bfloat16 FLOP/s of dense products, and bytes/s of its memory."""

    flops: float
    bandwidth: float


# By jax's name for the device. A device of TPU7x is half a chip.
LIMITS = {
    "TPU v5 lite": Limits(flops=197e12, bandwidth=819e9),
    "TPU v5": Limits(flops=459e12, bandwidth=2765e9),
    "TPU v5p": Limits(flops=459e12, bandwidth=2765e9),
    "TPU v6 lite": Limits(flops=918e12, bandwidth=1640e9),
    "TPU7x": Limits(flops=1154e12, bandwidth=3690e9),
    "NVIDIA H100 80GB HBM3": Limits(flops=989e12, bandwidth=3352e9),
    "NVIDIA H200": Limits(flops=989e12, bandwidth=4800e9),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """The device that is measured.

    Attributes:
      kind: jax's name for it.
      platform: "cpu", "gpu" or "tpu".
      limits: by its maker; None if not known here.
      copying: bytes/s read and written by a large copy, measured.
    """

    kind: str
    platform: str
    limits: Limits | None
    copying: float


def machine() -> Machine:
    """Find the device and measure how fast it copies."""
    device = jax.devices()[0]
    size = 1 << (26 if device.platform == "cpu" else 30)
    x = jnp.ones(size // 4, jnp.float32)
    fastest = min(seconds(run, (x,)) for run in (jnp.copy, jnp.negative))
    return Machine(
        kind=device.device_kind,
        platform=device.platform,
        limits=LIMITS.get(device.device_kind),
        copying=2 * size / fastest,
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


def differences(found: Any, wanted: Any) -> tuple[float, float]:
    """Compare two results.

    Returns:
      The largest absolute difference, and the largest norm of a difference over the norm of what is
      wanted; both NaN if anything found is. The log-sum-exp of no keys is equal to itself alone.
    """

    def compare(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        is_none = b <= NEGATIVE / 2
        a = jnp.where(is_none, jnp.where(a <= NEGATIVE / 2, 0, jnp.nan), a)
        b = jnp.where(is_none, 0, b)
        norm = jnp.sqrt(jnp.square(b).sum())
        return jnp.abs(a - b).max(), jnp.sqrt(jnp.square(a - b).sum()) / jnp.maximum(norm, 1e-30)

    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    errors = [jax.jit(compare)(a, b) for a, b in pairs]
    largest, relative = (jnp.stack(values).max() for values in zip(*errors, strict=True))
    return float(largest), float(relative)


def measure(case: Case, here: Machine, backend: str | None) -> list[dict[str, Any]]:
    """Check and time each pass of a case, and its peers.

    Args:
      case: what to run.
      here: the device.
      backend: of the operation; None is the device's own, or the reference if that refuses.

    Returns:
      For each pass a record with its faults.
    """
    arrays = jax.jit(case.build)(jax.random.key(0))
    chosen, refusal = _choose(case, here, backend, arrays)
    records = []
    for direction, floor in case.floors.items():
        record: dict[str, Any] = {
            "operation": case.operation, "pass": direction, "shape": case.shape,
            "backend": chosen, "refused": refusal, "faults": [],
        }  # fmt: skip
        records.append(record)
        try:
            spent = _check_and_time(case, direction, chosen, here, arrays, record)
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            record["faults"].append(f"does not run: {str(error).splitlines()[0][:300]}")
            continue
        record |= {"tflops": floor.flops / spent / 1e12, "gbps": floor.bytes / spent / 1e9}
        record["of_copying"] = floor.bytes / spent / here.copying
        if here.limits is not None:
            least = max(floor.flops / here.limits.flops, floor.bytes / here.limits.bandwidth)
            record["of_limit"] = least / spent
        record["ratios"] = {name: s / spent for name, s in record["peers"].items()}
    return records


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


def _check_and_time(
    case: Case, direction: str, backend: str, here: Machine, arrays: Any, record: dict
) -> float:
    """Fill in seconds, errors and the peers' seconds; return the seconds."""

    def outcome(function: Callable, arrays: Any = arrays) -> tuple[Any, Callable, tuple]:
        wrt = tuple(name for name in case.wrt if name in arrays)
        way = one_pass(function, wrt, direction)
        arguments = way.prepare(arrays)
        return jax.jit(way.run)(*arguments), way.run, arguments

    def bound(name: str) -> Callable:
        return lambda **given: case.function(**given, backend=name)

    mine, run, arguments = outcome(bound(backend))
    if math.isnan(differences(mine, mine)[1]):
        record["faults"].append("a result is not a number, though nothing that counts is such")
    wanted = None
    if backend != "reference":
        wanted, *_ = outcome(bound("reference"))
        record["error"], record["relative_error"] = differences(mine, wanted)
        if not record["relative_error"] <= TOLERANCE:
            record["faults"].append(
                f"differs from the reference by {record['relative_error']:.2g} of its norm, where "
                f"{TOLERANCE} is rounding"
            )
    record["seconds"] = spent = seconds(run, arguments)
    del arguments, wanted
    record["peers"], record["peer_errors"], record["peers_not_run"] = {}, {}, {}
    for peer in case.peers:
        if here.platform not in peer.platforms:
            continue
        try:
            given = arrays if peer.arrays is None else jax.jit(peer.arrays)(arrays)
            theirs, run, arguments = outcome(peer.function, given)
            if peer.computes_the_same:
                record["peer_errors"][peer.name] = differences(theirs, mine)[1]
            del given, theirs
            record["peers"][peer.name] = seconds(run, arguments)
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError, RuntimeError) as error:
            record["peers_not_run"][peer.name] = str(error).splitlines()[0][:300]
    if backend == "reference" and record["peer_errors"]:
        record["relative_error"] = min(record["peer_errors"].values())
        if not record["relative_error"] <= TOLERANCE:
            record["faults"].append("the reference agrees with none of its peers")
    return spent
