"""Batching rounds a cache up to few sizes and refuses what cannot be."""

import jax
import pytest

from llama4_jax.serve import BatchingConfig
from tests.serve import tiny


@pytest.mark.parametrize(
    ("lengths", "rows", "length"),
    [([5], 1, 64), ([5, 70, 9], 4, 128), ([tiny.LONGEST] * 5, 8, tiny.LONGEST)],
)
def test_a_cache_has_rows_and_slots_in_powers_of_two(lengths, rows, length):
    cache = jax.eval_shape(lambda: BatchingConfig().make_cache(tiny.config(), lengths))
    assert cache.lengths_B.shape == (rows,)
    chunked, whole = cache.slots
    assert chunked.keys_GBKSH.shape[1::2] == (rows, 8)
    assert whole.keys_GBKSH.shape[1::2] == (rows, length)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"rows": 0}, r"rows \(0\) must be at least 1"),
        ({"steps": 0}, r"steps \(0\) must be at least 1"),
        ({"prefill_length": 48}, r"prefill_length \(48\) must be a power of two; choose 64"),
    ],
)
def test_impossible_limits_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        BatchingConfig(**wrong)
