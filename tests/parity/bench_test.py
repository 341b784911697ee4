"""The comparison with transformers reports what was measured, and falls where it falls short."""

import json

import pytest

from tests.parity.bench_report import HEADER, Comparison, Item, Spread, best_way, wrong_tokens

ITEM = Item(name="layer, prompt", tokens=1024, target=3.0)


def comparison(ours=(0.1, 0.2, 0.4), theirs=(0.6, 0.8, 1.0)):
    return Comparison(item=ITEM, way="eager", ours=ours, theirs=theirs)


def test_a_ratio_is_the_median_of_single_rounds_not_of_medians():
    assert comparison().ratio.median == pytest.approx(4.0), "6, 4 and 2.5"
    drifting = comparison(ours=(1.0, 2.0, 9.0), theirs=(4.0, 8.0, 9.0))
    assert drifting.ratio.median == pytest.approx(4.0), "a slow round slows both sides"


def test_a_target_is_reached_at_its_very_value_and_said_to_be_missed_below():
    exact = comparison(ours=(1.0,), theirs=(3.0,))
    assert exact.is_reached
    assert "BELOW" not in exact.line()
    short = comparison(ours=(1.0,), theirs=(2.9,))
    assert not short.is_reached
    assert "BELOW 3.0" in short.line()


def test_a_line_shows_times_and_tokens_a_second():
    line = comparison().line()
    assert "200.00 (150.00-300.00) ms" in line
    assert "5120     1280" in line
    assert line.index("eager") == HEADER.index("transformers as")


def test_one_round_is_its_own_spread():
    assert Spread.of([2.0]) == Spread(median=2.0, low=2.0, high=2.0)


def test_a_record_is_json_with_the_ratio_and_its_spread():
    record = json.loads(json.dumps(comparison().record()))
    assert record["ratio"]["median"] == pytest.approx(4.0)
    assert record["rounds"] == 3
    assert record["theirs_seconds"] == {"median": 0.8, "low": 0.7, "high": 0.9}


def test_transformers_gets_its_fastest_way():
    assert best_way({"eager": [2.0, 2.0], "compiled": [1.0, 1.5]}) == "compiled"
    assert best_way({"eager": [1.0], "compiled": [1.0]}) == "eager"


def test_another_token_is_wrong_unless_the_two_best_were_as_good():
    gaps = [0.5, 0.5, 0.5]
    assert wrong_tokens([1, 2, 3], [1, 2, 3], gaps, 0.01) == 0
    assert wrong_tokens([1, 9, 8], [1, 2, 3], gaps, 0.01) == 2
    assert wrong_tokens([1, 9, 8], [1, 2, 3], [0.5, 0.001, 0.5], 0.01) == 0
    with pytest.raises(ValueError, match="longer"):
        wrong_tokens([1, 2], [1, 2, 3], gaps, 0.01)
