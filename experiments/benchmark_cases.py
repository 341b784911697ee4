"""What the benchmarks run: each operation on each of its named shapes, as one entry.

To benchmark another operation, make a case of it in a function like `decode_case` and add it to
`cases`. Everything else reads the entries: timing, checking, tuning and compiling ahead of time.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

import kernels_pallas
from experiments import benchmark_peers
from experiments.benchmark_blocks import BACKWARD, FORWARD, Work, attention_work, decode_work
from kernels_pallas import shapes

Arrays = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floor:
    """The least that a pass needs, whoever computes it: FLOPs, and bytes to and from memory."""

    flops: int
    bytes: int


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
      bounds: of a pass, how many times its floor FLOPs and bytes the compiled kernel may need.
    """

    operation: str
    shape: str
    sizes: Mapping[str, Any]
    build: Callable[[jax.Array], dict[str, jax.Array]]
    function: Callable[..., Any]
    floors: Mapping[str, Floor]
    wrt: tuple[str, ...] = ()
    peers: tuple[benchmark_peers.Peer, ...] = ()
    work: Callable[[str, str, Mapping[str, Any]], Work | None] = lambda *_: None
    candidates: Callable[[str, str], list[dict[str, dict[str, int]]]] = lambda *_: []
    bounds: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


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


def attention_case(shape: shapes.Attention) -> Case:
    """Return chunked attention on a shape, forward and backward."""
    floors = {
        direction: Floor(
            flops=shape.flops(backward=direction == "backward"),
            bytes=shape.bytes(backward=direction == "backward"),
        )
        for direction in ("forward", "backward")
    }
    return Case(
        operation="chunked_attention",
        shape=shape.name,
        sizes=dataclasses.asdict(shape),
        build=shape.build,
        function=functools.partial(kernels_pallas.chunked_attention, **shape.settings),
        floors=floors,
        wrt=("q_BTNH", "k_BSKH", "v_BSKH"),
        peers=benchmark_peers.of_attention(shape),
        work=functools.partial(attention_work, shape),
        candidates=attention_candidates,
        bounds={"forward": (1.15, 1.3)} if shape.name.startswith("scout") else {},
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
        peers=benchmark_peers.of_decode(shape),
        work=functools.partial(decode_work, shape),
        candidates=decode_candidates,
        bounds={"forward": (1.15, 1.05)} if "_1m" in shape.name else {},
    )


def _decode(shape: shapes.Decode, *, backend: Any, **arrays: jax.Array) -> Any:
    arguments: dict[str, Any] = {**shape.arguments(arrays), **shape.settings}
    return kernels_pallas.decode_attention(**arguments, backend=backend)


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


def cases(names: list[str] | None = None, *, small: bool = False) -> list[Case]:
    """List the cases of the shapes named; without names all of them, or nano's if `small`.

    Raises:
      ValueError: a name is no shape.
    """
    known = [
        attention_case(shape) if isinstance(shape, shapes.Attention) else decode_case(shape)
        for shape in shapes.SHAPES.values()
    ]
    every = {case.shape: case for case in known}
    for name in names or ():
        if name not in every:
            raise ValueError(f"{name!r} is no shape; choose from {', '.join(every)}")
    if names:
        return [case for case in known if case.shape in names]
    return [case for case in known if not small or case.shape.startswith("nano")]
