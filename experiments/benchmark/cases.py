"""What the benchmarks run: each operation on each of its named shapes, as one entry.

To benchmark another operation, make a case of it in a function like `decode_case` and add it to
`cases`. Everything else reads the entries: timing, checking, tuning and compiling ahead of time.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

import kernels_pallas
from experiments.benchmark.expert_peers import of_experts
from experiments.benchmark.expert_work import expert_work
from experiments.benchmark.peers import Peer, of_attention, of_decode
from experiments.benchmark.schedule import (
    BACKWARD,
    FORWARD,
    Work,
    attention_work,
    decode_work,
    prefill_work,
)
from kernels_pallas import shapes

Arrays = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floor:
    """The least that a pass needs, whoever computes it: FLOPs, and bytes to and from memory."""

    flops: int
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """What the compiled kernel may need at most, on every chip that has a kernel for it.

    Attributes:
      flops: times the FLOPs of the floor.
      bytes: times the bytes that are needed.
      multiplied: times the floor FLOPs of what the schedule multiplies, padding included; `flops`
        if None.
      scratch: bytes of memory besides arguments and results.
      peers: of a peer, how many times our bytes its own must be at least.
      beside: another shape, and times its FLOPs.
      chips: by chip, those of the first three that differ.
    """

    flops: float
    bytes: float
    multiplied: float | None = None
    scratch: float = math.inf
    peers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    beside: tuple[str, float] | None = None
    chips: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    def on(self, chip: str) -> "Bound":
        """Return the bound of one chip."""
        changed: dict[str, Any] = dict(self.chips.get(chip, {}))
        return dataclasses.replace(self, **changed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One operation on one shape.

    Attributes:
      operation: its name, as `tuning.lookup` has the first part of it.
      shape: name of the shape.
      sizes: of the shape, for the record.
      build: makes the arrays from a key, by the names of the function's arguments; traceable.
      function: the operation, of these arrays and a `backend`.
      floors: of each pass, "forward" and, if there is a gradient, "backward".
      wrt: names of the arrays that the backward pass differentiates; none if there is no gradient.
      peers: others that compute the same from the same arrays.
      work: of a pass, the platform and the block sizes in use, what the schedule of blocks really
        multiplies and copies, counted without asking the kernel; None if nobody can tell.
      candidates: of a pass and a platform, block sizes worth trying.
      bounds: of a pass, what the compiled kernel is held to.
    """

    operation: str
    shape: str
    sizes: Mapping[str, Any]
    build: Callable[[jax.Array], dict[str, Any]]
    function: Callable[..., Any]
    floors: Mapping[str, Floor]
    wrt: tuple[str, ...] = ()
    peers: tuple[Peer, ...] = ()
    work: Callable[[str, str, Mapping[str, Any]], Work | None] = lambda *_: None
    candidates: Callable[[str, str], list[dict[str, dict[str, int]]]] = lambda *_: []
    bounds: Mapping[str, Bound] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """One direction of a function as two programs, so that it is timed without the other direction.

    Attributes:
      prepare: of the arrays of a case, what `run` takes; compiled already where that matters.
      run: the program that is measured.
    """

    prepare: Callable[[Arrays], tuple]
    run: Callable[..., Any]


def one_pass(function: Callable[..., jax.Array], wrt: tuple[str, ...], direction: str) -> Pass:
    """Take one direction of a function of named arrays.

    Args:
      function: of arrays by name.
      wrt: names of the arrays that are differentiated.
      direction: "forward", or "backward" for the gradient alone, with what the forward pass saved.
    """
    if direction == "forward":
        return Pass(prepare=lambda arrays: (dict(arrays),), run=lambda arrays: function(**arrays))

    @jax.jit
    def prepare(arrays: Arrays) -> tuple:
        rest = {name: x for name, x in arrays.items() if name not in wrt}
        out, pull = jax.vjp(
            lambda *given: function(**dict(zip(wrt, given, strict=True)), **rest),
            *(arrays[name] for name in wrt),
        )
        douts = jax.tree.map(
            lambda x: jax.random.normal(jax.random.key(1), x.shape).astype(x.dtype), out
        )
        return pull, douts

    return Pass(prepare=prepare, run=lambda pull, dout: pull(dout))


