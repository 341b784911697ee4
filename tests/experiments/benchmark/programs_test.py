"""Programs are traced from shapes, compiled, laid out in a line, and judged."""

import dataclasses

import jax
import pytest

from experiments.benchmark import figures, programs
from experiments.benchmark.figures import GB
from experiments.benchmark.topologies import TARGETS
from tests.experiments.benchmark.sound import SOUND, changed
from tests.tiny import CHUNK, scout_like


def small(kind, mesh, preset):
    """A program that eight virtual CPU devices compile in seconds."""
    context = 0 if kind == "train" else 4 * CHUNK
    return programs.Program(
        name=kind, kind=kind, layers=5, mesh=mesh, preset=preset,
        rows=8, tokens=2 * CHUNK, context=context, scratch=GB,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "mesh", "preset"),
    [
        ("decode", "tensor:2", "tensor"),
        ("loop", "tensor:2", "tensor"),
        ("prefill", "tensor:2,context:4", "long_context"),
        ("train", "fsdp:2,expert:4", "fsdp_expert"),
    ],
)
def test_every_kind_of_program_is_traced_from_shapes_alone(kind, mesh, preset):
    traced = programs.trace(small(kind, mesh, preset), jax.devices(), scout_like())
    leaves = jax.tree.leaves(traced.lower().args_info)
    assert leaves and all(isinstance(leaf, jax.stages.ArgInfo) for leaf in leaves)


def test_a_program_is_compiled_and_laid_out_in_a_line():
    program = small("decode", "tensor:2", "tensor")
    found = figures.compile_traced(programs.trace(program, jax.devices(), scout_like()))
    assert found.arguments > 0 and found.peak >= found.arguments
    assert found.flops and found.instructions > 100
    # A layer sums over heads and over hidden features: two in a group, and one outside the scan.
    assert found.collectives["all-reduce"] >= 6
    assert 4 <= found.in_group < found.collectives["all-reduce"]
    record = {"target": "v5p", **vars(program), "figures": vars(found), "faults": []}
    # A step moves what it must: weights and the cache, and little else that is as large.
    assert not found.copied
    assert found.moved > programs.least_moved(program, found, scout_like())
    line = programs.TABLE.line(record)
    assert "tensor:2" in line and f" ar {found.collectives['all-reduce']}" in line
    assert line.endswith(f"({found.in_group})")


DECODE = programs.programs("v5p", layers=8)[0]
SHALLOW, DEEP, *_ = programs.programs("v5p", layers=48)
TRAIN, DIVIDED = programs.programs("v5p", layers=48)[-2:]


def judged(program, found, **seen):
    return list(programs.judge(program, TARGETS["v5p"], found, seen))


def test_a_program_that_needs_more_scratch_than_it_should_is_a_fault():
    assert DECODE.name == "decode" and not judged(DECODE, SOUND)
    (fault,) = judged(DECODE, changed(scratch=2 * GB))
    assert "2.00 GB of scratch memory where 1.00 should do" in fault


def test_a_copied_cache_is_a_fault_but_not_in_training():
    copied = changed(copied=("copy.7 makes 1,000 bytes of pages",))
    assert judged(DECODE, copied) == ["copy.7 makes 1,000 bytes of pages where they should stay"]
    assert not judged(TRAIN, copied)


@pytest.mark.parametrize("kind", ["decode", "loop", "prefill"])
def test_a_step_that_draws_may_move_little_but_weights_and_cache(kind):
    program = dataclasses.replace(DECODE, kind=kind)
    least = programs.least_moved(program, SOUND)
    table = 2 * 202_048 * 5120 / 4
    assert least == SOUND.arguments - table, "16 rows may reach all 16 experts"
    assert not judged(program, changed(moved=1.04 * least))
    faults = judged(program, changed(moved=1.06 * least))
    assert faults == [] if kind == "prefill" else "1.06 times as much" in faults[0]


def test_on_gpus_dense_weights_may_be_copied_out_of_their_stack():
    dense = 2 * 8 * 5120 * (2 * (40 + 8) * 128 + 3 * 8192) / 4
    assert programs.dense_bytes(DECODE) == dense
    moved = changed(moved=programs.least_moved(DECODE, SOUND) + 2 * dense)
    assert not list(programs.judge(DECODE, TARGETS["h100"], moved, {}))
    more = changed(moved=1.06 * moved.moved)
    assert "1.06 times" in next(iter(programs.judge(DECODE, TARGETS["h100"], more, {})))


def test_one_row_reads_one_of_the_experts():
    one = dataclasses.replace(DECODE, rows=1)
    expert = 2 * 3 * 5120 * 8192 / 4
    least = programs.least_moved(DECODE, SOUND)
    assert programs.least_moved(one, SOUND) == least - DECODE.layers * 15 * expert


def test_a_program_that_grows_with_depth_is_a_fault():
    assert (SHALLOW.name, DEEP.name) == ("decode-shallow", "decode")
    assert not judged(DEEP, SOUND, **{"decode-shallow": SOUND})
    (fault,) = judged(DEEP, changed(instructions=6000), **{"decode-shallow": SOUND})
    assert "6000 instructions" in fault
    assert judged(DEEP, changed(seconds=200.0), **{"decode-shallow": SOUND})


def test_dividing_experts_that_costs_more_is_a_fault():
    assert (TRAIN.name, DIVIDED.name) == ("train", "train-expert")
    assert not judged(DIVIDED, SOUND, train=SOUND)
    (fault,) = judged(DIVIDED, changed(flops=1.2 * 17e9), train=SOUND)
    assert "1.20 times the FLOPs" in fault
    (fault,) = judged(DIVIDED, changed(scratch=140_000_000), train=SOUND)
    assert "1.40 times the scratch memory" in fault
