import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from llama4_jax.config.runs import OptimizerConfig
from llama4_jax.train.optimizer import decay_mask, make_optimizer, make_schedule
from llama4_jax.train.state import name_leaves

CONFIG = OptimizerConfig(peak_learning_rate=0.1, warmup_steps=10)


class Parameters(nnx.Module):
    def __init__(self):
        self.w_q_DNH = nnx.Param(jnp.ones((2, 2, 2)), role="matrix")
        self.router_DE = nnx.Param(jnp.ones((2, 2)), role="router")
        self.scale_D = nnx.Param(jnp.ones((3, 2)), role="norm")  # stacked over layers
        self.b_q_NH = nnx.Param(jnp.ones((2, 2)), role="bias")
        self.table_VD = nnx.Param(jnp.ones((2, 2)), role="embedding")
        self.a_DR = nnx.Param(jnp.ones((2, 2)), role="adapter")


def test_the_learning_rate_rises_to_the_peak_and_ends_at_the_final_ratio():
    schedule = make_schedule(CONFIG, steps=100)
    assert schedule(0) == 0
    np.testing.assert_allclose(schedule(5), 0.05, rtol=1e-6)
    np.testing.assert_allclose(schedule(10), 0.1, rtol=1e-6)
    np.testing.assert_allclose(schedule(55), 0.055, rtol=1e-5)
    np.testing.assert_allclose(schedule(100), 0.01, rtol=1e-5)


def test_wsd_stays_at_the_peak_and_falls_at_the_end():
    config = dataclasses.replace(CONFIG, schedule="wsd", decay_fraction=0.2)
    schedule = make_schedule(config, steps=100)
    np.testing.assert_allclose([schedule(s) for s in (10, 50, 80)], 0.1, rtol=1e-6)
    np.testing.assert_allclose(schedule(90), 0.055, rtol=1e-5)
    np.testing.assert_allclose(schedule(100), 0.01, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_without_warmup_the_first_step_has_the_peak_rate(schedule):
    config = dataclasses.replace(CONFIG, warmup_steps=0, schedule=schedule)
    np.testing.assert_allclose(make_schedule(config, steps=10)(0), 0.1, rtol=1e-6)


def test_only_matrices_and_routers_decay():
    decays = {name for name, yes in name_leaves(decay_mask(Parameters())).items() if yes}
    assert decays == {"w_q_DNH.value", "router_DE.value"}


def test_decay_shrinks_matrices_even_without_gradient():
    config = dataclasses.replace(CONFIG, warmup_steps=0, weight_decay=0.5)
    optimizer = make_optimizer(config, steps=10)
    parameters = Parameters()
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = optimizer.update(zeros, optimizer.init(parameters), parameters)
    changed = optax.apply_updates(parameters, updates)
    np.testing.assert_allclose(changed.w_q_DNH[...], 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(changed.scale_D[...], 1)


def test_a_gradient_beyond_the_clip_norm_counts_as_one_of_that_norm():
    # Adam's first update does not depend on the gradient's length unless epsilon is felt.
    config = dataclasses.replace(CONFIG, warmup_steps=0, weight_decay=0.0, epsilon=1.0)
    optimizer = make_optimizer(config, steps=10)
    parameters = {"w_D": jnp.zeros(4)}

    def update(length):
        gradient = {"w_D": jnp.full(4, length / 2)}
        return optimizer.update(gradient, optimizer.init(parameters), parameters)[0]["w_D"]

    np.testing.assert_allclose(update(100.0), update(1.0), rtol=1e-6)
    assert not np.allclose(update(0.5), update(1.0))
