"""A mixture keeps its shares of the tokens, whatever the lengths of its examples."""

import grain
import numpy as np
import pytest

from llama4_jax.data.mixture import Part, mix
from llama4_jax.data.packing import Example


def part(name, share, length, tiles=0, count=7):
    def make(index):
        picture = np.zeros((tiles, 3, 2, 2), np.float32) if tiles else None
        tokens_T = np.full(length + 1, ord(name), np.int32)
        return Example(tokens_T, np.full(length + 1, index, np.float32), picture)

    return Part(name=name, share=share, examples=grain.MapDataset.range(count).map(make))


@pytest.mark.parametrize("share", [0.5, 0.25, 0.05])
def test_shares_are_of_tokens(share):
    mixture = mix([part("a", 1 - share, 100), part("b", share, 7)])
    slots = {ord("a"): 0, ord("b"): 0}
    for index in range(6000):
        example = mixture.examples[index]
        slots[int(example.tokens_T[0])] += example.num_slots
    assert abs(slots[ord("b")] / sum(slots.values()) - share) < 0.01


def test_shares_need_not_sum_to_one():
    one, other = (mix([part("a", 3 * k, 10), part("b", k, 10)]) for k in (1, 0.25))
    for index in range(40):
        assert one.examples[index].tokens_T[0] == other.examples[index].tokens_T[0]


def test_small_parts_repeat_and_all_their_examples_come():
    mixture = mix([part("a", 0.5, 10, count=3), part("b", 0.5, 10, count=90)])
    drawn = [mixture.examples[index] for index in range(100)]
    assert {int(e.weights_T[0]) for e in drawn if e.tokens_T[0] == ord("a")} == {0, 1, 2}


def test_expected_tiles_count_every_part():
    mixture = mix([part("a", 0.75, 100), part("b", 0.25, 10, tiles=2)])
    assert mixture.tiles_per_slot == pytest.approx(0.25 * 2 / 10)


def test_bad_mixtures_are_refused():
    with pytest.raises(ValueError, match="at least one part"):
        mix([])
    with pytest.raises(ValueError, match=r"share of 'a' \(0\) must be positive"):
        mix([part("a", 0, 5)])
    with pytest.raises(ValueError, match="'a' has no example"):
        mix([part("a", 1, 5, count=0)])
