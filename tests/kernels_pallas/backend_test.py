import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import kernels_pallas
from kernels_pallas import backend, chunked_attention, prefill_attention
from kernels_pallas.attention import tpu_sizes


def copy_that_is_not_waited_for(x_hbm, out_ref, buffer, arrived):
    copy = pltpu.make_async_copy(x_hbm, buffer, arrived)
    copy.start()
    out_ref[...] = buffer[...]
    copy.wait()


def copied_and_read_at_once(x):
    return pl.pallas_call(
        copy_that_is_not_waited_for,
        in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=backend.tpu_interpreter(),
    )(x)


def test_the_interpreter_reports_a_race():
    with (
        kernels_pallas.interpreted(),
        pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED"),
    ):
        jax.block_until_ready(copied_and_read_at_once(jnp.ones((8, 128))))
    pltpu.reset_tpu_interpret_mode_state()


def test_no_kernel_is_interpreted_unless_asked():
    assert backend.tpu_interpreter() is False
    assert backend.gpu_interpreter() is False
    with kernels_pallas.interpreted():
        assert backend.tpu_interpreter().detect_races
        assert backend.gpu_interpreter().detect_races
        assert backend.is_interpreting()
    assert not backend.is_interpreting()


def test_a_jitted_function_is_traced_anew_for_the_interpreter():
    seen = []

    @jax.jit
    def f(x):
        seen.append(backend.is_interpreting())
        return x

    f(np.float32(1))
    with kernels_pallas.interpreted():
        f(np.float32(1))
    assert seen == [False, True]


def test_programs_are_traced_for_the_device_at_hand():
    assert backend.platform() == "cpu"
    assert backend.device_kind() == "cpu"


def test_kernels_are_turned_off_for_what_is_traced_inside(monkeypatch):
    accepting = types.SimpleNamespace(unsupported_reason=lambda: None)
    reference = types.SimpleNamespace()
    modules = {"kernels_pallas.op.gpu": accepting, "kernels_pallas.op.reference": reference}
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    monkeypatch.setattr(backend.importlib, "import_module", modules.__getitem__)

    @jax.jit
    def f(x):
        return x + (backend.choose(None, "op") is reference)

    assert f(0) == 0
    with kernels_pallas.reference_only():
        assert f(0) == 1
    assert f(0) == 0


@pytest.mark.parametrize(
    ("kind", "is_taken"),
    [("TPU v4", False), ("TPU v99", False), ("TPU v5", True), ("TPU v6 lite", True)],
)
def test_no_kernel_is_taken_on_a_tpu_that_none_is_made_for(kind, is_taken, monkeypatch):
    made = types.SimpleNamespace(unsupported_reason=lambda: None)
    reference = types.SimpleNamespace()
    modules = {"kernels_pallas.op.tpu": made, "kernels_pallas.op.reference": reference}
    monkeypatch.setattr(backend, "platform", lambda: "tpu")
    monkeypatch.setattr(backend, "device_kind", lambda: kind)
    monkeypatch.setattr(backend.importlib, "import_module", modules.__getitem__)
    assert backend.choose(None, "op") is (made if is_taken else reference)
    if is_taken:
        assert backend.choose("tpu", "op") is made
    else:
        with pytest.raises(NotImplementedError, match=f"v5e, v5p, v6e, tpu7x, and this is {kind}"):
            backend.choose("tpu", "op")


@pytest.mark.parametrize(
    ("heads", "dtype", "queries"),
    [
        (40, "bfloat16", (128, 128, 128)),
        (64, "bfloat16", (128, 128, 128)),
        (64, "float32", (64, 64, 128)),
        (96, "float32", None),
    ],
)
def test_attention_takes_as_many_queries_at_a_time_as_vmem_holds(
    heads, dtype, queries, monkeypatch
):
    monkeypatch.setattr(backend, "device_kind", lambda: "TPU v5")
    q, k = jnp.zeros((1, 1024, heads, 256), dtype), jnp.zeros((1, 1024, 1, 256), dtype)
    at, lengths = jnp.zeros((1, 1024), jnp.int32), jnp.full((1,), 1024)

    def attend():
        return chunked_attention(q, k, k, q_positions_BT=at, kv_positions_BS=at, backend="tpu")

    def prefill():
        return prefill_attention(q, k, k, lengths_B=lengths, q_positions_BT=at, backend="tpu")

    cuts = []
    fit = tpu_sizes.fit_vmem
    monkeypatch.setattr(tpu_sizes, "fit_vmem", lambda *a: cuts.append(fit(*a)) or cuts[-1])
    with kernels_pallas.interpreted():
        if queries is None:
            with pytest.raises(NotImplementedError, match=r"VMEM, over 50331648; shard the heads"):
                jax.eval_shape(attend)
        else:
            jax.eval_shape(attend)
            assert tuple(cut.bq for cut in cuts[:3]) == queries
            cuts.clear()
            jax.eval_shape(prefill)
            assert cuts[0].bq == queries[0]