def _floors(shape: shapes.Attention | shapes.Experts, has_gradient: bool) -> dict[str, Floor]:
    ways = {"forward": False, "backward": True} if has_gradient else {"forward": False}
    return {
        direction: Floor(flops=shape.flops(backward=back), bytes=shape.bytes(backward=back))
        for direction, back in ways.items()
    }


def attention_case(shape: shapes.Attention) -> Case:
    """Return chunked attention on a shape, forward and backward."""
    return Case(
        operation="chunked_attention",
        shape=shape.name,
        sizes=dataclasses.asdict(shape),
        build=shape.build,
        function=functools.partial(kernels_pallas.chunked_attention, **shape.settings),
        floors=_floors(shape, shape.has_gradient),
        wrt=("q_BTNH", "k_BSKH", "v_BSKH") if shape.has_gradient else (),
        peers=of_attention(shape),
        work=functools.partial(attention_work, shape),
        candidates=attention_candidates,
        bounds={"forward": Bound(flops=1.15, bytes=1.3)} if shape.name.startswith("scout") else {},
    )


def decode_case(shape: shapes.Decode) -> Case:
    """Return decode attention on a shape."""
    return Case(
        operation="decode_attention",
        shape=shape.name,
        sizes=dataclasses.asdict(shape),
        build=shape.build,
        function=functools.partial(_decode, shape),
        floors={"forward": Floor(flops=shape.flops(), bytes=shape.bytes())},
        peers=of_decode(shape),
        work=functools.partial(decode_work, shape),
        candidates=decode_candidates,
        bounds={"forward": Bound(flops=1.15, bytes=1.05)} if "_1m" in shape.name else {},
    )


