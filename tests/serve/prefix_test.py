"""What is shared of a common beginning is the closed form, and changes no logit."""

import numpy as np
import pytest

from llama4_jax.serve import Engine, EngineConfig, Options, Request
from llama4_jax.serve.pages import PageNames
from llama4_jax.serve.plan import CacheLayout, Choice, Numbers
from llama4_jax.serve.requests import read_requests
from llama4_jax.serve.scheduler import Scheduler
from tests.serve import tiny

CHUNK, PAGE = 8, 4
LONGEST = 3 * CHUNK


def closed_form(common, length, computed, held_from):
    """Pages that agree and were computed, one token left over; in its chunk all, or none.

    Args:
      common: tokens at which both rows agree.
      length: of the row that looks.
      computed: tokens of the row before it.
      held_from: first token whose chunk pages are still there.
    """
    whole = min(common, length - 1, computed) // PAGE * PAGE
    base = whole // CHUNK * CHUNK
    return whole if base >= held_from else base


def serve(scheduler, choice):
    """Read a choice's prompt, draw nothing, and let it go."""
    scheduler.add(choice)
    while choice.computed < choice.to_read:
        scheduler.plan()
    scheduler.drop(choice)


def choice_of(number, tokens, *, extra=0):
    return Choice(
        number=number,
        tokens=Numbers(tokens),
        prompt=len(tokens),
        limit=len(tokens) + 1 + extra,
        names=PageNames(PAGE),
        order=(0, number),
    )


@pytest.mark.parametrize("keeps_chunks", [True, False])
def test_the_length_of_every_hit_is_the_closed_form(keeps_chunks):
    layout = CacheLayout(page_size=PAGE, chunk_size=CHUNK, whole_pages=40, chunk_pages=20)
    first = np.arange(LONGEST)
    for computed in range(1, LONGEST + 1):
        scheduler = Scheduler(layout, max_rows=2, step_tokens=LONGEST)
        serve(scheduler, choice_of(0, first[:computed]))
        if not keeps_chunks:  # others need the pages
            taken = [scheduler.chunk.take() for _ in range(scheduler.chunk.available)]
            scheduler.chunk.release(taken)
        held_from = 0 if keeps_chunks else LONGEST
        for common in range(computed + 1):
            second = np.concatenate([first[:common], np.arange(100, 100 + LONGEST)])
            for length in range(1, LONGEST + 1):
                hit = scheduler.find_prefix(choice_of(1, second[:length]))
                wanted = closed_form(common, length, computed, held_from)
                assert hit.length == wanted
                assert len(hit.whole) == wanted // PAGE
                assert len(hit.chunk) == wanted % CHUNK // PAGE  # none where a chunk ends


def test_equal_patch_tokens_of_other_pictures_share_nothing():
    tokens_T = np.full(8, tiny.PATCH)
    names = [
        PageNames(PAGE, tiles=[(2, 6, digest)]).up_to(tokens_T) for digest in (b"a", b"b", b"a")
    ]
    assert names[0] == names[2]
    assert not set(names[0]) & set(names[1])
    moved = PageNames(PAGE, tiles=[(3, 7, b"a")]).up_to(tokens_T)
    assert not set(names[0]) & set(moved)


def test_answers_that_begin_with_what_is_there_have_the_logits_of_a_cold_start(tmp_path):
    """Every prefix of up to three chunks, each in its own tokens: a bound on every log probability
    of the answer, which float32 in other pieces of a prompt reaches 6e-4 of at most."""
    pretrained = tiny.pretrained(tmp_path)
    sizes = EngineConfig(max_rows=1, step_tokens=32, max_context=40, page_size=PAGE)
    warm, options = Engine(pretrained, sizes), Options(max_new_tokens=2, logprobs=5)
    first = tiny.random_tokens(0, LONGEST)
    other = tiny.random_tokens(1, LONGEST)
    run(warm, first, options)
    for common in range(3, LONGEST, 2):
        tokens = [*first[:common], *other[common : common + 3]]
        before = warm.scheduler.found
        found = run(warm, tokens, options)
        assert warm.scheduler.found - before >= common // CHUNK * CHUNK
        for got, wanted in zip(found, run(Engine(pretrained, sizes), tokens, options), strict=True):
            assert [token for token, _ in got.likeliest] == [token for token, _ in wanted.likeliest]
            np.testing.assert_allclose(
                [value for _, value in got.likeliest],
                [value for _, value in wanted.likeliest],
                atol=3e-3,
            )


def run(engine, tokens, options):
    (prompt,) = read_requests(engine.pretrained, [Request(tokens=tokens)])
    engine.submit(prompt, options)
    found = []
    while engine.is_busy:
        for event in engine.step():
            found += event.logprobs or []
    return found
