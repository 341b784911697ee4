import jax
import numpy as np

from llama4_jax.config.runs import LossConfig
from llama4_jax.train import batch_loss, initial_state, make_optimizer, pretraining_step
from llama4_jax.train.state import name_leaves
from tests.train.toy import build, make_batch, make_run

BATCH = make_batch(np.arange(4))


def test_the_state_that_goes_in_is_given_up():
    run = make_run()
    optimizer = make_optimizer(run.optimizer, steps=run.steps)
    state = jax.jit(initial_state(build, optimizer))()
    table = state.model.table_VD[...]
    following, _ = pretraining_step(run, optimizer)(state, BATCH)
    assert table.is_deleted()
    assert following.step == 1


def test_metrics_say_what_the_step_did():
    run = make_run()
    optimizer = make_optimizer(run.optimizer, steps=run.steps)
    state = jax.jit(initial_state(build, optimizer))()
    expected = batch_loss(state.model, BATCH, config=run.loss)
    state, metrics = pretraining_step(run, optimizer)(state, BATCH)
    np.testing.assert_allclose(metrics["loss"], expected.total, rtol=1e-6)
    np.testing.assert_allclose(metrics["nll"], expected.sums.nll / 32, rtol=1e-6)
    assert metrics["tokens"] == 32
    assert metrics["learning_rate"] == 0
    assert metrics["gradient_norm"] > 0


def test_z_loss_pulls_the_log_partition_to_zero():
    model = build()
    plain = batch_loss(model, BATCH, config=LossConfig())
    with_z = batch_loss(model, BATCH, config=LossConfig(z_loss=0.5))
    expected = 0.5 * plain.sums.squared_log_z / plain.sums.weight
    np.testing.assert_allclose(with_z.total - plain.total, expected, rtol=1e-5)


def test_an_abstract_state_costs_nothing_and_tells_shapes():
    optimizer = make_optimizer(make_run().optimizer, steps=6)
    shapes = jax.eval_shape(initial_state(build, optimizer))
    leaf = name_leaves(shapes)["model.w_DV.value"]
    assert isinstance(leaf, jax.ShapeDtypeStruct)
    assert leaf.shape == (8, 16)
