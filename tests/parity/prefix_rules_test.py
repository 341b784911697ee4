"""Ours computes no more of a trace than the rules of others do with as many bytes."""

import numpy as np
import pytest

from tests.parity import prefix_rules
from tests.parity.prefix_rules import CHUNK, LOCAL_BLOCKS, PAGE, VLLM, Ours, SGLang, Visit

SIZE = 8  # chunks of all layers
BUDGET = SIZE * (CHUNK // PAGE) * (1 + LOCAL_BLOCKS) * prefix_rules.block_bytes()
RULES = {
    "ours": lambda: Ours.of_bytes(BUDGET, rows=1),
    "vllm": lambda: VLLM(BUDGET),
    "sglang": lambda: SGLang(BUDGET),
}


def visit(length, *, seed=0, tail=0):
    rng = np.random.default_rng(seed)
    text_T = rng.integers(0, 1 << 20, length)
    tail_T = np.random.default_rng((1, tail)).integers(0, 1 << 20, PAGE)
    return Visit(np.concatenate([text_T, tail_T]), tail_T[:2])


@pytest.mark.parametrize("rule", RULES)
def test_a_prompt_that_was_just_read_is_found_but_for_its_last_page(rule):
    cache = RULES[rule]()
    for length in (PAGE, CHUNK - PAGE, CHUNK, 2 * CHUNK + PAGE):
        first = visit(length, seed=length)
        assert cache.serve(first) == length + PAGE
        assert cache.serve(first) == PAGE
        assert cache.serve(visit(length, seed=length, tail=1)) == PAGE


def test_where_a_chunk_ends_only_a_window_needs_what_chunk_layers_held():
    """A second document takes the places of the first in chunk layers."""
    computed = {}
    for name, make in RULES.items():
        cache = make()
        cache.serve(visit(3 * CHUNK))
        for chunk in (cache.scheduler.chunk if name == "ours" else cache.chunk.pool,):
            if name != "vllm":  # whose pool is one
                for page in [chunk.take() for _ in range(chunk.available)]:
                    chunk.release([page])
        computed[name] = cache.serve(visit(3 * CHUNK, tail=1))
    assert computed == {"ours": PAGE, "vllm": PAGE, "sglang": 3 * CHUNK + PAGE}


def test_ours_computes_no_more_than_vllm_and_holds_twice_the_documents():
    found = prefix_rules.compare(SIZE, rows=1)
    held = found.pop("documents held")
    for trace, computed in found.items():
        assert computed["ours"] <= computed["vllm"], trace
        assert computed["ours"] <= computed["sglang"], trace
    assert held["ours"] >= 2 * held["vllm"]
