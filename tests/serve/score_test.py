"""Scores equal the log softmax of the full forward, whatever the chunks, the mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from llama4_jax.data import preprocess, stack_tiles
from llama4_jax.layers.param import leaf_name
from llama4_jax.serve import EngineConfig, Request, device, score
from tests.serve import tiny

LENGTHS = (100, 1, 17, 2, 40)  # attention chunks hold 8 tokens, prefill chunks 16
SMALL = EngineConfig(max_rows=8, step_tokens=64, page_size=4)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tiny.pretrained(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def requests():
    return [Request(tokens=tiny.random_tokens(n, n)) for n in LENGTHS]


def expected_logprobs(tokens, tiles_NCHW=None):
    logprobs_TV = np.asarray(jax.nn.log_softmax(tiny.full_logits(tokens, tiles_NCHW)))
    return logprobs_TV[np.arange(len(tokens) - 1), tokens[1:]]


def check(scores, requests):
    for one, request in zip(scores, requests, strict=True):
        assert one.tokens == request.tokens
        # float32 logits of size 10, summed in another order
        np.testing.assert_allclose(one.logprobs, expected_logprobs(one.tokens), atol=1e-4)
        np.testing.assert_allclose(one.nll, -np.sum(one.logprobs), rtol=1e-6)


def test_logprobs_equal_the_full_forward_in_request_order(pretrained, requests):
    delivered = []
    scores = score(pretrained, requests, config=SMALL, on_score=delivered.append)
    check(scores, requests)
    assert delivered == scores


def test_logits_are_made_a_few_tokens_at_a_time(pretrained, requests, monkeypatch):
    seen = []
    score_tokens = device.programs.score_tokens

    def spy(*arrays, chunks, **how):
        seen.append(chunks)
        return score_tokens(*arrays, chunks=chunks, **how)

    monkeypatch.setattr(device.programs, "LOGITS", 8 * tiny.VOCAB)
    monkeypatch.setattr(device.programs, "score_tokens", spy)
    check(score(pretrained, requests[:1], config=SMALL), requests[:1])
    assert max(seen) == 8  # of 64 tokens


def test_a_text_begins_with_the_begin_of_text_token(pretrained):
    (by_text,) = score(pretrained, [Request(prompt="ab")], config=SMALL)
    assert by_text.tokens == [tiny.BOS, *b"ab"]
    assert len(by_text.logprobs) == 2


def test_images_fill_the_patch_tokens_that_are_there(pretrained):
    pictures = [tiny.picture(0), tiny.picture(1, wide=True)]
    tokens = tiny.random_tokens(3, 14)
    tokens += [tiny.PATCH] * 4 + [5] + [tiny.PATCH] * 12 + [6, 7]
    (one,) = score(pretrained, [Request(tokens=tokens, images=pictures)], config=SMALL)
    vision = tiny.config().vision
    tiles = stack_tiles([preprocess(p, vision, 4) for p in pictures], vision)
    np.testing.assert_allclose(one.logprobs, expected_logprobs(tokens, tiles), atol=1e-4)
    swapped = stack_tiles([preprocess(p, vision, 4) for p in pictures[::-1]], vision)
    assert np.abs(one.logprobs - expected_logprobs(tokens, swapped)).max() > 0.1


def test_a_request_longer_than_the_model_s_positions_is_refused(pretrained):
    long = Request(tokens=tiny.random_tokens(0, tiny.LONGEST + 1))
    with pytest.raises(ValueError, match="request 1 has 129 tokens, more than the model's 128"):
        score(pretrained, [Request(prompt="a"), long])


def test_a_score_that_is_not_finite_is_refused_after_those_before_it(pretrained, requests):
    def break_token_7(path, array):
        is_table = leaf_name(path) == "embed.table_VD"
        return array.at[7].set(np.nan) if is_table else array

    model = jax.tree_util.tree_map_with_path(break_token_7, pretrained.model)
    broken = dataclasses.replace(pretrained, model=model)
    bad = Request(tokens=[tiny.BOS, 5, 7, 9])
    delivered = []
    with pytest.raises(ValueError, match=r"request 1: the log probability of token \d is nan; the"):
        score(broken, [requests[3], bad], config=SMALL, on_score=delivered.append)
    assert [one.tokens for one in delivered] == [requests[3].tokens]
