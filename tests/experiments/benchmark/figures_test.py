"""Figures are read from what compilers and kernels say, and memory is judged."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from experiments.benchmark import figures, hlo
from experiments.benchmark.figures import GB
from experiments.benchmark.topologies import TARGETS
from tests.experiments.benchmark.sound import SOUND, changed


def test_a_compiled_program_tells_its_figures(tmp_path):
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    text = tmp_path / "new" / "program.hlo"
    found = figures.compile_traced(jax.jit(lambda x: x @ x.T).trace(x), text)
    assert found.arguments == 4 * 64 * 128 and found.peak >= found.arguments
    assert found.flops == pytest.approx(2 * 64 * 64 * 128, rel=0.05)
    assert found.instructions >= 2 and found.declared is None and found.collectives == {}
    assert "HloModule" in text.read_text()


def test_a_program_that_fits_has_no_faults():
    assert not list(figures.memory_faults(SOUND, TARGETS["v5p"], GB))


def test_a_program_that_does_not_fit_the_device_is_a_fault():
    for known in ({"peak": 90 * GB}, {"arguments": 80 * GB, "scratch": 10 * GB}):
        (fault,) = figures.memory_faults(changed(**known), TARGETS["h100"])
        assert fault == "needs 90.0 GB of the device's 84.9"


def test_a_copy_of_the_experts_is_a_fault():
    copied = changed(scratch=4_100_000_000)
    (fault,) = figures.memory_faults(copied, TARGETS["v5p"], GB)
    assert "4.10 GB of scratch memory where 1.00 should do" in fault


def test_memory_for_scalars_is_read_from_the_kernels():
    def kernel(numbers, x_ref, out_ref, scratch):
        scratch[0] = numbers[0]
        out_ref[...] = x_ref[...] * scratch[0]

    call = functools.partial(
        pl.pallas_call(
            kernel,
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec()],
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            scratch_shapes=[pltpu.SMEM((4,), jnp.float32)],
        ),
        jnp.ones(16),
    )
    traced = jax.jit(call).trace(jnp.ones((8, 128)))
    assert figures.declared_smem(traced.jaxpr.jaxpr) == 64 + 16


def test_what_kernels_declare_is_added_up():
    def double(x, bytes_accessed):
        cost = pl.CostEstimate(flops=1, transcendentals=0, bytes_accessed=bytes_accessed)

        def kernel(x_ref, out_ref):
            out_ref[...] = 2 * x_ref[...]

        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, out_shape=out, cost_estimate=cost)(x)

    traced = jax.jit(lambda x: jax.jit(lambda x: double(x, 10))(x) + double(x, 5))
    assert figures.declared_bytes(traced.trace(jnp.ones(8)).jaxpr.jaxpr) == 15
    assert figures.declared_bytes(jax.make_jaxpr(jnp.sin)(1.0).jaxpr) is None


def test_of_a_gpu_program_kernels_and_the_rest_are_added_up():
    text = r"""
ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %k = f32[4]{0} custom-call(%a), custom_call_target="mosaic_gpu_v2", x = "y", \
cost_estimate_json = "{\22flops\22: 10, \22transcendentals\22: 1, \22bytes_accessed\22: 20}"
  ROOT %n = f32[4]{0} negate(%k)
}
""".replace("\\\n", "")
    said = figures.said_by_gpu_kernels(text)
    found = figures.counted(hlo.parse(text), said)
    assert found["flops"] == 10 and 20 < found["bytes accessed"] <= 20 + 32
    assert not any(figures.counted(hlo.parse(""), []).values())


@pytest.mark.parametrize("name", ["read", None])
@pytest.mark.parametrize(("space", "strays"), [("", False), ("S(1)", True)])
def test_what_a_kernel_copies_from_hbm_and_the_compiler_put_elsewhere_is_a_fault(
    space, strays, name
):
    call = functools.partial(
        pl.pallas_call(
            lambda *_: None,
            in_specs=[pl.BlockSpec(), pl.BlockSpec(memory_space=pltpu.HBM)],
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            name=name,
        ),
        jnp.ones((8, 128)),
    )
    traced = jax.jit(call).trace(jnp.ones((8, 128)))
    text = f"""
  %x = f32[8,128]{{1,0:T(8,128)S(1)}} parameter(0)
  %y = f32[8,128]{{1,0:T(8,128){space}}} parameter(1)
  %vmap_read_.1 = f32[8,128]{{1,0:T(8,128)}} custom-call(%x, /*index=1*/%y), \
custom_call_target="tpu_custom_call"
"""
    found = figures.strayed(hlo.parse(text), traced.jaxpr.jaxpr)
    assert found == (("y of vmap_read_.1 is in memory space 1",) if strays else ())
    faults = list(figures.memory_faults(changed(strayed=found), TARGETS["v5p"]))
    assert len(faults) == strays
