"""Text that arrives in pieces is whole characters and, joined, the whole text."""

import random

import pytest

from llama4_jax.text import StreamDecoder, load_tokenizer
from tests.text.nasty import nasty_strings
from tests.text.reference import NANO, tokenizer_model

VOCABULARIES = {"tokenizer.model": tokenizer_model, "tokenizer.json": lambda: load_tokenizer(NANO)}


@pytest.fixture(params=VOCABULARIES, scope="module")
def tokenizer(request):
    return VOCABULARIES[request.param]()


def test_joined_pieces_are_the_text_and_no_piece_has_half_a_character(tokenizer):
    for text in nasty_strings(300, seed=6):
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push([i]) for i in tokenizer.encode(text)]
        assert "".join(pieces) == text
        assert all(text.startswith("".join(pieces[: n + 1])) for n in range(len(pieces)))
        assert stream.finish() == ""


def test_any_ids_in_any_pieces_give_what_decoding_at_once_gives(tokenizer):
    random_ = random.Random(7)
    for _ in range(200):
        ids = [random_.randrange(tokenizer.vocab_size + 5) for _ in range(30)]
        for skip_special in (False, True):
            stream = StreamDecoder(tokenizer, skip_special=skip_special)
            cut = random_.randrange(30)
            text = stream.push(ids[:cut]) + stream.push(ids[cut:]) + stream.finish()
            assert text == tokenizer.decode(ids, skip_special=skip_special)


def test_a_character_is_held_back_until_its_last_byte(tokenizer):
    first, second, third, fourth = (tokenizer.encode(chr(0x1F900)) + [None] * 4)[:4]
    ids = [i for i in (first, second, third, fourth) if i is not None]
    assert len(ids) > 1, "the character must be several tokens for this test to say anything"
    stream = StreamDecoder(tokenizer)
    assert [stream.push([i]) for i in ids] == [""] * (len(ids) - 1) + [chr(0x1F900)]


def test_an_unfinished_character_shows_as_unknown_and_the_next_text_starts_afresh(tokenizer):
    stream = StreamDecoder(tokenizer)
    assert stream.push(tokenizer.encode(chr(0x1F900))[:-1]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push(tokenizer.encode("a")) == "a"
