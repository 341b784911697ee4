"""Whoever else is served, every answer is that of its request alone, and nothing is left behind."""

import dataclasses

import numpy as np
import pytest

from llama4_jax.serve import Engine, EngineConfig, Options, Request
from llama4_jax.serve.device import Device
from llama4_jax.serve.requests import read_requests
from tests.serve import tiny

# Chunks of 8 tokens, pages of 4. A request has up to 56 tokens, 14 pages; 16 make rows give way.
PAGE_BYTES = 1024
SIZES = EngineConfig(
    max_rows=4, step_tokens=24, max_context=56, page_size=4, cache_bytes=32 * PAGE_BYTES
)
SPECULATING = dataclasses.replace(SIZES, speculate="ngram")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tiny.pretrained(tmp_path_factory.mktemp("tiny"))


def prompts_of(pretrained, *requests):
    return read_requests(pretrained, requests)


def collect(engine, jobs, *, cancel=(), rng=None):
    """Serve jobs (prompt, options) that come at random times; return what each choice got."""
    waiting, numbers, found = list(enumerate(jobs)), {}, {}
    while waiting or engine.is_busy:
        while waiting and (rng is None or rng.random() < 0.7):
            index, (prompt, options) = waiting.pop(0)
            numbers[engine.submit(prompt, options)] = index
        for request, index in numbers.items():
            if index in cancel and rng is not None and rng.random() < 0.1:
                engine.cancel(request)
        for event in engine.step():
            index = numbers[event.request]
            got = found.setdefault((index, event.choice), {"tokens": [], "text": "", "scores": []})
            got["tokens"] += event.tokens
            got["text"] += "".join(event.texts)
            got["scores"] += [each.logprob for each in event.logprobs or ()]
            got["end"] = event.finish_reason
    assert engine.scheduler.whole.held == engine.scheduler.chunk.held == 0
    assert not engine.scheduler.running and not engine.scheduler.waiting
    return found


def alone(pretrained, job, config=SIZES):
    return collect(Engine(pretrained, config), [job])


def same(found, wanted):
    assert found["tokens"] == wanted["tokens"]
    assert (found["text"], found["end"]) == (wanted["text"], wanted["end"])
    # float32 in batches of another size: 1e-5 as a rule, and 6e-4 where qk-norm makes a small
    # vector large (there the whole forward pass is 5e-4 away from both)
    np.testing.assert_allclose(found["scores"], wanted["scores"], atol=3e-3)


def some_request(rng):
    length = int(rng.integers(1, 42))  # up to five chunks
    if rng.random() < 0.2:
        return Request(prompt="ab", images=[tiny.picture(int(rng.integers(3)))])
    if rng.random() < 0.5:  # drafts are often right here, and prefixes shared
        return Request(tokens=[tiny.BOS, *([65, 66, 67] * 10)[: length - 1]])
    return Request(tokens=tiny.random_tokens(int(rng.integers(4)), length))


def some_options(rng):
    hot = {"temperature": float(rng.choice([0.5, 1.0])), "seed": int(rng.integers(5))}
    return Options(
        max_new_tokens=int(rng.integers(1, 16)),
        **(hot if rng.random() < 0.5 else {}),
        top_p=float(rng.choice([0.8, 1.0])),
        top_k=int(rng.choice([0, 20])),
        min_p=float(rng.choice([0.0, 0.01])),
        n=int(rng.choice([1, 1, 2])),
        stop=[["a"], ["bc", "Z"], []][rng.integers(3)],
        stop_ids=[int(token) for token in rng.integers(0, 256, rng.integers(0, 40))],
        logprobs=[None, 0, 2][rng.integers(3)],
        repetition_penalty=float(rng.choice([1.0, 1.0, 1.3])),
        frequency_penalty=float(rng.choice([0.0, 0.0, 0.7])),
        logit_bias=[{}, {70: 3.0, 71: -100.0}][rng.integers(2)],
        regex=[None, None, None, "[ -~]*"][rng.integers(4)],
        priority=int(rng.integers(2)),
    )


@pytest.fixture(scope="module")
def jobs(pretrained):
    """Random requests, and what each of their answers is when nobody else is served."""
    rng = np.random.default_rng(0)
    prompts = prompts_of(pretrained, *(some_request(rng) for _ in range(24)))
    jobs = [(prompt, some_options(rng)) for prompt in prompts]
    return jobs, [alone(pretrained, job) for job in jobs]


