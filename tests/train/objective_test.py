"""One train step takes any objective, and trains what a filter chooses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.layers.linear import add_adapter, quantize, replace_weights
from llama4_jax.layers.param import is_parameter, leaf_name, role_of
from llama4_jax.model import Llama4
from llama4_jax.train import (
    adapters,
    make_optimizer,
    make_train_step,
    pretraining,
    pretraining_step,
    start_state,
)
from llama4_jax.train.state import name_leaves
from llama4_jax.train.trainable import all_parameters, combine, partition
from tests.tiny import maverick_like, scout_like
from tests.train.toy import build, make_batch, make_run

RUN = make_run()
BATCH = make_batch(np.arange(4))


def optimizer():
    return make_optimizer(RUN.optimizer, steps=RUN.steps)


def smallness(model, batch, key):
    """Make the matrix small; a metric shows the key."""
    del batch
    return jnp.square(model.w_DV[...]).mean(), {"draw": jax.random.uniform(key)}


def take_steps(objective, count=3, **how):
    model = how.pop("model", build())
    step = make_train_step(objective, optimizer(), **how)
    state = start_state(
        model, optimizer=optimizer(), trainable=how.get("trainable", all_parameters)
    )
    metrics = []
    for _ in range(count):
        state, found = step(state, BATCH)
        metrics.append(found)
    return state, metrics


def test_two_objectives_share_one_train_step():
    state, metrics = take_steps(smallness)
    assert [m["loss"] for m in metrics] == sorted((m["loss"] for m in metrics), reverse=True)
    always = {"loss", "gradient_norm", "skipped", "skipped_in_a_row"}
    assert set(metrics[0]) == {"draw", *always} and state.step == 3
    _, metrics = take_steps(pretraining(RUN.loss))
    assert {"nll", "accuracy", "tokens", *always} == set(metrics[0])


def test_each_step_has_a_key_of_its_own_that_the_seed_decides():
    draws = [m["draw"].item() for m in take_steps(smallness)[1]]
    assert len(set(draws)) == 3
    assert draws == [m["draw"].item() for m in take_steps(smallness)[1]]
    assert draws != [m["draw"].item() for m in take_steps(smallness, seed=1)[1]]


def test_a_filter_decides_what_is_trained_and_what_has_moments():
    before = build()
    state, _ = take_steps(pretraining(RUN.loss), trainable=lambda name, _: name == "w_DV")
    assert jnp.any(state.model.w_DV[...] != before.w_DV[...])
    np.testing.assert_array_equal(state.model.table_VD[...], before.table_VD[...])
    moments = [name for name in name_leaves(state.opt_state) if ".mu." in name]
    assert len(moments) == 1 and "w_DV" in moments[0]


def test_adapters_learn_on_a_matrix_of_whole_numbers_that_stays_as_it_is():
    class Adapted(type(build())):
        def unembed(self, x_BTD):
            from llama4_jax.layers.linear import project

            return project("BTD,DV->BTV", x_BTD, self.w_DV, out=("batch", "seq", "vocab"))

    def adapt(name, parameter):
        if name != "w_DV":
            return parameter
        base = quantize(parameter, "int8")
        return add_adapter(base, rank=4, alpha=8, key=jax.random.key(1))

    model = replace_weights(Adapted(jax.random.key(0)), adapt)
    values = model.w_DV.base.values[...] + 0  # the state is given up
    state, metrics = take_steps(pretraining(RUN.loss), 6, model=model, trainable=adapters)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    np.testing.assert_array_equal(state.model.w_DV.base.values[...], values)
    assert jnp.any(state.model.w_DV.b[...] != 0)


def test_a_rule_beside_the_gradient_sees_the_metrics():
    def after(model, metrics):
        return jax.tree.map(lambda x: jnp.full_like(x, metrics["draw"]), model)

    state, metrics = take_steps(smallness, 1, after_update=after)
    np.testing.assert_array_equal(state.model.scale_D[...], metrics[0]["draw"])


def test_a_run_reports_its_learning_rate():
    state = start_state(build(), optimizer=optimizer())
    _, metrics = pretraining_step(RUN, optimizer())(state, BATCH)
    assert metrics["learning_rate"] == 0


def test_a_model_taken_apart_and_put_together_is_the_same():
    model = build()
    parts = partition(model, lambda name, _: name == "scale_D")
    assert [len(jax.tree.leaves(part)) for part in parts] == [1, 2]
    whole = combine(*parts)
    assert jax.tree.structure(whole) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, whole, model)


@pytest.mark.parametrize("config", [scout_like(balance_bias=True), maverick_like()])
def test_roles_are_what_names_say(config):
    model = jax.eval_shape(lambda: Llama4(config, key=jax.random.key(0)))
    endings = (
        (r"router_DE", "router"),
        (r"(^|_)w_[A-Z]+|w_[a-z]+_[A-Z]+", "matrix"),
        (r"scale_D", "norm"),
        (r"bias_E", "buffer"),
        (r"bias_D|b_[a-z]+_[A-Z]+", "bias"),
        (r"table_VD|class_embedding_D|position_embedding_PD", "embedding"),
    )
    for path, node in jax.tree_util.tree_leaves_with_path(model, is_leaf=is_parameter):
        last = leaf_name(path).rpartition(".")[2]
        expected = next(role for ending, role in endings if re.fullmatch(f".*?(?:{ending})", last))
        assert role_of(node) == expected, leaf_name(path)
