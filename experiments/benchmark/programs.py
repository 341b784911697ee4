"""The programs of Llama 4 Scout that are compiled for machines that are not there, and judged.

They are the very steps that serving and training run, traced from shapes: no weight is made.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from experiments.benchmark.figures import GB, Figures, memory_faults
from experiments.benchmark.report import FIGURES, FIGURES_NOTES, Column, Record, Table, texts
from experiments.benchmark.topologies import Target
from llama4_jax import parallel, train
from llama4_jax.cache.paged import Pools
from llama4_jax.config.families import every, scout
from llama4_jax.config.model import ModelConfig
from llama4_jax.config.runs import LossConfig, OptimizerConfig, RunConfig
from llama4_jax.model import Llama4
from llama4_jax.pretrained import GenerationDefaults
from llama4_jax.serve.options import Options
from llama4_jax.serve.programs import DeviceState, Shape, draw_tokens, loop_tokens, read_tokens
from llama4_jax.serve.sampling import DrawRows, answer_key
from llama4_jax.serve.sizes import largest_page

LOOPS = 8  # tokens that the device draws by itself
MOST_MOVED = 1.05  # times what a step that draws must move
SHALLOW = 8  # layers of the program that the full depth is compared with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One step of the model on one mesh.

    Attributes:
      name: what it does.
      kind: "decode" chooses tokens one after the other; "loop" does so without the host; "prefill"
        reads `tokens` of every row into the cache; "train" takes an AdamW step on rows of `tokens`.
      layers: depth of the model.
      mesh: as `parallel.make_mesh` reads it.
      preset: sharding rules.
      rows: of the batch, over all devices.
      tokens: of every row that one step computes.
      context: cache slots of every row; 0 in training.
      held: rows that the cache has room for, if more than these.
      scratch: most bytes beyond the arguments that a device may need. More means that weights or
        the cache are copied, or that scores of all pairs of tokens are kept.
    """

    name: str
    kind: Literal["decode", "loop", "prefill", "train"]
    layers: int
    mesh: str
    preset: str
    rows: int
    tokens: int
    context: int = 0
    held: int = 0
    scratch: int

    @property
    def num_devices(self) -> int:
        return math.prod(parallel.parse_mesh(self.mesh).values())


def scout_slice(layers: int) -> ModelConfig:
    """Return Scout's text model cut to its first layers, whose pattern repeats every four."""
    config = scout()
    text = dataclasses.replace(
        config.text, num_layers=layers, moe_layers=every(1, layers), nope_layers=every(4, layers)
    )
    return dataclasses.replace(config, text=text, vision=None)


def trace(
    program: Program, devices: list[jax.Device], config: ModelConfig | None = None
) -> jax.stages.Traced:
    """Trace a program for these devices.

    Args:
      program: the step and its sizes.
      devices: real or described ones, as many as its mesh has.
      config: the model; by default Scout cut to the program's layers.
    """
    config = config or scout_slice(program.layers)
    mesh = parallel.make_mesh(program.mesh, devices=devices)
    with parallel.use_mesh(mesh, parallel.PRESETS[program.preset]):
        return (_train if program.kind == "train" else _serve)(program, config)


def _integers(rows: int, tokens: int, dtype: str = "int32"):
    return parallel.abstract(
        lambda: parallel.shard(jnp.zeros((rows, tokens), dtype), ("batch", "seq"))
    )