def prefill_case(shape: shapes.Prefill) -> Case:
    """Return prefill attention on a shape, which may copy no pool."""
    pool = shape.bytes() // 2  # of keys or of values
    bound = Bound(flops=1.15, bytes=1.3, scratch=pool // 2)
    return Case(
        operation="prefill_attention",
        shape=shape.name,
        sizes=dataclasses.asdict(shape),
        build=shape.build,
        function=functools.partial(_prefill, shape),
        floors={"forward": Floor(flops=shape.flops(), bytes=shape.bytes())},
        work=functools.partial(prefill_work, shape),
        candidates=prefill_candidates,
        bounds={"forward": bound} if shape.name.startswith("scout") else {},
    )


def _prefill(shape: shapes.Prefill, *, backend: Any, **arrays: jax.Array) -> Any:
    arguments: dict[str, Any] = {**shape.arguments(arrays), **shape.settings}
    return kernels_pallas.prefill_attention(**arguments, backend=backend)


def _decode(shape: shapes.Decode, *, backend: Any, **arrays: jax.Array) -> Any:
    arguments: dict[str, Any] = {**shape.arguments(arrays), **shape.settings}
    return kernels_pallas.decode_attention(**arguments, backend=backend)


# Rows are multiplied in whole chunks: of 128 on v5e and v5p, of 256 where multipliers are wider, of
# 64 on GPUs. To 8192 rows 16 experts add about half a chunk each; 128 experts as many as there are.
# A gather of rows reads whole tiles of them on v5e, says its compiler.
_EXPERT_BOUNDS = {
    "scout_experts_8k": Bound(
        flops=1.05, bytes=1.25, multiplied=1.2, peers={"megablox": 1.5},
        chips={
            "v5e": {"bytes": 1.4}, "v6e": {"multiplied": 1.35}, "tpu7x": {"multiplied": 1.35},
            "h100": {"multiplied": 1.1},
        },
    ),
    "maverick_experts_8k": Bound(
        flops=1.05, bytes=1.25, multiplied=2.1, beside=("scout_experts_8k", 1.1),
        chips={"tpu7x": {"multiplied": 4.2}, "h100": {"multiplied": 1.6}},
    ),
    "scout_experts_1": Bound(flops=math.inf, bytes=1.1),
    "maverick_experts_1": Bound(flops=math.inf, bytes=1.1),
}  # fmt: skip


def expert_case(shape: shapes.Experts) -> Case:
    """Return the mixture of experts on a shape, with its gradient where there is one."""
    is_differentiated = shape.has_gradient and shape.stored == "float"
    names = ("x_TD", "w_gate_EDF", "w_up_EDF", "w_down_EFD", "gate_TX")
    bound = _EXPERT_BOUNDS.get(shape.name)
    return Case(
        operation="expert_mlp",
        shape=shape.name,
        sizes=dataclasses.asdict(shape),
        build=shape.build,
        function=kernels_pallas.expert_mlp,
        floors=_floors(shape, is_differentiated),
        wrt=names if is_differentiated else (),
        peers=of_experts(shape),
        work=functools.partial(expert_work, shape),
        candidates=expert_candidates,
        bounds={} if bound is None else {"forward": bound},
    )


# Of each operation of the experts' kernels, sizes to try in all combinations.
_TPU_SIZES = {"block": (512, 1024, 2048), "chunk": (128, 256), "tile": (256, 512)}
_EXPERT_SIZES = {
    ("tpu", "forward"): {"forward": _TPU_SIZES},
    ("tpu", "backward"): {
        f"backward_{name}": _TPU_SIZES for name in ("hidden", "tokens", "weights")
    },
    ("gpu", "forward"): {
        "up": {"width": (64, 128), "stages": (3, 4, 6), "programs": (1, 2)},
        "down": {"width": (64, 128, 256), "stages": (3, 4, 6), "programs": (1, 2)},
    },
    ("gpu", "backward"): {
        "dhidden": {"width": (128, 256), "stages": (2, 3, 4)},
        "dx": {"width": (128, 256), "stages": (2, 3, 4)},
        "dup": {"width": (64, 128), "stages": (3, 4, 5)},
        "ddown": {"width": (64, 128, 256), "stages": (3, 4, 5)},
    },
}  # fmt: skip


def expert_candidates(direction: str, platform: str) -> list[dict[str, dict[str, int]]]:
    """List sizes of the experts' kernels to try, one kernel after the other."""
    return [
        {f"expert_mlp.{name}": dict(zip(sizes, chosen, strict=True))}
        for name, sizes in _EXPERT_SIZES[platform, direction].items()
        for chosen in itertools.product(*sizes.values())
    ]


def attention_candidates(direction: str, platform: str) -> list[dict[str, dict[str, int]]]:
    """List block sizes of chunked attention to try."""
    walks = FORWARD if direction == "forward" else BACKWARD
    if platform == "tpu":
        sizes = [{"q": q, "kv": kv} for q in (256, 512, 1024) for kv in (256, 512, 1024)]
    else:
        sizes = [{"kv_block": b, "q_block": b, "stages": n} for b in (64, 128) for n in (2, 3, 4)]
    return [{name: each for walk in walks for name in walk.operations} for each in sizes]


def decode_candidates(direction: str, platform: str) -> list[dict[str, dict[str, int]]]:
    """List block sizes of decode attention to try."""
    del direction
    if platform == "tpu":
        sizes = [{"kv": kv, "depth": n} for kv in (256, 512, 1024, 2048) for n in (2, 3, 4)]
    else:
        sizes = [{"kv": kv, "stages": n} for kv in (64, 128) for n in (0, 3, 4, 6)]
    return [{"decode_attention": each} for each in sizes]


def prefill_candidates(direction: str, platform: str) -> list[dict[str, dict[str, int]]]:
    """List block sizes of prefill attention to try."""
    del direction
    if platform == "tpu":
        sizes = [{"q": q, "kv": kv} for q in (256, 512, 1024) for kv in (256, 512, 1024)]
    else:
        sizes = [{"kv_block": kv, "stages": n} for kv in (64, 128) for n in (2, 3)]
    return [{"prefill_attention": each} for each in sizes]


def _case(shape: shapes.Shape) -> Case:
    if isinstance(shape, shapes.Experts):
        return expert_case(shape)
    if isinstance(shape, shapes.Prefill):
        return prefill_case(shape)
    return attention_case(shape) if isinstance(shape, shapes.Attention) else decode_case(shape)


def cases(names: list[str] | None = None, *, small: bool = False) -> list[Case]:
    """List the cases of the shapes named; without names all of them, or nano's if `small`.

    Raises:
      ValueError: a name is no shape.
    """
    known = [_case(shape) for shape in shapes.SHAPES.values()]
    every = {case.shape: case for case in known}
    for name in names or ():
        if name not in every:
            raise ValueError(f"{name!r} is no shape; choose from {', '.join(every)}")
    if names:
        return [case for case in known if case.shape in names]
    return [case for case in known if not small or case.shape.startswith("nano")]