class Drafter:
    """Drafts what comes, something else, or what comes up to some token."""

    def __init__(self, wanted):
        self.answers = [got["tokens"] for each in wanted for got in each.values()]
        self.rng = np.random.default_rng(1)

    def __call__(self, choice, most):
        done = len(choice.tokens) - choice.prompt
        right = self.answers[choice.number][done : done + most]
        if self.rng.random() < 0.3:
            return right
        wrong = self.rng.integers(0, 256, most).tolist()
        return [*right[: self.rng.integers(0, most + 1)], *wrong][:most]


@pytest.mark.parametrize("config", [SIZES, SPECULATING], ids=lambda c: c.speculate)
def test_every_answer_is_that_of_its_request_alone(pretrained, jobs, config):
    jobs, wanted = jobs
    engine, cancelled = Engine(pretrained, config), (3, 11, 17)
    if config is SPECULATING:
        engine.draft = Drafter(wanted)
    found = collect(engine, jobs, cancel=cancelled, rng=np.random.default_rng(2))
    for index, answers in enumerate(wanted):
        for (_, choice), answer in answers.items():
            got = found[index, choice]
            if got["end"] == "cancelled":
                assert index in cancelled
                assert got["tokens"] == answer["tokens"][: len(got["tokens"])]
            else:
                same(got, answer)
    assert engine.scheduler.found > 0
    if config is SPECULATING:
        assert engine.counters.drafted > engine.counters.accepted > 20


@pytest.mark.parametrize("config", [SIZES, SPECULATING], ids=lambda c: c.speculate)
def test_rows_that_give_way_go_on_as_if_nothing_had_been(pretrained, config):
    prompts = prompts_of(pretrained, *(Request(tokens=tiny.random_tokens(n, 8)) for n in range(3)))
    jobs = [(p, Options(max_new_tokens=30, temperature=1.0, logprobs=0)) for p in prompts]
    engine = Engine(pretrained, config)
    found = collect(engine, jobs)
    assert engine.scheduler.preemptions > 0
    for index, job in enumerate(jobs):
        same(found[index, 0], alone(pretrained, job)[0, 0])


def test_a_step_is_dispatched_before_the_tokens_of_the_one_before_are_read(pretrained, monkeypatch):
    order = []
    read, settle = Device.read, Engine._settle
    monkeypatch.setattr(Device, "read", lambda *a, **k: (order.append("read"), read(*a, **k))[1])
    monkeypatch.setattr(Engine, "_settle", lambda *a: (order.append("settle"), settle(*a))[1])
    (prompt,) = prompts_of(pretrained, Request(tokens=[1, 2, 3]))
    alone(pretrained, (prompt, Options(max_new_tokens=4)), dataclasses.replace(SIZES, loops=1))
    assert order == ["read", "read", "settle", "read", "settle", "read", "settle", "settle"]


def test_other_numbers_compile_nothing(pretrained):
    jobs = [
        (prompt, options)
        for prompt, options in zip(
            prompts_of(pretrained, *(Request(tokens=tiny.random_tokens(n, n)) for n in (9, 20, 5))),
            (
                Options(max_new_tokens=9),
                Options(max_new_tokens=7, temperature=0.7, top_p=0.9, seed=1),
                Options(max_new_tokens=5, temperature=1.3, top_k=5, stop_ids=(3, 4), min_p=0.2),
            ),
            strict=True,
        )
    ]
    collect(Engine(pretrained, SIZES), jobs)
    again = Engine(pretrained, SIZES)
    collect(again, [(prompt, dataclasses.replace(o, seed=7, top_p=0.5)) for prompt, o in jobs])
    assert again.device.catalogue.compilations == 0


def test_logprobs_are_of_the_model_s_own_distribution(pretrained):
    request = Request(tokens=tiny.random_tokens(2, 11))
    (prompt,) = prompts_of(pretrained, request)
    options = Options(
        max_new_tokens=3, temperature=2.0, logit_bias={5: 4.0}, logprobs=3, prompt_logprobs=2
    )
    engine = Engine(pretrained, SIZES)
    engine.submit(prompt, options)
    events = []
    while engine.is_busy:
        events += engine.step()
    tokens = request.tokens + [token for event in events for token in event.tokens]
    logits = tiny.full_logits(tokens).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    given = [each for event in events for each in event.prompt_logprobs or ()]
    given += [each for event in events for each in event.logprobs]
    assert len(given) == len(tokens) - 1
    for place, each in enumerate(given):
        count = 2 if place < 10 else 3
        order = np.argsort(-logprobs[place])[:count]
        assert [token for token, _ in each.likeliest] == order.tolist()
        np.testing.assert_allclose(each.logprob, logprobs[place, tokens[place + 1]], atol=1e-4)
        found = [logprob for _, logprob in each.likeliest]
        np.testing.assert_allclose(found, logprobs[place, order], atol=1e-4)


