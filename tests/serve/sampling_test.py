"""Sampling rules on logits small enough to reason about by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.serve.sampling import (
    Sampling,
    SamplingRows,
    keep_top_k,
    keep_top_p,
    row_keys,
    sample,
)

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32)
DRAWS = 2000


def draw_many(sampling, probabilities=PROBABILITIES, draws=DRAWS):
    logits_BV = jnp.tile(jnp.log(probabilities)[None], (draws, 1))
    keys_B = row_keys(np.full(draws, sampling.seed), np.arange(draws))
    rows = SamplingRows.of([sampling] * draws)
    return np.asarray(jax.jit(sample)(logits_BV, keys_B, rows))


def test_temperature_zero_is_greedy_whatever_the_rest_says():
    assert set(draw_many(Sampling(temperature=0, top_p=0.5, top_k=3, seed=7))) == {1}


def test_temperature_zero_takes_the_lowest_of_equal_tokens():
    assert set(draw_many(Sampling(), np.array([0.2, 0.4, 0.4], np.float32))) == {1}


def test_temperature_one_draws_the_model_s_own_distribution():
    counts = np.bincount(draw_many(Sampling(temperature=1.0)), minlength=5) / DRAWS
    np.testing.assert_allclose(counts, PROBABILITIES, atol=0.04)  # 3.6 standard errors


def test_a_lower_temperature_sharpens_the_distribution():
    counts = np.bincount(draw_many(Sampling(temperature=0.5)), minlength=5) / DRAWS
    np.testing.assert_allclose(counts, PROBABILITIES**2 / (PROBABILITIES**2).sum(), atol=0.04)


def test_the_smallest_temperature_is_greedy_and_finite():
    assert set(draw_many(Sampling(temperature=1e-30))) == {1}


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, {1}),
        (0.39, {1}),
        (0.41, {1, 3}),
        (0.69, {1, 3}),
        (0.71, {1, 3, 4}),
        (0.96, {0, 1, 2, 3, 4}),
    ],
)
def test_top_p_keeps_tokens_while_the_probability_before_them_is_within_it(top_p, kept):
    assert set(draw_many(Sampling(temperature=1.0, top_p=top_p))) == kept


def test_the_token_exactly_at_the_limit_stays():
    scores = jnp.zeros((1, 4))  # exp(0) is 1 on every processor, so a share is a quarter exactly
    kept = jnp.isfinite(keep_top_p(scores, np.array([0.5], np.float32)))
    np.testing.assert_array_equal(kept, [[True, True, True, False]])


def test_top_p_sees_the_distribution_after_temperature():
    # Squared and renormalised, token 1 alone holds 0.58 of the probability.
    assert set(draw_many(Sampling(temperature=0.5, top_p=0.5))) == {1}
    assert set(draw_many(Sampling(temperature=1.0, top_p=0.5))) == {1, 3}


@pytest.mark.parametrize(("top_k", "kept"), [(1, {1}), (2, {1, 3}), (4, {0, 1, 3, 4})])
def test_top_k_keeps_the_k_likeliest(top_k, kept):
    assert set(draw_many(Sampling(temperature=1.0, top_k=top_k))) == kept


def test_a_top_k_beyond_the_vocabulary_keeps_everything():
    assert set(draw_many(Sampling(temperature=1.0, top_k=99))) == {0, 1, 2, 3, 4}


def test_top_p_shares_out_what_top_k_left():
    # Of the two left, token 1 holds 4/7: it alone lies within 0.5, both within 0.6.
    assert set(draw_many(Sampling(temperature=1.0, top_k=2, top_p=0.5))) == {1}
    assert set(draw_many(Sampling(temperature=1.0, top_k=2, top_p=0.6))) == {1, 3}


def test_the_seed_decides_the_draws():
    hot = {seed: draw_many(Sampling(temperature=1.0, seed=seed)) for seed in (0, 1)}
    np.testing.assert_array_equal(hot[0], draw_many(Sampling(temperature=1.0, seed=0)))
    assert (hot[0] != hot[1]).any()


def test_a_row_draws_the_same_in_any_company():
    sampling = Sampling(temperature=1.0, top_p=0.95)
    logits_BV = jax.random.normal(jax.random.key(3), (6, 50))
    keys_B = row_keys(np.zeros(6), np.arange(6))
    others = [Sampling(), Sampling(temperature=2.0, top_k=3), Sampling(temperature=0.3)]
    together = sample(logits_BV, keys_B, SamplingRows.of([sampling] * 3 + others))
    for row, own in enumerate([sampling] * 3 + others):
        one = slice(row, row + 1)
        alone = sample(logits_BV[one], keys_B[one], SamplingRows.of([own]))
        assert alone[0] == together[row]


def by_sorting(scores_V, top_k, top_p):
    """Return which scores stay, by the definition: in falling order, the lower id first."""
    order = sorted(range(len(scores_V)), key=lambda i: (-scores_V[i], i))[: top_k or None]
    weights = np.exp(scores_V[order].astype(np.float64))
    before = (np.cumsum(weights) - weights) / weights.sum()
    is_kept = np.zeros(len(scores_V), bool)
    is_kept[[i for i, mass in zip(order, before, strict=True) if top_p == 1 or mass <= top_p]] = 1
    return is_kept


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(0, 1.0), (1, 1.0), (7, 1.0), (0, 0.02), (0, 0.6), (0, 0.97), (9, 0.5), (999, 0.9)],
)
def test_thresholds_by_bisection_keep_what_sorting_keeps_among_equals_too(top_k, top_p):
    rng = np.random.default_rng(0)
    scores_BV = np.concatenate(
        [
            rng.normal(size=(3, 64)) * 3,
            np.round(rng.normal(size=(3, 64)) * 2) / 2,  # many equals
            np.full((1, 64), -0.5),
            np.where(rng.random((1, 64)) < 0.5, 0.0, -0.0),
        ]
    ).astype(np.float32)
    count = len(scores_BV)
    kept = keep_top_k(jnp.asarray(scores_BV), np.full(count, top_k, np.int32))
    kept = np.isfinite(keep_top_p(kept, np.full(count, top_p, np.float32)))
    for scores_V, found in zip(scores_BV, kept, strict=True):
        np.testing.assert_array_equal(found, by_sorting(scores_V + 0.0, top_k, top_p))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": -0.1}, "temperature \\(-0.1\\)"),
        ({"temperature": float("nan")}, "temperature \\(nan\\)"),
        ({"top_p": 0.0}, "top_p \\(0.0\\)"),
        ({"top_p": 1.01}, "top_p \\(1.01\\)"),
        ({"top_k": 0}, "top_k \\(0\\)"),
        ({"seed": -1}, "seed \\(-1\\)"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(wrong, says):
    with pytest.raises(ValueError, match=says):
        Sampling(**wrong)
