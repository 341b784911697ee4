"""Bytes become pages; what cannot be is refused by name."""

import dataclasses

import numpy as np
import pytest

from llama4_jax.serve import EngineConfig, Options
from llama4_jax.serve.ngram import draft
from llama4_jax.serve.pages import PageNames, PagePool
from llama4_jax.serve.plan import Choice, Numbers, bucket
from llama4_jax.serve.scheduler import Scheduler
from llama4_jax.serve.sizes import Work
from tests.serve import tiny

PAGE_BYTES = 1024  # of 4 tokens, in either kind of layer


@pytest.mark.parametrize(("size", "rounded"), [(0, 1), (1, 1), (2, 2), (3, 4), (8, 8), (9, 16)])
def test_a_bucket_is_the_next_power_of_two(size, rounded):
    assert bucket(size) == rounded


def test_chunk_layers_get_a_chunk_for_every_row_and_the_rest_goes_to_the_others():
    sizes = EngineConfig(
        max_rows=4, step_tokens=24, page_size=4, cache_bytes=100 * PAGE_BYTES, keep_prefixes=False
    )
    layout = sizes.layout(tiny.config())
    assert (layout.chunk_pages, layout.whole_pages) == (4 * (2 + 1) + 6, 82)
    assert layout.fits(82 * 4) and not layout.fits(82 * 4 + 1)


@pytest.mark.parametrize(
    ("positions", "chunk_pages"), [(64, 40), (70 * 4, 30), (90 * 4, 18), (110 * 4, 40)]
)
def test_kept_prefixes_have_room_in_chunk_layers_beside_a_row_of_the_whole_context(
    positions, chunk_pages
):
    sizes = EngineConfig(max_rows=4, step_tokens=24, page_size=4, cache_bytes=100 * PAGE_BYTES)
    layout = sizes.layout(tiny.config(positions))
    assert (layout.chunk_pages, layout.whole_pages) == (chunk_pages, 100 - chunk_pages)


def test_short_requests_fill_every_row_at_once():
    sizes = EngineConfig(max_rows=8, step_tokens=24, page_size=8, cache_bytes=500 * PAGE_BYTES)
    scheduler = Scheduler(sizes.layout(tiny.config()), max_rows=8, step_tokens=24)
    for number in range(8):
        tokens, names = Numbers([number, 1, 2]), PageNames(8)
        scheduler.add(Choice(number=number, tokens=tokens, prompt=3, limit=8, names=names))
    assert len(scheduler.plan().prefill) == 8


def test_a_cache_for_known_work_has_pages_for_that_alone():
    sizes = EngineConfig(max_rows=4, step_tokens=24, page_size=4)
    layout = sizes.layout(tiny.config(), work=Work(choices=2, tokens=30))
    assert (layout.chunk_pages, layout.whole_pages) == (bucket(8 + 2), bucket(8 + 2))


def test_eight_bit_pages_are_more_for_the_same_bytes():
    sizes = EngineConfig(
        max_rows=1, step_tokens=8, page_size=4, cache_bytes=100 * PAGE_BYTES, keep_prefixes=False
    )
    small = dataclasses.replace(sizes, kv_cache="fp8").layout(tiny.config())
    assert small.whole_pages > 4 * sizes.layout(tiny.config()).whole_pages


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"max_rows": 0}, r"max_rows \(0\) must be at least 1"),
        ({"loops": 0}, r"loops \(0\) must be at least 1"),
        ({"kv_cache": "int4"}, r"kv_cache \('int4'\) must be one of"),
        ({"speculate": "eagle"}, r"speculate \('eagle'\) must be one of"),
        ({"max_rows": 9, "step_tokens": 8}, r"step_tokens \(8\) must be at least max_rows \(9\)"),
    ],
)
def test_impossible_sizes_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        EngineConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"max_context": 129}, r"max_context \(129\) exceeds the model's 128 positions"),
        ({"cache_bytes": 100}, r"cache_bytes \(100\) hold no row"),
        ({"page_size": 3}, r"page_size \(3\) must divide the chunk size \(8\)"),
    ],
)
def test_sizes_that_do_not_fit_the_model_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        EngineConfig(**{"page_size": 4, **wrong}).layout(tiny.config())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n": 0}, r"n \(0\) must lie in 1..128"),
        ({"top_k": 1.5}, r"top_k \(1.5\) must be a whole number"),
        ({"logprobs": 21}, r"logprobs \(21\) must lie in 0..20"),
        ({"stop": "a"}, r"stop \('a'\) must be a list of texts"),
        ({"stop": [""]}, "none of them empty"),
        *(({"stop": wrong}, "must be a list of texts") for wrong in (None, 0.5, {}, {"a"})),
        *(({name: None}, f"{name} .None. must lie") for name in ("max_new_tokens", "n", "seed")),
        ({"temperature": 10**400}, "temperature .* must lie in"),
        ({"stop_ids": 0.5}, "must name tokens by their numbers"),
        ({"stop_ids": ["a"]}, "must name tokens by their numbers"),
        ({"logit_bias": {1: "a"}}, "logit_bias of token 1"),
        ({"logit_bias": [1]}, "must map tokens to numbers"),
        ({"max_new_tokens": 0}, r"max_new_tokens \(0\)"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, r"min_new_tokens \(4\) must be at most"),
        ({"ignore_eos": 1}, r"ignore_eos \(1\) must be true or false"),
        ({"cache_salt": 3}, r"cache_salt \(3\) must be a text"),
        ({"choices": []}, "choices"),
        ({"json_schema": 3}, "json_schema"),
        ({"regex": "a", "min_new_tokens": 2}, "exclude each other"),
    ],
)
def test_a_wrong_option_is_refused_by_name(wrong, says):
    with pytest.raises(ValueError, match=says):
        Options(**wrong)


def test_drafts_are_what_followed_the_latest_place_of_the_longest_ngram():
    tokens = np.array([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], np.int32)
    assert draft(tokens, 2) == [4, 9]  # 1 2 3 stood before, and 2 3 later
    assert draft(tokens[1:], 2) == [5, 1]
    repeated = np.array([7, 1, 2, 3, 4, 5, 6, 8, 7], np.int32)
    assert draft(repeated, 7) == [1, 2, 3, 4]  # one token that agrees is little
    assert draft(np.array([1, 2, 3], np.int32), 2) == []
    assert draft(np.array([7], np.int32), 2) == []


def test_a_page_is_free_held_or_cached_and_the_end_of_a_row_is_forgotten_first():
    pool = PagePool(3)
    pages = [pool.take() for _ in range(3)]
    for page, name in zip(pages, (b"a", b"b", b"c"), strict=True):
        pool.name(page, name)
    pool.hold(pages[0])
    pool.release(pages)
    assert (pool.held, pool.available) == (1, 2)
    assert pool.find([b"a", b"b", b"c"]) == pages
    assert pool.take() == pages[2]
    assert pool.find([b"a", b"b", b"c"]) == pages[:2]
    forgetful = PagePool(1, keep=False)
    forgetful.name(forgetful.take(), b"a")
    forgetful.release([0])
    assert forgetful.find([b"a"]) == []


def test_pages_that_are_first_to_go_stay_while_there_is_room_and_lose_their_names_first():
    pool = PagePool(4)
    pages = [pool.take() for _ in range(4)]
    names = [bytes([i]) for i in range(4)]
    for page, name in zip(pages, names, strict=True):
        pool.name(page, name)
    pool.release(pages[:2])
    pool.release(pages[2:], first_to_go=True)
    assert pool.find(names) == pages
    assert [pool.take() for _ in range(4)] == [pages[i] for i in (3, 2, 1, 0)]