def _serve(program: Program, config: ModelConfig) -> jax.stages.Traced:
    """Trace a step of the engine: tokens are read, and after each row one may be drawn."""
    text, rows, slots = config.text, program.rows, parallel.mesh_axes("kv_seq")
    devices = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in slots)
    page = largest_page(text.chunk_size, devices)
    chunk = min(text.chunk_size or program.context, program.context)
    draws, held = program.kind != "prefill", max(program.held, rows)
    shape = Shape(
        rows=rows,
        tokens=1 if draws else program.tokens,
        whole=-(-program.context // page),
        chunk=-(-chunk // page),
        every=draws,
    )
    model = parallel.abstract(lambda: Llama4(config, key=jax.random.key(0)))
    leaves, structure = jax.tree.flatten(model)

    def state() -> DeviceState:
        pages = {"whole_pages": held * shape.whole, "chunk_pages": held * shape.chunk}
        return DeviceState(Pools.create(text, **pages, page_size=page, dtype=config.dtype), None)

    def step(leaves, state, token_S, ints_BX, how):
        sizes = {"structure": structure, "shape": shape}
        if program.kind == "loop":
            return loop_tokens(leaves, state, token_S, ints_BX, how, **sizes, loops=LOOPS)
        state, read = read_tokens(leaves, state, token_S, ints_BX, **sizes)
        if not draws:
            return state, read
        return state, *draw_tokens(leaves, token_S, read, how, structure=structure, top=None)

    greedy = [Options().resolved(GenerationDefaults(), text.vocab_size)] * rows
    rest = parallel.abstract(
        lambda: (
            jnp.zeros(held, jnp.int32),
            jnp.zeros((rows, shape.columns), jnp.int32),
            jax.tree.map(jnp.asarray, DrawRows.of(greedy, [answer_key(0)] * rows)),
        )
    )
    return jax.jit(step, donate_argnums=1).trace(leaves, parallel.abstract(state), *rest)


def _train(program: Program, config: ModelConfig) -> jax.stages.Traced:
    run = RunConfig(
        name=program.name,
        model=config,
        optimizer=OptimizerConfig(peak_learning_rate=1e-4, warmup_steps=10),
        loss=LossConfig(chunks=8),
        mixture=(("text", 1.0),),
        steps=100,
        batch_size=program.rows,
        row_length=program.tokens,
        mesh=program.mesh,
        preset=program.preset,
        remat=True,
    )
    optimizer = train.make_optimizer(run.optimizer, steps=run.steps)
    build = train.initial_state(
        lambda: Llama4(config, key=jax.random.key(0), param_dtype="float32"), optimizer
    )
    ids = _integers(program.rows, program.tokens)
    batch = dict.fromkeys(("tokens_BT", "targets_BT", "positions_BT", "segments_BT"), ids)
    batch["loss_mask_BT"] = _integers(program.rows, program.tokens, "float32")
    step = jax.jit(train.pretraining_step(run, optimizer), donate_argnums=0)
    return step.trace(parallel.abstract(build), batch)


def _serving(mesh: str, long_mesh: str, layers: int) -> list[Program]:
    return [
        Program(
            name="decode", kind="decode", layers=layers, mesh=mesh, preset="tensor",
            rows=16, tokens=1, context=8192, scratch=1 * GB,
        ),
        Program(
            name="decode-loop", kind="loop", layers=layers, mesh=mesh, preset="tensor",
            rows=16, tokens=1, context=8192, scratch=1 * GB,
        ),
        Program(
            name="prefill-piece", kind="prefill", layers=layers, mesh=mesh, preset="tensor",
            rows=1, tokens=512, context=8192, held=16, scratch=1 * GB,
        ),
        Program(
            name="prefill", kind="prefill", layers=layers, mesh=mesh, preset="tensor",
            rows=1, tokens=8192, context=8192, held=16, scratch=4 * GB,
        ),
        Program(
            name="decode-1m", kind="decode", layers=layers, mesh=long_mesh, preset="long_context",
            rows=1, tokens=1, context=1 << 20, scratch=1 * GB,
        ),
        Program(
            name="prefill-1m", kind="prefill", layers=layers, mesh=long_mesh,
            preset="long_context", rows=1, tokens=2048, context=1 << 20, scratch=8 * GB,
        ),
        Program(
            name="decode-expert", kind="decode", layers=layers, preset="expert",
            mesh=mesh.replace("tensor", "expert"), rows=16, tokens=1, context=8192, scratch=1 * GB,
        ),
        Program(
            name="decode-single", kind="decode", layers=4, mesh="data:1", preset="single",
            rows=1, tokens=1, context=8192, scratch=1 * GB,
        ),
    ]  # fmt: skip


def _training(name: str, mesh: str, preset: str, scratch: int) -> Program:
    rows = math.prod(parallel.parse_mesh(mesh).values())
    return Program(
        name=name, kind="train", layers=4, mesh=mesh, preset=preset,
        rows=rows, tokens=8192, scratch=scratch,
    )  # fmt: skip


def programs(target: str, *, layers: int) -> list[Program]:
    """List the programs of a target, the depth of the serving ones given.

    Those that others are compared with come before them.
    """
    short, whole, divided = {
        "v5p": ("tensor:4", "fsdp:64", "fsdp:4,expert:16"),
        "h100": ("tensor:8", "fsdp:8", "fsdp:2,expert:4"),
    }[target]
    serving = _serving(short, "tensor:4,context:2", layers)
    if layers > SHALLOW:
        shallow = dataclasses.replace(serving[0], name="decode-shallow", layers=SHALLOW)
        serving.insert(0, shallow)
    return [
        *serving,
        _training("train", whole, "fsdp", 60 * GB),
        _training("train-expert", divided, "fsdp_expert", 60 * GB),
    ]


def judge(
    program: Program, target: Target, found: Figures, seen: Mapping[str, Figures]
) -> Iterator[str]:
    """Yield what is wrong with a program that compiles, beside those seen before it by name."""
    yield from memory_faults(found, target, program.scratch)
    if program.kind != "train":
        yield from (f"{each} where they should stay" for each in found.copied[:3])
    if program.kind in ("decode", "loop"):
        copied = dense_bytes(program) if target.package.startswith("jax") else 0.0
        yield from wasted(found, least_moved(program, found) + 2 * copied)
    if program.name == "decode" and "decode-shallow" in seen:
        yield from growth(found, seen["decode-shallow"])
    if program.name == "train-expert" and "train" in seen:
        yield from dearer(found, seen["train"])


def least_moved(program: Program, found: Figures, config: ModelConfig | None = None) -> float:
    """Return the bytes of a device that a step which draws must read: weights hit, and the cache.

    That is all there are but for the table of embeddings, of which a row is read for each token,
    and for the routed experts that so few rows cannot all reach.
    """
    text = (config or scout_slice(program.layers)).text
    sizes = parallel.parse_mesh(program.mesh)
    shards = math.prod(sizes.get(axis, 1) for axis in ("tensor", "expert"))
    table = 0 if text.tie_embeddings else text.vocab_size * text.embed_dim
    expert = 3 * text.embed_dim * text.expert_dim
    unread = max(0, text.num_experts - program.rows * text.experts_per_token)
    return found.arguments - 2 * (table + len(text.moe_layers) * unread * expert) / shards


def dense_bytes(program: Program, config: ModelConfig | None = None) -> float:
    """Return the bytes of a device's weights in attention and shared experts.

    XLA:GPU copies those of a layer out of their stack before it multiplies by them: they are read,
    written, and read again.
    """
    text = (config or scout_slice(program.layers)).text
    sizes = parallel.parse_mesh(program.mesh)
    heads = 2 * (text.num_heads + text.num_kv_heads) * text.head_dim
    each = text.embed_dim * (heads + 3 * text.expert_dim)
    shards = math.prod(sizes.get(axis, 1) for axis in ("tensor", "expert"))
    return 2 * text.num_layers * each / shards


def wasted(found: Figures, least: float) -> Iterator[str]:
    """Yield a complaint if a step moves more than it must."""
    if found.moved > MOST_MOVED * least:
        yield (
            f"moves {found.moved / GB:.2f} GB where it must move {least / GB:.2f}: "
            f"{found.moved / least:.2f} times as much, and {MOST_MOVED} should do"
        )


def growth(deep: Figures, shallow: Figures) -> Iterator[str]:
    """Yield a complaint if a deeper model makes a larger program or takes longer to compile."""
    if deep.instructions > 1.1 * shallow.instructions or deep.seconds > 3 * shallow.seconds + 30:
        yield (
            f"grows with depth: {deep.instructions} instructions in {deep.seconds:.0f} s, but "
            f"{shallow.instructions} in {shallow.seconds:.0f} s where it is shallow"
        )


def dearer(divided: Figures, whole: Figures) -> Iterator[str]:
    """Yield complaints if a program whose experts are divided costs more than the undivided one."""
    for name, own, other, most in (
        ("scratch memory", divided.scratch, whole.scratch, 1.3),
        ("FLOPs", divided.flops, whole.flops, 1.1),
    ):
        if own and other and own > most * other:
            yield (
                f"takes {own / other:.2f} times the {name} of undivided experts where {most} "
                "should do"
            )


def _collectives(found: Record) -> str:
    kinds = found["collectives"].items()
    said = " ".join(f"{''.join(w[0] for w in kind.split('-'))} {count}" for kind, count in kinds)
    return f"{said} ({found['in_group']})" if said else "none"


TABLE = Table(
    names=texts("target:6 name:14 layers:6 mesh:18 preset:12"),
    values=(
        *FIGURES,
        Column("GB a run", "figures.moved", unit=1e9),
        Column(" collectives", "figures", "<", _collectives),
    ),
    notes=FIGURES_NOTES
    + """\
Loop bodies: one of the groups of 4 layers, one block of queries in long attention, and of the
routed experts one block of rows, whose number is known at run time only. Collectives: all that
stand in the program (those in the loop over groups of layers, which repeats them): all-reduce ar,
all-gather ag, reduce-scatter rs, all-to-all ata, collective-permute cp.""",
)
