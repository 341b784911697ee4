"""Generation equals the argmax loop without a cache, whatever the batch, the chunks, the mesh."""

import dataclasses

import pytest

from llama4_jax.data import preprocess, stack_tiles
from llama4_jax.pretrained import GenerationDefaults, from_pretrained, save_pretrained
from llama4_jax.serve import BatchingConfig, Request, Sampling, generate, steps
from llama4_jax.serve.requests import read_requests
from tests.serve import tiny

# Chunks hold 8 tokens: these prompts end before, at and after chunk edges, one far beyond.
LENGTHS = (33, 1, 8, 15)
NEW = 20
SMALL = BatchingConfig(rows=4, prefill_length=16, steps=4)
SINGLE = dataclasses.replace(SMALL, rows=1)
HOT = Sampling(temperature=1.0, top_p=0.95, seed=5)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tiny.pretrained(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def requests():
    return [Request(tokens=tiny.random_tokens(n, n)) for n in LENGTHS]


@pytest.fixture(scope="module")
def answers(pretrained, requests):
    return generate(pretrained, requests, max_new_tokens=NEW, batching=SMALL)


def with_stops(pretrained, *stop_ids):
    generation = dataclasses.replace(pretrained.generation, stop_ids=stop_ids)
    return dataclasses.replace(pretrained, generation=generation)


def test_greedy_answers_equal_the_argmax_loop_across_chunks_in_request_order(requests, answers):
    for request, answer in zip(requests, answers, strict=True):
        assert answer.tokens == tiny.greedy(request.tokens, NEW)
        assert answer.finish_reason == "length"


def test_an_answer_does_not_depend_on_the_batch(pretrained, requests, answers):
    alone = generate(pretrained, requests, max_new_tokens=NEW, batching=SINGLE)
    assert alone == answers


def test_other_lengths_sampling_and_stops_compile_no_new_program(pretrained, answers):
    programs = (steps.prefill_chunk, steps.sample_first, steps.decode_steps)
    before = [program._cache_size() for program in programs]
    requests = [Request(tokens=tiny.random_tokens(n, n)) for n in (5, 20, 40, 9)]
    for sampling, stop_ids in (
        (Sampling(seed=9), (tiny.EOT,)),
        (Sampling(temperature=0.7, top_p=0.9, seed=1), ()),
        (Sampling(temperature=1.3, top_k=5), (tiny.EOT, 3, 4)),
    ):
        own = with_stops(pretrained, *stop_ids)
        generate(own, requests, max_new_tokens=11, sampling=sampling, batching=SMALL)
    assert [program._cache_size() for program in programs] == before


def test_a_sampled_answer_does_not_depend_on_the_batch_or_the_steps(pretrained, requests):
    together = generate(pretrained, requests, max_new_tokens=6, sampling=HOT, batching=SMALL)
    batching = dataclasses.replace(SINGLE, steps=3)
    apart = generate(pretrained, requests, max_new_tokens=6, sampling=HOT, batching=batching)
    assert apart == together
    assert together != generate(pretrained, requests, max_new_tokens=6, batching=SMALL)


def test_the_same_prompt_twice_is_sampled_differently_and_again_the_same(pretrained):
    twice = [Request(prompt="a")] * 2
    first, second = generate(pretrained, twice, max_new_tokens=6, sampling=HOT, batching=SINGLE)
    assert first.tokens != second.tokens
    again = generate(pretrained, twice, max_new_tokens=6, sampling=HOT, batching=SINGLE)
    assert again == [first, second]
    other = generate(
        pretrained,
        twice,
        max_new_tokens=6,
        sampling=dataclasses.replace(HOT, seed=6),
        batching=SINGLE,
    )
    assert other != again


def test_tokens_stream_in_order_and_their_texts_join_to_the_answer(pretrained, requests):
    seen = []
    answers = generate(
        pretrained, requests, max_new_tokens=NEW, batching=SMALL, on_token=seen.append
    )
    for index, answer in enumerate(answers):
        assert [new.token for new in seen if new.index == index] == answer.tokens
        assert "".join(new.text for new in seen if new.index == index) == answer.text
        assert answer.text == pretrained.tokenizer.decode(answer.tokens)


def test_answers_are_delivered_in_request_order_as_soon_as_possible(pretrained, requests, answers):
    events = []
    batching = dataclasses.replace(SINGLE, window=2)
    generate(
        pretrained,
        requests,
        max_new_tokens=4,
        batching=batching,
        on_token=lambda new: events.append(new.index),
        on_answer=lambda answer: events.append(answer.tokens),
    )
    first, second, third, fourth = (answer.tokens[:4] for answer in answers)
    # The shorter of each window runs first; the longer, which comes before it, is awaited.
    wanted = [1] * 4 + [0] * 4 + [first, second] + [2] * 4 + [third] + [3] * 4 + [fourth]
    assert events == wanted


def test_a_stop_token_ends_its_row_alone_and_stays_out_of_the_text(pretrained, requests, answers):
    stop = answers[0].tokens[5]
    stopped = generate(
        with_stops(pretrained, stop, tiny.EOT), requests, max_new_tokens=NEW, batching=SMALL
    )
    for answer, whole in zip(stopped, answers, strict=True):
        end = whole.tokens.index(stop) + 1 if stop in whole.tokens else NEW
        assert answer.tokens == whole.tokens[:end]
        assert answer.finish_reason == ("stop" if stop in whole.tokens else "length")
        text_end = end - 1 if stop in whole.tokens else end
        assert answer.text == pretrained.tokenizer.decode(whole.tokens[:text_end])
    assert stopped[0].finish_reason == "stop"


def test_max_new_tokens_of_one_and_of_an_odd_number_are_exact(pretrained, requests, answers):
    for count in (1, 7):
        short = generate(pretrained, requests, max_new_tokens=count, batching=SMALL)
        assert [a.tokens for a in short] == [a.tokens[:count] for a in answers]


def test_the_checkpoint_s_own_sampling_is_the_default(pretrained):
    hot = GenerationDefaults(temperature=1.0, top_p=0.95, stop_ids=(tiny.EOT,))
    own = dataclasses.replace(pretrained, generation=hot)
    requests = [Request(prompt="a")]
    by_default = generate(own, requests, max_new_tokens=6, batching=SMALL)
    named = dataclasses.replace(HOT, seed=0)
    assert by_default == generate(
        pretrained, requests, max_new_tokens=6, sampling=named, batching=SMALL
    )


def test_a_prompt_begins_with_the_begin_of_text_token_and_types_no_special_token(pretrained):
    (by_text,) = generate(
        pretrained, [Request(prompt="a<|eot|>")], max_new_tokens=3, batching=SMALL
    )
    tokens = [tiny.BOS, *b"a<|eot|>"]
    (by_ids,) = generate(pretrained, [Request(tokens=tokens)], max_new_tokens=3, batching=SMALL)
    assert by_text == by_ids


def test_a_request_may_fill_the_model_s_positions_and_not_exceed_them(pretrained):
    full = Request(tokens=tiny.random_tokens(0, tiny.LONGEST))
    (answer,) = generate(pretrained, [full], max_new_tokens=1, batching=SMALL)
    assert answer.tokens == tiny.greedy(full.tokens, 1)
    says = r"request 1 has 128 prompt tokens, which with 2 new ones exceed the model's 128 positions.*at most 1\."  # noqa: E501
    with pytest.raises(ValueError, match=says):
        generate(pretrained, [Request(prompt="a"), full], max_new_tokens=2, batching=SMALL)
    with pytest.raises(ValueError, match=r"max_new_tokens \(0\)"):
        generate(pretrained, [full], max_new_tokens=0)


def test_without_a_tokenizer_tokens_are_served_and_text_is_refused(pretrained, requests, answers):
    bare = dataclasses.replace(pretrained, tokenizer=None)
    (answer,) = generate(bare, requests[:1], max_new_tokens=4, batching=SMALL)
    assert answer.tokens == answers[0].tokens[:4]
    assert answer.text is None
    with pytest.raises(ValueError, match="request 0: the checkpoint has no tokenizer"):
        generate(bare, [Request(prompt="a")], max_new_tokens=4)


def test_images_are_read_in_any_row_of_a_batch_and_across_chunks(pretrained):
    vision, pictures = tiny.config().vision, [tiny.picture(1, wide=True), tiny.picture(0)]
    requests = [
        Request(prompt="no picture"),
        Request(prompt="two", images=pictures),
        Request(messages=[{"role": "user", "content": "one"}], images=pictures[1:]),
    ]
    answers = generate(pretrained, requests, max_new_tokens=4, batching=SMALL)
    prompts = read_requests(pretrained, requests)
    for images, prompt, answer in zip([[], pictures, pictures[1:]], prompts, answers, strict=True):
        tiles = stack_tiles([preprocess(image, vision, 4) for image in images], vision)
        tokens = prompt.tokens_T.tolist()
        assert answer.tokens == tiny.greedy(tokens, 4, tiles if images else None)
    blind = Request(prompt="two", images=[tiny.picture(2, wide=True), tiny.picture(3)])
    assert answers[1:2] != generate(pretrained, [blind], max_new_tokens=4, batching=SMALL)


def test_no_requests_have_no_answers(pretrained):
    assert generate(pretrained, []) == []


def test_a_mesh_gives_the_same_tokens_with_nothing_around_the_call(
    pretrained, requests, answers, tmp_path
):
    save_pretrained(pretrained, tmp_path / "saved")
    spread = from_pretrained(tmp_path / "saved", mesh="data:2,expert:2,tensor:2")
    # One shape of chunks suffices here, and compiling for eight devices is slow.
    batching = dataclasses.replace(SMALL, prefill_length=64)
    assert generate(spread, requests, max_new_tokens=NEW, batching=batching) == answers
