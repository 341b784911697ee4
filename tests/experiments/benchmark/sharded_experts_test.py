"""Experts divided over devices are traced from shapes, and each kind of fault is named."""

from types import SimpleNamespace

import jax
import pytest
from absl import flags

from experiments.benchmark import __main__ as command
from experiments.benchmark import compile_kernels, sharded_experts, suites
from experiments.benchmark.figures import GB
from experiments.benchmark.sharded_experts import PRODUCTS, Divided
from experiments.benchmark.topologies import TARGETS
from kernels_pallas import interpreted
from kernels_pallas.shapes import SHAPES, Experts
from llama4_jax import parallel
from tests.experiments.benchmark.sound import changed

SMALL = Experts(name="small", T=64, D=128, F=256, E=4)
SCOUT = Divided(shape=SHAPES["scout_experts_8k"], mesh="fsdp:4,expert:4", transport="dma")
HERE = SimpleNamespace(name="here", memory=GB, devices=lambda count: jax.devices()[:count])


def small(transport, mesh="fsdp:2,expert:4"):
    return Divided(shape=SMALL, mesh=mesh, transport=transport)


@pytest.mark.parametrize(
    ("transport", "direction"), [("xla", "forward"), ("xla", "backward"), ("dma", "forward")]
)
def test_a_pass_is_traced_from_shapes_alone_by_kernels_or_collectives(transport, direction):
    mesh = parallel.make_mesh("fsdp:2,expert:4", devices=jax.devices())
    with interpreted():
        traced = sharded_experts.trace(small(transport), direction, mesh)
    text = str(traced.jaxpr)
    assert ("expert_mlp_exchange" in text) == (transport == "dma")
    assert ("all_to_all[" in text) == (transport == "xla")
    outs = [out.shape for out in jax.tree.leaves(traced.out_info)]
    if direction == "forward":
        assert outs == [(8 * 64, 128)]
    else:
        matrices = [(4, 128, 256), (4, 128, 256), (4, 256, 128)]
        assert outs == [(8 * 64, 128), *matrices, (8 * 64, 1)]


def figures(direction, **known):
    """Figures of a sound pass of Scout's experts."""
    flops = 2.0 * PRODUCTS[direction] * 8192 * 5120 * 8192 * known.pop("times", 1.0)
    sound = {"flops": flops, "bytes": 9e9, "scratch": GB // 3, "arguments": 2 * GB, "peak": 3 * GB}
    return changed(seconds=1.0, **{**sound, **known})


@pytest.mark.parametrize(
    ("direction", "known", "says"),
    [
        ("forward", {}, []),
        ("backward", {"scratch": 4 * GB}, []),  # gradients of four experts' matrices are 3.0 GB
        ("forward", {"scratch": 4 * GB}, ["4.00 GB of scratch memory where 0.50"]),
        ("backward", {"scratch": 5 * GB}, ["5.00 GB of scratch memory where 4.52"]),
        ("forward", {"times": 11 / 8}, ["FLOPs by estimate are 1.375 times the products"]),
        ("backward", {"times": 11 / 8}, ["FLOPs by estimate are 1.375 times the products"]),
        ("backward", {"times": 5 / 8}, ["FLOPs by estimate are 0.625 times the products"]),
        ("forward", {"peak": 103 * GB}, ["needs 103.0 GB of the device's 102.8"]),
    ],
)
def test_what_needs_too_much_is_a_fault(direction, known, says):
    found = figures(direction, **known)
    faults = list(sharded_experts.judge(SCOUT, direction, TARGETS["v5p"], found))
    assert len(faults) == len(says)
    for fault, part in zip(faults, says, strict=True):
        assert part in fault


@pytest.mark.parametrize(
    ("transport", "mesh", "directions"),
    [("dma", "fsdp:2,expert:4", ["forward"]), ("xla", "expert:16", ["forward", "backward"])],
)
def test_what_does_not_compile_is_a_fault(transport, mesh, directions):
    """Here remote copies have no TPU, and 16 devices are not there."""
    records = list(sharded_experts.compile_divided(small(transport, mesh), HERE))
    assert [record["pass"] for record in records] == directions
    for record in records:
        (fault,) = record["faults"]
        assert fault.startswith("does not compile:")
        assert "FAULT" in sharded_experts.TABLE.line(record)


def test_what_compiles_is_laid_out_in_a_line(monkeypatch):
    monkeypatch.setattr(sharded_experts, "trace", lambda *_: None)
    monkeypatch.setattr(
        sharded_experts, "compile_traced", lambda *_: figures("forward", vmem=50 << 20)
    )
    record = next(sharded_experts.compile_divided(small("dma"), HERE))
    assert record["experts"] == 1 and record["faults"]
    said = sharded_experts.TABLE.line(record).split()
    assert said[:6] == ["here", "small_divided", "fsdp:2,expert:4", "1", "forward", "dma"]
    assert said[6:] == ["2", "0.3333", "3", "2062", "9", "50", "0.0009766", "1"]


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_every_generation_of_tpus_has_both_transports_on_scouts_shape(chip):
    found = sharded_experts.cases(["scout_experts_8k_divided"], chip)
    assert {case.transport for case in found} == {"xla", "dma"}
    assert {(case.shape.T, case.shape.D, case.shape.F) for case in found} == {(8192, 5120, 8192)}
    assert all(case.shape.E % case.num_local == 0 for case in found)


def test_shapes_divided_and_not_are_chosen_by_name(monkeypatch):
    ran = {}

    def record(what):
        def records(chosen, *_targets_and_schedules):
            ran[what] = chosen
            yield {"target": "here", "shape": what, "faults": []}

        return records

    monkeypatch.setattr(suites, "prepare", lambda: None)
    monkeypatch.setattr(compile_kernels, "records", record("whole"))
    monkeypatch.setattr(sharded_experts, "records", record("divided"))

    def chosen(*names):
        ran.clear()
        values = flags.FlagValues()
        command.define_flags(values)
        values(["command", "--suite=compile", f"--shapes={','.join(names)}"])
        found = suites.run_compile(values)
        assert [record["shape"] for record in found["records"]] == list(ran)
        assert {*names} <= {*found["shapes"]}
        return {what: len(cases) for what, cases in ran.items()}

    assert chosen("scout_experts_8k_divided") == {"divided": 1}
    assert chosen("scout_experts_8k") == {"whole": 1}
    assert chosen("scout_experts_8k", "scout_experts_8k_divided") == {"whole": 1, "divided": 1}
    assert chosen() == {"whole": len(SHAPES), "divided": 0}  # all of both
