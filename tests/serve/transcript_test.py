"""Texts stream as far as they are certain, and end where they should."""

import pytest

from llama4_jax.serve.options import Options
from llama4_jax.serve.transcript import Ending, Transcript
from llama4_jax.text import load_tokenizer
from tests.serve import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return load_tokenizer(folder)


def texts(tokenizer, tokens, **fields):
    """Return the texts of tokens up to the end, and why it ended."""
    options = Options(**{"max_new_tokens": 100, **fields})
    skip = options.skip_special
    transcript, found = Transcript(tokenizer, Ending.of(options), skip_special=skip), []
    for token in tokens:
        found.append(transcript.add(token))
        if transcript.finish_reason is not None:
            break
    return found, transcript.finish_reason


def test_what_may_begin_a_stop_text_is_held_back_until_it_is_none(tokenizer):
    found, reason = texts(tokenizer, b"xaabay", stop=["aab!", "bb"])
    assert found == ["x", "", "", "", "aab", "ay"]
    assert reason is None


@pytest.mark.parametrize(
    ("stop", "include", "text"),
    [
        (["cd"], False, "ab"),
        (["cd"], True, "abcd"),
        (["d", "bcd"], False, "a"),  # both end at d: the longer one begins first
        (["e", "b"], False, "a"),
        (["zz"], False, "abcdef"),
    ],
)
def test_a_stop_text_ends_the_answer(tokenizer, stop, include, text):
    found, reason = texts(tokenizer, b"abcdef", stop=stop, include_stop=include)
    assert "".join(found) == text
    assert reason == ("stop" if text != "abcdef" else None)


def test_the_last_token_brings_what_was_held_back(tokenizer):
    found, reason = texts(tokenizer, b"ab", stop=["bc"], max_new_tokens=2)
    assert (found, reason) == (["a", "b"], "length")


def test_a_stop_token_is_not_part_of_the_text_and_another_special_token_may_be(tokenizer):
    tokens = [97, tiny.PAD, tiny.EOT]
    found, reason = texts(tokenizer, tokens, stop_ids=[tiny.EOT])
    assert "".join(found) == "a<|finetune_right_pad|>"
    assert reason == "stop"
    found, _ = texts(tokenizer, tokens, stop_ids=[tiny.EOT], skip_special=True)
    assert "".join(found) == "a"


def test_a_character_waits_for_all_of_its_bytes(tokenizer):
    found, _ = texts(tokenizer, "aé".encode())
    assert found == ["a", "", "é"]


def test_without_a_tokenizer_there_is_no_text():
    assert texts(None, [1, 2], max_new_tokens=2) == (["", ""], "length")