def test_a_stop_text_ends_the_answer_before_it_and_nothing_of_it_streams(pretrained):
    (prompt,) = prompts_of(pretrained, Request(tokens=tiny.random_tokens(0, 9)))
    whole = alone(pretrained, (prompt, Options(max_new_tokens=12)))[0, 0]["text"]
    assert whole.isprintable() or len(whole) > 6
    stop = whole[4:6]
    cut = alone(pretrained, (prompt, Options(max_new_tokens=12, stop=[stop])))[0, 0]
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["end"] == "stop"
    kept = alone(pretrained, (prompt, Options(max_new_tokens=12, stop=[stop], include_stop=True)))
    assert kept[0, 0]["text"] == cut["text"] + stop


def test_no_stop_token_is_drawn_before_so_many_tokens(pretrained):
    (prompt,) = prompts_of(pretrained, Request(tokens=tiny.random_tokens(0, 9)))
    free = alone(pretrained, (prompt, Options(max_new_tokens=8)))[0, 0]["tokens"]
    stops = Options(max_new_tokens=8, stop_ids=free)
    assert len(alone(pretrained, (prompt, stops))[0, 0]["tokens"]) == 1
    held = alone(pretrained, (prompt, dataclasses.replace(stops, min_new_tokens=3)))[0, 0]["tokens"]
    assert len(held) >= 4 or held[:3] != free[:3]
    assert not set(held[:3]) & set(free)


@pytest.mark.parametrize(
    ("penalty", "times"),
    [
        ({}, 4),
        ({"presence_penalty": 100.0}, 1),
        ({"frequency_penalty": 30.0}, 2),  # 50, then 20, then less than others
        ({"repetition_penalty": 20.0}, 1),
    ],
)
def test_a_penalty_keeps_a_token_from_coming_again(pretrained, penalty, times):
    (prompt,) = prompts_of(pretrained, Request(tokens=[tiny.BOS]))
    options = Options(max_new_tokens=4, logit_bias={70: 50.0}, **penalty)
    tokens = alone(pretrained, (prompt, options))[0, 0]["tokens"]
    assert tokens[:times] == [70] * times
    assert tokens.count(70) == times


def test_the_checkpoint_s_own_stop_tokens_may_be_ignored(pretrained):
    (prompt,) = prompts_of(pretrained, Request(tokens=[tiny.BOS]))
    options = Options(max_new_tokens=3, logit_bias={tiny.EOT: 100.0})
    assert alone(pretrained, (prompt, options))[0, 0]["end"] == "stop"
    ignoring = dataclasses.replace(options, ignore_eos=True)
    assert alone(pretrained, (prompt, ignoring))[0, 0]["tokens"] == [tiny.EOT] * 3


def test_a_smaller_priority_is_served_sooner(pretrained):
    prompts = prompts_of(pretrained, *(Request(tokens=[tiny.BOS, n]) for n in range(3)))
    engine = Engine(pretrained, dataclasses.replace(SIZES, max_rows=1))
    for prompt, priority in zip(prompts, (5, 0, -5), strict=True):
        engine.submit(prompt, Options(max_new_tokens=2, priority=priority))
    ended = []
    while engine.is_busy:
        ended += [event.request for event in engine.step() if event.finish_reason]
    assert ended == [2, 1, 0]


def test_salts_share_nothing_and_equal_ones_do(pretrained):
    (prompt,) = prompts_of(pretrained, Request(tokens=tiny.random_tokens(0, 17)))
    engine = Engine(pretrained, SIZES)
    for salt, found in (("a", 0), ("b", 0), ("a", 16)):
        before = engine.scheduler.found
        collect(engine, [(prompt, Options(max_new_tokens=1, cache_salt=salt))])
        assert engine.scheduler.found - before == found


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Options(max_new_tokens=60), "exceed the model's 56 positions"),
        (
            Options(max_new_tokens=9, logit_bias={400: 1.0}),
            "logit_bias: token 400 must lie in 0..351",
        ),
        (Options(max_new_tokens=9, stop_ids=(999,)), "stop_ids: token 999 must lie in 0..351"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(pretrained, options, says):
    (prompt,) = prompts_of(pretrained, Request(tokens=[1]))
    with pytest.raises(ValueError, match=says):
        Engine(pretrained, SIZES).check(prompt, options)
