"""Sampling rules on logits small enough to reason about by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.pretrained import GenerationDefaults
from llama4_jax.serve.options import Options
from llama4_jax.serve.sampling import (
    NOTHING,
    Changes,
    DrawRows,
    answer_key,
    change_logits,
    keep_top_k,
    keep_top_p,
    mask_logits,
    sample,
)

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32)
DRAWS = 2000


def rows_of(options, keys):
    resolved = [each.resolved(GenerationDefaults(), 1 << 20) for each in options]
    return DrawRows.of(resolved, keys)


def draw_many(options, probabilities=PROBABILITIES, draws=DRAWS):
    """Draw at one position after another, as one answer does."""
    logits_BV = jnp.tile(jnp.log(probabilities)[None], (draws, 1))
    rows = rows_of([options] * draws, [answer_key(options.seed)] * draws)
    return np.asarray(jax.jit(sample)(logits_BV, np.arange(draws, dtype=np.int32), rows))


def test_temperature_zero_is_greedy_whatever_the_rest_says():
    assert set(draw_many(Options(temperature=0, top_p=0.5, top_k=3, seed=7))) == {1}


def test_temperature_zero_takes_the_lowest_of_equal_tokens():
    assert set(draw_many(Options(), np.array([0.2, 0.4, 0.4], np.float32))) == {1}


def test_temperature_one_draws_the_model_s_own_distribution():
    counts = np.bincount(draw_many(Options(temperature=1.0)), minlength=5) / DRAWS
    np.testing.assert_allclose(counts, PROBABILITIES, atol=0.04)  # 3.6 standard errors


def test_a_lower_temperature_sharpens_the_distribution():
    counts = np.bincount(draw_many(Options(temperature=0.5)), minlength=5) / DRAWS
    np.testing.assert_allclose(counts, PROBABILITIES**2 / (PROBABILITIES**2).sum(), atol=0.04)


def test_the_smallest_temperature_is_greedy_and_finite():
    assert set(draw_many(Options(temperature=1e-30))) == {1}


@pytest.mark.parametrize("hot", [0.0, 1.0])
def test_nothing_is_drawn_where_a_logit_is_nan_and_neighbours_do_not_mind(hot):
    logits_BV = jnp.log(PROBABILITIES)[None].repeat(3, 0).at[1, 3].set(jnp.nan)
    rows = rows_of([Options(temperature=hot, top_p=0.9)] * 3, [answer_key(0)] * 3)
    good, bad, same = sample(logits_BV, np.zeros(3, np.int32), rows)
    assert bad == NOTHING and good == same >= 0


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
    assert set(draw_many(Options(temperature=1.0, top_p=top_p))) == kept


def test_the_token_exactly_at_the_limit_stays():
    scores = jnp.zeros((1, 4))  # exp(0) is 1 on every processor, so a share is a quarter exactly
    kept = jnp.isfinite(keep_top_p(scores, np.array([0.5], np.float32)))
    np.testing.assert_array_equal(kept, [[True, True, True, False]])


def test_top_p_sees_the_distribution_after_temperature():
    # Squared and renormalised, token 1 alone holds 0.58 of the probability.
    assert set(draw_many(Options(temperature=0.5, top_p=0.5))) == {1}
    assert set(draw_many(Options(temperature=1.0, top_p=0.5))) == {1, 3}


@pytest.mark.parametrize(("top_k", "kept"), [(1, {1}), (2, {1, 3}), (4, {0, 1, 3, 4})])
def test_top_k_keeps_the_k_likeliest(top_k, kept):
    assert set(draw_many(Options(temperature=1.0, top_k=top_k))) == kept


def test_a_top_k_beyond_the_vocabulary_keeps_everything():
    assert set(draw_many(Options(temperature=1.0, top_k=99))) == {0, 1, 2, 3, 4}


def test_top_p_shares_out_what_top_k_left():
    # Of the two left, token 1 holds 4/7: it alone lies within 0.5, both within 0.6.
    assert set(draw_many(Options(temperature=1.0, top_k=2, top_p=0.5))) == {1}
    assert set(draw_many(Options(temperature=1.0, top_k=2, top_p=0.6))) == {1, 3}


def test_the_seed_decides_the_draws():
    hot = {seed: draw_many(Options(temperature=1.0, seed=seed)) for seed in (0, 1)}
    np.testing.assert_array_equal(hot[0], draw_many(Options(temperature=1.0, seed=0)))
    assert (hot[0] != hot[1]).any()


def test_a_row_draws_the_same_in_any_company():
    hot = Options(temperature=1.0, top_p=0.95)
    logits_BV = jax.random.normal(jax.random.key(3), (6, 50))
    positions_B, keys = np.arange(6, dtype=np.int32), [answer_key(0, i) for i in range(6)]
    every = [hot] * 3 + [Options(), Options(temperature=2.0, top_k=3), Options(temperature=0.3)]
    together = sample(logits_BV, positions_B, rows_of(every, keys))
    for row, own in enumerate(every):
        one = slice(row, row + 1)
        alone = sample(logits_BV[one], positions_B[one], rows_of([own], keys[one]))
        assert alone[0] == together[row]


def test_answers_have_keys_of_their_own():
    keys = {answer_key(*numbers).tobytes() for numbers in ((0,), (1,), (0, 0), (0, 1), (1, 0))}
    assert len(keys) == 5


def test_draws_follow_the_exact_distribution():
    """Chi-square with 4 degrees of freedom: 18.5 is exceeded by chance once in 1,000."""
    draws = 20_000
    counts = np.bincount(draw_many(Options(temperature=1.0, seed=3), draws=draws), minlength=5)
    assert (((counts - draws * PROBABILITIES) ** 2) / (draws * PROBABILITIES)).sum() < 18.5
    kept = PROBABILITIES * (PROBABILITIES >= 0.12)  # of 0.4, 0.3 times as much or more
    options = Options(temperature=1.0, min_p=0.3, seed=4)
    counts = np.bincount(draw_many(options, draws=draws), minlength=5)
    wanted = draws * kept / kept.sum()
    assert counts[wanted == 0].sum() == 0
    apart = (counts - wanted)[wanted > 0] ** 2 / wanted[wanted > 0]
    assert apart.sum() < 13.8  # 2 degrees of freedom


def test_bias_then_repetition_then_what_is_subtracted_changes_single_logits():
    logits_BV = jnp.array([[1.0, -1.0, 3.0, 0.5], [1.0, 2.0, 3.0, 4.0]])
    beyond = 4
    changes = Changes(
        np.array([[0, 1, beyond], [3, beyond, beyond]], np.int32),
        np.array([[1.0, 0, 0], [-np.inf, 0, 0]], np.float32),
        np.array([[2.0, 2.0, 1], [1.0, 1, 1]], np.float32),
        np.array([[0.25, 0.5, 0], [0, 0, 0]], np.float32),
    )
    wanted = [[(1 + 1) / 2 - 0.25, -1 * 2 - 0.5, 3.0, 0.5], [1.0, 2.0, 3.0, -np.inf]]
    np.testing.assert_allclose(change_logits(logits_BV, changes), wanted)


def test_a_mask_rules_out_what_has_no_bit():
    allowed = np.array([[0b10, 0b1]], np.uint32)
    kept = np.isfinite(mask_logits(jnp.zeros((1, 40)), allowed))
    assert np.flatnonzero(kept[0]).tolist() == [1, 32]


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
        ({"top_p": 0.0}, "top_p and repetition_penalty must be above 0"),
        ({"top_p": 1.01}, "top_p \\(1.01\\)"),
        ({"top_k": -1}, "top_k \\(-1\\)"),
        ({"seed": -1}, "seed \\(-1\\)"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(wrong, says):
    with pytest.raises(ValueError, match=says):
        Options(**wrong)
