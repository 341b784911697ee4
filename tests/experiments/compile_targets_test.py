"""Programs are lowered from shapes, their figures read, and each kind of fault is named."""

import dataclasses

import jax
import pytest
from absl import flags

from experiments import compile_report, compile_targets
from experiments.benchmark import programs
from experiments.benchmark.topologies import TARGETS
from experiments.compile_report import Figures
from experiments.flags import FlagError
from tests.tiny import CHUNK, scout_like

SOUND = Figures(
    arguments=60_000_000_000,
    scratch=100_000_000,
    peak=60_100_000_000,
    flops=17e9,
    bytes_moved=3e9,
    collectives={"all-reduce": 9},
    in_group=8,
    instructions=1000,
    seconds=20.0,
)
DECODE = programs.programs("v5p", layers=48)[0]


def small(kind, mesh, preset):
    """A program that eight virtual CPU devices compile in seconds."""
    context = 0 if kind == "train" else 4 * CHUNK
    return programs.Program(
        name=kind, kind=kind, layers=5, mesh=mesh, preset=preset,
        rows=8, tokens=2 * CHUNK, context=context, scratch=programs.GB,
    )  # fmt: skip


def values_of(*arguments):
    values = flags.FlagValues()
    compile_targets.define_flags(values)
    values(["command", *arguments])
    return values


@pytest.mark.parametrize(
    ("kind", "mesh", "preset"),
    [
        ("decode", "tensor:2", "tensor"),
        ("prefill", "tensor:2,context:4", "long_context"),
        ("train", "fsdp:2,expert:4", "fsdp_expert"),
    ],
)
def test_every_kind_of_program_is_lowered_from_shapes_alone(kind, mesh, preset):
    lowered = programs.lower(small(kind, mesh, preset), jax.devices(), scout_like())
    assert all(isinstance(leaf, jax.stages.ArgInfo) for leaf in jax.tree.leaves(lowered.args_info))


def test_the_figures_of_a_compiled_program_are_read():
    lowered = programs.lower(small("decode", "tensor:2", "tensor"), jax.devices(), scout_like())
    found = compile_report.read(lowered.compile(), seconds=1.0)
    assert found.arguments > 0 and found.peak >= found.arguments
    assert found.flops and found.instructions > 100
    # A layer sums over heads and over hidden features; five layers, one of them outside the scan.
    assert found.collectives["all-reduce"] >= 10
    assert 8 <= found.in_group < found.collectives["all-reduce"]
    line = compile_report.line(TARGETS["v5p"], small("decode", "tensor:2", "tensor"), found)
    assert "tensor:2" in line and f"ar {found.collectives['all-reduce']}" in line


def test_the_products_of_a_gpu_program_are_counted():
    text = """
  %a = bf16[16,896,320]{2,1,0} parameter(0)
  %b = bf16[16,320,64]{2,1,0} parameter(1)
  %dot.1 = f32[16,896,64]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}
  %call = (bf16[320,128]{1,0}, s8[64]{0}) custom-call(%c, %d), custom_call_target="__cublas$gemm", \
backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"]}}
  %c = bf16[500,320]{1,0} parameter(2)
"""
    assert compile_report.product_flops(text) == 2 * (16 * 896 * 64 * 320 + 320 * 128 * 500)


def test_a_program_that_fits_has_no_faults():
    assert list(compile_report.faults(TARGETS["v5p"], DECODE, SOUND)) == []
    assert list(compile_report.growth(SOUND, SOUND)) == []


def test_a_program_that_does_not_fit_the_device_is_a_fault():
    (fault,) = compile_report.faults(
        TARGETS["h100"], DECODE, dataclasses.replace(SOUND, peak=90_000_000_000)
    )
    assert fault == "needs 90.0 GB of the device's 84.9"


def test_a_copy_of_the_experts_is_a_fault():
    copied = dataclasses.replace(SOUND, scratch=4_100_000_000)
    (fault,) = compile_report.faults(TARGETS["v5p"], DECODE, copied)
    assert "4.10 GB of scratch memory where 1.00 should do" in fault


def test_a_program_that_grows_with_depth_is_a_fault():
    (fault,) = compile_report.growth(dataclasses.replace(SOUND, instructions=6000), SOUND)
    assert "6000 instructions" in fault
    assert list(compile_report.growth(dataclasses.replace(SOUND, seconds=200.0), SOUND))


def test_dividing_experts_that_costs_more_is_a_fault():
    assert list(compile_report.dearer(SOUND, SOUND)) == []
    (fault,) = compile_report.dearer(dataclasses.replace(SOUND, flops=1.2 * 17e9), SOUND)
    assert "1.20 times the FLOPs" in fault
    (fault,) = compile_report.dearer(dataclasses.replace(SOUND, scratch=140_000_000), SOUND)
    assert "1.40 times the scratch memory" in fault


def test_programs_are_chosen_by_name_and_depth():
    (decode,) = compile_targets.wanted(values_of("--only=decode", "--layers=12"), "v5p")
    assert decode.layers == 12 and decode.kind == "decode"
    shallow, *_ = compile_targets.wanted(values_of(), "h100")
    assert shallow.layers == compile_targets.SHALLOW


@pytest.mark.parametrize("argument", ["--only=decoed", "--layers=6"])
def test_a_wrong_choice_is_refused(argument):
    with pytest.raises(FlagError):
        compile_targets.wanted(values_of(argument), "v5p")
