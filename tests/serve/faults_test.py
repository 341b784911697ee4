"""Faults that other engines shipped for this model, one test each; none of them is ours.

Each docstring names the report. Chunks are of 8 tokens here, so that what fails at 8192 fails soon.
"""

import dataclasses
import itertools

import numpy as np
import pytest

from llama4_jax.serve import Engine, Options, Request
from tests.serve import tiny
from tests.serve.engine_test import SIZES, SPECULATING, alone, collect, prompts_of, same
from tests.serve.prefix_test import closed_form

CHUNK, PAGE = 8, SIZES.page_size
GREEDY = Options(max_new_tokens=10, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tiny.pretrained(tmp_path_factory.mktemp("tiny"))


def jobs_of(pretrained, *requests, options=GREEDY):
    return [(prompt, options) for prompt in prompts_of(pretrained, *requests)]


def test_an_answer_is_the_same_cold_warm_half_warm_and_after_eviction(pretrained):
    """vllm #19697: Scout's answers were cut short with the prefix cache on."""
    tokens = tiny.random_tokens(0, 21)
    (job,) = jobs_of(pretrained, Request(tokens=tokens))
    (half,) = jobs_of(pretrained, Request(tokens=[*tokens[:13], *tiny.random_tokens(1, 8)]))
    others = jobs_of(pretrained, *(Request(tokens=tiny.random_tokens(n, 30)) for n in range(2, 6)))
    engine, wanted = Engine(pretrained, SIZES), alone(pretrained, job)
    found = []
    for queue in ([job], [job], [half], others, [job]):
        before = engine.scheduler.found
        answers = collect(engine, queue)
        found.append(engine.scheduler.found - before)
        if queue == [job]:
            same(answers[0, 0], wanted[0, 0])
        if queue == [half]:
            same(answers[0, 0], alone(pretrained, half)[0, 0])
    cold, warm, half_warm, _, evicted = found
    assert (cold, warm) == (0, 20)
    assert 8 <= half_warm < warm
    assert evicted < warm


@pytest.mark.parametrize("length", range(CHUNK - 1, 3 * CHUNK, 3))
def test_drafts_leave_the_length_of_a_hit_alone(pretrained, length):
    """vllm #51441: with drafts some lengths of a prompt found nothing."""
    (job,) = jobs_of(pretrained, Request(tokens=tiny.random_tokens(length, length)))
    engine = Engine(pretrained, SPECULATING)
    engine.draft = lambda choice, most: [1] * most  # nearly always wrong
    first = collect(engine, [job])
    before = engine.scheduler.found
    same(collect(engine, [job])[0, 0], first[0, 0])
    computed = length + GREEDY.max_new_tokens - 1
    held_from = (computed - 1) // CHUNK * CHUNK  # chunks that were left may be gone
    least = closed_form(length, length, computed, held_from)
    most = closed_form(length, length, computed, 0)
    assert least <= engine.scheduler.found - before <= most


def test_a_loop_on_the_device_crosses_chunks(pretrained):
    """sglang #6162: past 8192 tokens captured loops answered gibberish."""
    tokens = tiny.random_tokens(3, CHUNK - 3)
    options = dataclasses.replace(GREEDY, max_new_tokens=3 * CHUNK)
    (job,) = jobs_of(pretrained, Request(tokens=tokens), options=options)
    assert SIZES.loops > 3
    (answer,) = collect(Engine(pretrained, SIZES), [job]).values()
    for token in answer["tokens"]:
        assert token == tiny.full_logits(tokens)[-1].argmax()
        tokens.append(token)


def test_rows_on_either_side_of_a_chunk_share_a_step(pretrained):
    """vllm #28993: metadata of many rows of Scout could not be built."""
    lengths = (CHUNK - 1, CHUNK, CHUNK + 1, 1)
    requests = [Request(tokens=tiny.random_tokens(n, n)) for n in lengths]
    jobs = jobs_of(pretrained, *requests)
    found = collect(Engine(pretrained, SIZES), jobs)
    for index, job in enumerate(jobs):
        same(found[index, 0], alone(pretrained, job)[0, 0])


def test_pictures_of_several_sizes_share_a_step(pretrained):
    """vllm #16280: pictures of two requests at a time were a crash."""
    pictures = [tiny.picture(1, wide=True)], [tiny.picture(0)], [tiny.picture(2)] * 2
    jobs = jobs_of(pretrained, *(Request(prompt="a", images=each) for each in pictures))
    wanted = [alone(pretrained, job)[0, 0] for job in jobs]  # first, whose programs then do for all
    found = collect(Engine(pretrained, SIZES), jobs)
    for index, answer in enumerate(wanted):
        same(found[index, 0], answer)


@pytest.mark.parametrize("kv_cache", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_eight_bit_caches_are_no_worse_beyond_two_chunks(pretrained, kv_cache):
    """vllm #23813: with an fp8 cache long prompts were read badly."""
    options = Options(max_new_tokens=0, prompt_logprobs=0)
    (prompt,) = prompts_of(pretrained, Request(tokens=tiny.random_tokens(4, 6 * CHUNK)))
    exact, rough = (
        scores(Engine(pretrained, dataclasses.replace(SIZES, kv_cache=kind)), prompt, options)
        for kind in ("auto", kv_cache)
    )
    error_T = np.abs(exact - rough)
    near, far = error_T[: 2 * CHUNK], error_T[2 * CHUNK :]
    assert 0 < far.mean() < 3 * near.mean()


def scores(engine, prompt, options):
    engine.submit(prompt, options)
    found = []
    while engine.is_busy:
        for event in engine.step():
            found += [each.logprob for each in event.prompt_logprobs or ()]
    return np.asarray(found)


FEATURES = {
    "drafts": {},
    "regex": {"regex": "[a-d ]{4,}"},
    "penalty": {"presence_penalty": 1.0, "repetition_penalty": 1.2},
    "logprobs": {"logprobs": 1},
    "several": {"n": 2, "temperature": 1.0, "seed": 3},
    "stop": {"stop": ["a", "  "]},
}


PAIRS = list(itertools.combinations(FEATURES, 2))
RARE = [pytest.param(pair, marks=pytest.mark.slow) for pair in PAIRS if "drafts" not in pair]


@pytest.mark.parametrize(
    "pair", [*(pair for pair in PAIRS if "drafts" in pair), *RARE], ids=lambda p: "+".join(p)
)
def test_what_may_be_asked_may_be_asked_together(pretrained, pair):
    """vllm #11484, #20284: grammars or adapters beside drafts were a crash."""
    options = dataclasses.replace(GREEDY, **FEATURES[pair[0]], **FEATURES[pair[1]])
    tokens = [tiny.BOS, *b"abcabcabcabc"]
    (job,) = jobs_of(pretrained, Request(tokens=tokens), options=options)
    engine = Engine(pretrained, SPECULATING if "drafts" in pair else SIZES)
    beside = jobs_of(pretrained, Request(tokens=tiny.random_tokens(9, 6)))
    found, wanted = collect(engine, [job, *beside]), alone(pretrained, job)
    for (_, choice), answer in wanted.items():
        same(found[0, choice], answer)
