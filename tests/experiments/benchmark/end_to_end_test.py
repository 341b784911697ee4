"""Whole models with kernels on and off: what is compared, and the bytes that a step must read."""

import jax
import pytest

from experiments.benchmark import end_to_end
from experiments.benchmark.timing import Machine
from kernels_pallas import backend
from llama4_jax.model import Cache, Llama4
from tests.tiny import scout_like

HERE = Machine(kind="cpu", platform="cpu", chip=None, copying=1e9)


def test_a_step_reads_all_weights_but_the_table_and_of_the_experts_those_that_are_hit():
    config = scout_like()
    model = jax.eval_shape(lambda: Llama4(config, key=jax.random.key(0)))
    cache = jax.eval_shape(lambda: Cache.create(config.text, batch_size=1, max_length=8))
    sizes = {"table": 0, "experts": 0, "rest": 0}
    for path, x in jax.tree_util.tree_leaves_with_path(model):
        where = jax.tree_util.keystr(path)
        kind = "table" if "embed" in where.split(".")[1] else "rest"
        sizes["experts" if "experts" in where else kind] += x.size * x.dtype.itemsize
    share = config.text.experts_per_token / config.text.num_experts
    one = end_to_end.bytes_of_step(model, cache, 1)
    assert one == pytest.approx(cache.num_bytes + sizes["rest"] + share * sizes["experts"])
    all_of_them = cache.num_bytes + sizes["rest"] + sizes["experts"]
    assert end_to_end.bytes_of_step(model, cache, 10_000) == pytest.approx(all_of_them)


def test_both_runs_differ_in_the_backend_alone(monkeypatch):
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    seen = end_to_end._on_and_off(lambda: backend._without_kernels.value)
    assert seen == (False, True)


def test_losses_and_logits_that_part_are_faults(monkeypatch):
    runs = iter([([3.0, 2.0], 1.0), ([3.0, 2.5], 2.0)])
    logits = iter([jax.numpy.ones(3), jax.numpy.zeros(3) + 2])
    monkeypatch.setattr(end_to_end, "loss_by_step", lambda _: next(runs))
    monkeypatch.setattr(end_to_end, "logits_of", lambda _: next(logits))
    monkeypatch.setattr(end_to_end, "decoding", lambda *_: (0.5, 1.0))
    found = {record["pass"]: record for record in end_to_end.records(HERE, ["nano"])}
    assert "logits differ by 0.5" in found["logits"]["faults"][0]
    assert found["train"]["relative_error"] == pytest.approx(0.2) and found["train"]["faults"]
    assert found["train"]["ratios"] == {"reference": 2.0} and not found["decode"]["faults"]


def test_the_rates_of_a_slice_are_those_of_its_bytes(monkeypatch):
    monkeypatch.setattr(end_to_end, "decoding", lambda *_: (0.01, 1e6))
    (record,) = end_to_end.records(HERE, ["scout_4_layers_16"])
    assert record["tokens_per_second"] == 1600 and record["of_copying"] == pytest.approx(0.1)
