"""Compile experts that are divided over a slice of TPUs that is not there, and judge what it needs.

The whole call of `kernels_pallas.expert_mlp_parallel`, forward and backward by collectives, and
forward by remote copies, whose kernel nothing else compiles; its gradient goes by collectives. A
loop over rounds is counted once, as one round is what there is where tokens choose evenly.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp

import kernels_pallas
from experiments.benchmark.figures import (
    FAILURES,
    GB,
    Figures,
    compile_traced,
    failed,
    memory_faults,
)
from experiments.benchmark.report import FIGURES, FIGURES_NOTES, Table, texts
from experiments.benchmark.topologies import Target
from kernels_pallas import shapes
from kernels_pallas.experts.parallel import Transport
from llama4_jax import parallel

PRODUCTS = {"forward": 3, "backward": 8}  # of rows; back, gate and up are computed again
MORE = 1.1  # times the FLOPs of those
SCRATCH = {"forward": GB // 2, "backward": 3 * GB // 2}  # but for gradients of matrices

TABLE = Table(
    names=texts("target:6 shape:27 mesh:15 experts:7 pass:8 transport:9"),
    values=FIGURES,
    notes=FIGURES_NOTES
    + """\
Divided experts: of one round, which is all there is where tokens choose evenly. experts: of a
device. transport: xla, collectives with the products between them; dma, one kernel that sends,
multiplies and sends back, whose gradient is that of xla. The backward pass keeps nothing of the
forward pass: eight products of each row, not six. Scratch going back holds gradients of matrices,
for each expert 0.5 GB in float32 and 0.25 GB of a round.""",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divided:
    """Experts of a shape over a mesh, each device with the tokens of the shape.

    Attributes:
      shape: sizes; E of all devices together.
      mesh: as `parallel.make_mesh` reads it; experts are divided along `expert`.
      transport: as `expert_mlp_parallel` has it.
    """

    shape: shapes.Experts
    mesh: str
    transport: Transport

    @property
    def name(self) -> str:
        """Name of the shape, for the command line."""
        return f"{self.shape.name}_divided"

    @property
    def directions(self) -> tuple[str, ...]:
        """Passes to compile: the gradient goes by collectives, whatever the transport."""
        return tuple(PRODUCTS) if self.transport == "xla" else ("forward",)

    @property
    def num_local(self) -> int:
        """Experts of a device."""
        return self.shape.E // parallel.parse_mesh(self.mesh)["expert"]


_MESHES = {
    "scout_experts_8k": {
        "v5e": ("expert:16",),
        "v5p": ("expert:16", "fsdp:4,expert:4"),
        "v6e": ("expert:16", "fsdp:4,expert:4"),
        "tpu7x": ("expert:8",),
    },
    "maverick_experts_8k": {"v5p": ("expert:16",)},
}
NAMES = tuple(f"{name}_divided" for name in _MESHES)


def cases(names: list[str], chip: str) -> list[Divided]:
    """List the cases of a chip among the names given; without names all of them."""
    every = [
        Divided(shape=shape, mesh=mesh, transport=transport)
        for shape in shapes.SHAPES.values()
        if isinstance(shape, shapes.Experts)
        for mesh in _MESHES.get(shape.name, {}).get(chip, ())
        for transport in get_args(Transport)
    ]
    return [case for case in every if not names or case.name in names]


def trace(case: Divided, direction: str, mesh: jax.sharding.Mesh) -> jax.stages.Traced:
    """Trace one pass on a mesh, from shapes alone.

    Raises:
      NotImplementedError: the operation refuses these sizes there.
    """
    s, tokens, of_expert = case.shape, ("batch", None), ("experts", None, None)
    operation = functools.partial(
        kernels_pallas.expert_mlp_parallel, transport=case.transport, backend="tpu"
    )

    def forward(expert_TX, *floats):
        def local(divided, expert_TX, *floats):
            *x_and_weights, gate_TX = floats
            more = {"expert_TX": expert_TX, "gate_TX": gate_TX, "axes": divided["experts"]}
            return operation(*x_and_weights, **more)

        axes = (tokens, tokens, *(of_expert,) * 3, tokens)
        return parallel.per_shard(local, expert_TX, *floats, axes=axes, out=tokens)

    def backward(dy_TD, expert_TX, *floats):
        return jax.vjp(functools.partial(forward, expert_TX), *floats)[1](dy_TD)

    def array(axes: tuple[str | None, ...], *sizes: int, dtype: str = s.dtype) -> Any:
        return parallel.abstract(lambda: parallel.shard(jnp.zeros(sizes, dtype), axes))

    with parallel.use_mesh(mesh, parallel.PRESETS["fsdp_expert"]):
        T = mesh.size * s.T
        x_TD, gate_TX = array(tokens, T, s.D), array(tokens, T, s.X)
        w_EDF, w_EFD = array(of_expert, s.E, s.D, s.F), array(of_expert, s.E, s.F, s.D)
        given = (array(tokens, T, s.X, dtype="int32"), x_TD, w_EDF, w_EDF, w_EFD, gate_TX)
        if direction == "forward":
            return jax.jit(forward).trace(*given)
        return jax.jit(backward).trace(x_TD, *given)


def judge(case: Divided, direction: str, target: Target, found: Figures) -> Iterator[str]:
    """Yield what is wrong with a pass that compiles."""
    s, most = case.shape, SCRATCH[direction]
    if direction == "backward":  # a round's in the dtype of the matrices, and float32 sums
        most += (jnp.dtype(s.dtype).itemsize + 4) * 3 * case.num_local * s.D * s.F
    yield from memory_faults(found, target, most)
    floor = 2 * PRODUCTS[direction] * s.T * s.X * s.D * s.F
    if found.flops is not None and not floor <= found.flops <= MORE * floor:
        yield f"FLOPs by estimate are {found.flops / floor:.3f} times the products, not 1 to {MORE}"


def compile_divided(case: Divided, target: Target) -> Iterator[dict[str, Any]]:
    """Compile each pass of a case for a target, and yield the records."""
    for direction in case.directions:
        record: dict[str, Any] = {
            "target": target.name, "operation": "expert_mlp_parallel", "pass": direction,
            "shape": case.name, "mesh": case.mesh, "transport": case.transport,
            "experts": case.num_local, "faults": [],
        }  # fmt: skip
        try:
            count = math.prod(parallel.parse_mesh(case.mesh).values())
            mesh = parallel.make_mesh(case.mesh, devices=target.devices(count))
            found = compile_traced(trace(case, direction, mesh))
        except FAILURES as error:
            yield failed(record, error)
            continue
        figures: dict[str, Any] = dataclasses.asdict(found)
        figures.pop("declared")  # counts a forward pass that the compiler drops from backward
        faults = list(judge(case, direction, target, found))
        yield {**record, "figures": figures, "faults": faults}


def sizes(names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the sizes of the shapes named; without names of all of them."""
    known = {f"{name}_divided": dataclasses.asdict(shapes.SHAPES[name]) for name in _MESHES}
    return {name: each for name, each in known.items() if not names or name in names}


def records(names: list[str], targets: list[Target]) -> Iterator[dict[str, Any]]:
    """Compile the cases named for targets and yield the records."""
    for target in targets:
        for case in cases(names, target.name):
            yield from compile_divided(case, target)
