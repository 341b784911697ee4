import dataclasses

import pytest

from llama4_jax.config.runs import LossConfig, OptimizerConfig
from tests.train.toy import make_run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"steps \(0\) must be at least 1"),
        ({"row_length": 65}, r"row_length \(65\) must be divisible by loss.chunks \(2\)"),
        ({"row_length": 128}, r"row_length \(128\) exceeds the model's max_positions \(64\)"),
        ({"steps": 1}, r"warmup_steps \(1\) must be less than steps \(1\)"),
        ({"mixture": ()}, "mixture is empty"),
        ({"mixture": (("code", 1.0), ("code", 2.0))}, "names a source twice"),
        ({"mixture": (("code", 0.0),)}, r"share of 'code' \(0.0\) must be positive"),
        ({"seed": -1}, r"seed \(-1\) must not be negative"),
    ],
)
def test_an_impossible_run_is_refused_with_its_value(changes, message):
    with pytest.raises(ValueError, match=message):
        make_run(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peak_learning_rate": 0.0}, r"peak_learning_rate \(0.0\) must be in \(0, 1\]"),
        ({"schedule": "linear"}, r"schedule \('linear'\) is unknown"),
        ({"beta2": 1.0}, r"beta2 \(1.0\) must be in \[0, 1\)"),
        ({"clip_norm": 0.0}, r"clip_norm \(0.0\) must be positive"),
        ({"decay_fraction": 0.0}, r"decay_fraction \(0.0\)"),
        ({"balance_bias_rate": 1.0}, r"balance_bias_rate \(1.0\) must be in \[0, 1\); try 1e-3"),
        ({"balance_bias_rate": -0.1}, r"balance_bias_rate \(-0.1\) must be in"),
    ],
)
def test_an_impossible_optimizer_is_refused_with_its_value(changes, message):
    valid = OptimizerConfig(peak_learning_rate=0.1, warmup_steps=1)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(valid, **changes)


def test_negative_loss_weights_are_refused():
    with pytest.raises(ValueError, match=r"z_loss \(-1.0\)"):
        LossConfig(z_loss=-1.0)


def test_a_rate_for_biases_that_the_model_lacks_is_refused_with_the_remedy():
    optimizer = OptimizerConfig(peak_learning_rate=0.1, warmup_steps=1, balance_bias_rate=0.001)
    with pytest.raises(ValueError, match=r"\(0.001\) moves what model 'toy' does not have; set"):
        make_run(optimizer=optimizer)
