"""Generation equals the argmax loop without a cache, whatever the batch, the chunks, the mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from llama4_jax.data import preprocess, stack_tiles
from llama4_jax.layers.param import leaf_name
from llama4_jax.pretrained import GenerationDefaults, from_pretrained, save_pretrained
from llama4_jax.serve import Engine, EngineConfig, Options, Request, Sampling, generate
from llama4_jax.serve.requests import read_requests
from tests.serve import tiny

# Chunks hold 8 tokens: these prompts end before, at and after chunk edges, one far beyond.
LENGTHS = (33, 1, 8, 15)
NEW = 20
# 80 pages: whether the work is known or not, 48 are for layers that see everything, 32 for chunks,
# so that the engines of all tests, a new one for each call, run the same compiled programs.
SMALL = EngineConfig(max_rows=4, step_tokens=32, page_size=4, cache_bytes=80 << 10)
SINGLE = dataclasses.replace(SMALL, max_rows=1)
HOT = Options(temperature=1.0, top_p=0.95, seed=5)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tiny.pretrained(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def requests():
    return [Request(tokens=tiny.random_tokens(n, n)) for n in LENGTHS]


@pytest.fixture(scope="module")
def answers(pretrained, requests):
    return generate(pretrained, requests, max_new_tokens=NEW, config=SMALL)


def serve(pretrained, requests, *, config=SMALL, **how):
    return generate(Engine(pretrained, config), requests, **how)


def with_stops(pretrained, *stop_ids):
    generation = dataclasses.replace(pretrained.generation, stop_ids=stop_ids)
    return dataclasses.replace(pretrained, generation=generation)


def test_greedy_answers_equal_the_argmax_loop_across_chunks_in_request_order(requests, answers):
    for request, answer in zip(requests, answers, strict=True):
        assert answer.tokens == tiny.greedy(request.tokens, NEW)
        assert answer.finish_reason == "length"


def test_an_answer_does_not_depend_on_the_batch(pretrained, requests, answers):
    alone = serve(pretrained, requests, max_new_tokens=NEW, config=SINGLE)
    assert alone == answers


def test_a_sampled_answer_does_not_depend_on_the_batch(pretrained, requests):
    together = serve(pretrained, requests, max_new_tokens=6, options=HOT)
    apart = serve(pretrained, requests, max_new_tokens=6, options=HOT, config=SINGLE)
    assert apart == together
    assert together != serve(pretrained, requests, max_new_tokens=6)


def test_the_same_prompt_twice_is_sampled_differently_and_again_the_same(pretrained):
    twice = [Request(prompt="a")] * 2
    first, second = serve(pretrained, twice, max_new_tokens=6, options=HOT, config=SINGLE)
    assert first.tokens != second.tokens
    again = serve(pretrained, twice, max_new_tokens=6, options=HOT, config=SINGLE)
    assert again == [first, second]
    other = serve(
        pretrained,
        twice,
        max_new_tokens=6,
        options=dataclasses.replace(HOT, seed=6),
        config=SINGLE,
    )
    assert other != again


def test_tokens_stream_in_order_and_their_texts_join_to_the_answer(pretrained, requests):
    seen = []
    answers = generate(pretrained, requests, max_new_tokens=NEW, config=SMALL, on_token=seen.append)
    for index, answer in enumerate(answers):
        assert [new.token for new in seen if new.index == index] == answer.tokens
        assert "".join(new.text for new in seen if new.index == index) == answer.text
        assert answer.text == pretrained.tokenizer.decode(answer.tokens)


def test_answers_are_delivered_in_request_order_as_soon_as_possible(pretrained, requests, answers):
    seen, events = [], []
    serve(
        pretrained,
        requests,
        max_new_tokens=4,
        on_token=lambda new: events.append(new.index),
        on_answer=lambda answer: (seen.append(answer.tokens), events.append("answer")),
    )
    assert seen == [answer.tokens[:4] for answer in answers]
    # The first answer is delivered once it is complete, whatever the others still lack.
    assert events.index("answer") == [i for i, e in enumerate(events) if e == 0][3] + 1


def test_a_stop_token_ends_its_row_alone_and_stays_out_of_the_text(pretrained, requests, answers):
    stop = answers[0].tokens[5]
    stopped = serve(with_stops(pretrained, stop, tiny.EOT), requests, max_new_tokens=NEW)
    for answer, whole in zip(stopped, answers, strict=True):
        end = whole.tokens.index(stop) + 1 if stop in whole.tokens else NEW
        assert answer.tokens == whole.tokens[:end]
        assert answer.finish_reason == ("stop" if stop in whole.tokens else "length")
        text_end = end - 1 if stop in whole.tokens else end
        assert answer.text == pretrained.tokenizer.decode(whole.tokens[:text_end])
    assert stopped[0].finish_reason == "stop"


def test_max_new_tokens_of_one_and_of_an_odd_number_are_exact(pretrained, requests, answers):
    for count in (1, 7):
        short = serve(pretrained, requests, max_new_tokens=count)
        assert [a.tokens for a in short] == [a.tokens[:count] for a in answers]


def test_the_checkpoint_s_own_sampling_is_the_default(pretrained):
    hot = GenerationDefaults(temperature=1.0, top_p=0.95, stop_ids=(tiny.EOT,))
    own = dataclasses.replace(pretrained, generation=hot)
    requests = [Request(prompt="a")]
    by_default = serve(own, requests, max_new_tokens=6)
    named = dataclasses.replace(HOT, seed=0)
    assert by_default == serve(pretrained, requests, max_new_tokens=6, options=named)


def test_a_prompt_begins_with_the_begin_of_text_token_and_types_no_special_token(pretrained):
    (by_text,) = serve(pretrained, [Request(prompt="a<|eot|>")], max_new_tokens=3)
    tokens = [tiny.BOS, *b"a<|eot|>"]
    (by_ids,) = serve(pretrained, [Request(tokens=tokens)], max_new_tokens=3)
    assert by_text == by_ids


def test_a_request_may_fill_the_model_s_positions_and_not_exceed_them(pretrained):
    full = Request(tokens=tiny.random_tokens(0, tiny.LONGEST))
    (answer,) = serve(pretrained, [full], max_new_tokens=1)
    assert answer.tokens == tiny.greedy(full.tokens, 1)
    says = r"request 1 has 128 prompt tokens, which with 2 new ones exceed the model's 128 positions.*at most 1\."  # noqa: E501
    with pytest.raises(ValueError, match=says):
        generate(pretrained, [Request(prompt="a"), full], max_new_tokens=2, config=SMALL)
    with pytest.raises(ValueError, match=r"max_new_tokens \(0\)"):
        serve(pretrained, [full], max_new_tokens=0)


def test_without_a_tokenizer_tokens_are_served_and_text_is_refused(pretrained, requests, answers):
    bare = dataclasses.replace(pretrained, tokenizer=None)
    (answer,) = serve(bare, requests[:1], max_new_tokens=4)
    assert answer.tokens == answers[0].tokens[:4]
    assert answer.text is None
    with pytest.raises(ValueError, match="request 0: the checkpoint has no tokenizer"):
        serve(bare, [Request(prompt="a")], max_new_tokens=4)


def test_images_are_read_in_any_row_of_a_batch_and_across_chunks(pretrained):
    vision, pictures = tiny.config().vision, [tiny.picture(1, wide=True), tiny.picture(0)]
    requests = [
        Request(prompt="no picture"),
        Request(prompt="two", images=pictures),
        Request(messages=[{"role": "user", "content": "one"}], images=pictures[1:]),
    ]
    answers = serve(pretrained, requests, max_new_tokens=4)
    prompts = read_requests(pretrained, requests)
    for images, prompt, answer in zip([[], pictures, pictures[1:]], prompts, answers, strict=True):
        tiles = stack_tiles([preprocess(image, vision, 4) for image in images], vision)
        tokens = prompt.tokens_T.tolist()
        assert answer.tokens == tiny.greedy(tokens, 4, tiles if images else None)
    blind = Request(prompt="two", images=[tiny.picture(2, wide=True), tiny.picture(3)])
    assert answers[1:2] != serve(pretrained, [blind], max_new_tokens=4)


def test_logits_that_are_nan_end_their_answer_in_an_error_after_those_before(pretrained):
    def break_token_7(path, array):
        return array.at[7].set(np.nan) if leaf_name(path) == "embed.table_VD" else array

    model = jax.tree_util.tree_map_with_path(break_token_7, pretrained.model)
    broken, delivered = dataclasses.replace(pretrained, model=model), []
    asked = [Request(tokens=[tiny.BOS, 5]), Request(tokens=[tiny.BOS, 5, 7, 9])]
    asked[0] = dataclasses.replace(asked[0], options=Options(max_new_tokens=1))
    with pytest.raises(ValueError, match="request 1: the model's logits are NaN; the checkpoint"):
        serve(broken, asked, max_new_tokens=NEW, on_answer=delivered.append)
    assert [len(answer.tokens) for answer in delivered] == [1]


def test_no_requests_have_no_answers(pretrained):
    assert generate(pretrained, []) == []


def test_a_mesh_gives_the_same_tokens_with_nothing_around_the_call(
    pretrained, requests, answers, tmp_path
):
    save_pretrained(pretrained, tmp_path / "saved")
    spread = from_pretrained(tmp_path / "saved", mesh="data:2,expert:2,tensor:2")
    assert generate(spread, requests, max_new_tokens=NEW, config=SMALL) == answers


def test_a_stream_yields_the_tokens_and_closing_it_frees_all_pages(pretrained, requests, answers):
    engine = Engine(pretrained, SMALL)
    found = [new.token for new in generate(engine, requests[:1], max_new_tokens=NEW, stream=True)]
    assert found == answers[0].tokens
    stream = generate(engine, requests, max_new_tokens=NEW, stream=True)
    next(stream)
    assert engine.scheduler.whole.held > 0
    stream.close()
    assert engine.scheduler.whole.held == engine.scheduler.chunk.held == 0
    assert not engine.is_busy


def test_a_request_s_own_options_stand_before_those_of_the_call(pretrained, requests, answers):
    own = dataclasses.replace(requests[0], options=Options(max_new_tokens=3))
    first, second = serve(pretrained, [own, requests[1]], max_new_tokens=5)
    assert first.tokens == answers[0].tokens[:3]
    assert second.tokens == answers[1].tokens[:5]


def test_several_answers_differ_and_each_is_drawn_again_the_same(pretrained, requests):
    options = dataclasses.replace(HOT, n=3, max_new_tokens=6)
    (answer,) = serve(pretrained, requests[:1], options=options)
    found = [answer.tokens, *(other.tokens for other in answer.others)]
    assert len({tuple(tokens) for tokens in found}) == 3
    (again,) = serve(pretrained, requests[:1], options=options, config=SINGLE)
    assert again == answer


def test_an_engine_is_no_place_for_another_config(pretrained, requests):
    with pytest.raises(ValueError, match="has its config already"):
        generate(Engine(pretrained, SMALL), requests, config=SMALL)


def test_sampling_leaves_nothing_to_the_checkpoint(pretrained):
    own = dataclasses.replace(pretrained.generation, temperature=2.0, top_p=0.5, top_k=3)
    hot = dataclasses.replace(pretrained, generation=own)
    greedy = serve(pretrained, "ab", max_new_tokens=8, options=Options(temperature=0))
    assert serve(hot, "ab", max_new_tokens=8, sampling=Sampling()) == greedy
    wide = Sampling(temperature=1.0, seed=4).resolved(own, 352)
    assert (wide.temperature, wide.top_p, wide.top_k) == (1.0, 1.0, 0)
    with pytest.raises(ValueError, match="two names of one thing"):
        serve(pretrained, "ab", options=Options(), sampling=Sampling())
