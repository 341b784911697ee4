"""generation_config.json: what it says is applied, refused by key, or warned of."""

import dataclasses
import json
import math

import pytest

from llama4_jax.config import nano
from llama4_jax.config.generation import GenerationDefaults, read_generation


@pytest.fixture
def read(tmp_path):
    def read(**values):
        path = tmp_path / "generation_config.json"
        path.write_text(json.dumps(values))
        return read_generation(path, nano())

    return read


def test_without_a_file_a_model_stops_where_its_config_says(tmp_path):
    defaults = read_generation(tmp_path / "absent.json", nano())
    assert defaults == GenerationDefaults(stop_ids=nano().eos_ids)


def test_every_number_that_is_known_is_read(read):
    numbers = {"temperature": 0.6, "top_p": 0.9, "top_k": 7, "min_p": 0.1}
    found = read(do_sample=True, repetition_penalty=1.2, eos_token_id=[7, 8], **numbers)
    assert found == GenerationDefaults(stop_ids=(7, 8), repetition_penalty=1.2, **numbers)


def test_numbers_of_draws_are_for_draws_and_a_penalty_is_not(read):
    found = read(temperature=0.6, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.2)
    expected = GenerationDefaults(repetition_penalty=1.2, stop_ids=nano().eos_ids)
    assert found == expected


def test_a_null_id_means_that_nothing_stops_an_answer(read):
    assert read(eos_token_id=None).stop_ids == ()
    assert read(eos_token_id=[]).stop_ids == ()
    assert read(eos_token_id=3).stop_ids == (3,)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("eos_token_id", eos) for eos in ("x", -1, 1.5, True, [1, "x"], [[1]], {}, 2048, 10**12)),
        *(("temperature", t) for t in (-1, "hot", math.nan, math.inf, True, [1])),
        *(("top_p", p) for p in (0, -0.1, 1.1, "x", math.nan)),
        *(("top_k", k) for k in (-1, 0.5, "x", 10**12)),
        *(("min_p", p) for p in (-0.1, 1.1, "x")),
        *(("repetition_penalty", p) for p in (0, -1, 101, "x", math.inf)),
        ("do_sample", "yes"),
    ],
)
def test_a_number_that_is_none_is_refused_by_key(read, key, value):
    with pytest.raises(ValueError, match=rf"generation_config.json: {key} \(.* must be "):
        read(**{key: value})


def test_what_is_not_applied_is_warned_of_unless_it_changes_nothing(read):
    with pytest.warns(UserWarning, match=r"no_repeat_ngram_size \(3\) is not applied"):
        read(no_repeat_ngram_size=3)
    read(num_beams=1, typical_p=1.0, bad_words_ids=None, max_length=20, transformers_version="5")


def test_defaults_are_what_the_options_of_a_request_leave_open(read):
    from llama4_jax.serve.options import Options, Sampling

    defaults = read(do_sample=True, temperature=0.6, min_p=0.1, repetition_penalty=1.2)
    open_ = Options().resolved(defaults, 2048)
    names = ("temperature", "min_p", "repetition_penalty")
    assert [getattr(open_, name) for name in names] == [0.6, 0.1, 1.2]
    assert open_.changes_logits
    said = Sampling(temperature=0.5).resolved(defaults, 2048)
    assert [getattr(said, name) for name in names] == [0.5, 0.0, 1.0]
    assert dataclasses.replace(open_, repetition_penalty=1.0).changes_logits is False
