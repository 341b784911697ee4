import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.config.runs import LossConfig
from llama4_jax.train import (
    batch_loss,
    initial_state,
    make_optimizer,
    make_train_step,
    pretraining_step,
    start_state,
)
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


def test_a_state_lies_where_its_model_does_so_that_the_second_step_compiles_nothing():
    optimizer = make_optimizer(make_run().optimizer, steps=6)
    model = jax.device_put(build(), jax.devices()[1])
    for leaf in jax.tree.leaves(start_state(model, optimizer=optimizer)):
        assert leaf.committed and leaf.devices() == {jax.devices()[1]}


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


def bad_loss(model, batch, key):
    """Divide by the batch's first weight: a zero makes the loss, and with it gradients, bad."""
    return jnp.square(model.w_DV[...]).mean() / batch["loss_mask_BT"][0, 0], {}


def bad_gradient(model, batch, key):
    """Have a finite loss whose gradient, that of a root at zero, is not."""
    return jnp.sqrt(jnp.square(model.w_DV[...] * batch["loss_mask_BT"][0, 0]).sum()), {}


@pytest.mark.parametrize("objective", [bad_loss, bad_gradient])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(objective):
    run = make_run()
    optimizer = make_optimizer(run.optimizer, steps=run.steps)
    step = make_train_step(
        objective,
        optimizer,
        schedule=lambda count: 1.0 * count,
        after_update=lambda model, _: jax.tree.map(lambda x: x + 1, model),
    )
    bad = BATCH | {"loss_mask_BT": np.zeros((4, 8), np.float32)}

    def after(*batches):
        state, rows = start_state(build(), optimizer=optimizer), []
        for batch in batches:
            state, metrics = step(state, batch)
            rows.append(tuple(int(metrics[n]) for n in ("skipped", "skipped_in_a_row")))
        return state, rows, metrics

    good, _, found = after(BATCH, BATCH)
    state, counts, metrics = after(BATCH, bad, bad, BATCH)
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0)]
    assert metrics["learning_rate"] == found["learning_rate"] == 1
    assert (state.step, good.step) == (4, 2)
    assert np.isfinite(metrics["gradient_norm"])
    for one, other in ((state.model, good.model), (state.opt_state, good.opt_state)):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_skipping_copies_nothing():
    """Scratch memory is gradients and what makes them: no old parameter or moment is copied."""
    run = make_run()
    optimizer = make_optimizer(run.optimizer, steps=run.steps)
    wide = lambda: type(build())(jax.random.key(0), embed_dim=512)  # noqa: E731
    shapes = jax.eval_shape(initial_state(wide, optimizer))
    step = make_train_step(bad_loss, optimizer)
    memory = step.lower(shapes, BATCH).compile().memory_analysis()
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes.model))
    # Moments chosen after the update, by `jnp.where`, need 1.9 times as much.
    assert memory.temp_size_in_bytes < 1.6 * gradients
