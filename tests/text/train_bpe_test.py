"""A small vocabulary is learned the same way every time and has the shape of Llama 4's."""

import json

import pytest

from llama4_jax.text import HFTokenizer, special_tokens
from llama4_jax.text.pattern import WORD_PATTERN
from llama4_jax.text.train_bpe import train_bpe
from tests.text.nasty import nasty_strings
from tests.text.reference import NANO, meta_tokenizer

TEXTS = [
    "def add(first, second):\n    return first + second\n" * 3,
    "<|eot|> the theme then",
    __doc__,
] * 5


def _train(tmp_path, vocab_size=300 + 128, **settings):
    path = tmp_path / "tokenizer.json"
    train_bpe(TEXTS, vocab_size, **settings).save(str(path))
    return HFTokenizer(path)


def test_the_same_texts_give_the_same_vocabulary():
    assert train_bpe(TEXTS, 428).to_str() == train_bpe(iter(TEXTS), 428).to_str()


def test_special_tokens_take_the_last_rows(tmp_path):
    tokenizer = _train(tmp_path)
    assert tokenizer.vocab_size == 428
    names = special_tokens.nano_special_tokens()
    assert [tokenizer.special_id(name) for name in names] == list(range(300, 428))


def test_a_special_token_in_the_texts_teaches_nothing_special(tmp_path):
    ids = _train(tmp_path).encode("<|eot|>")
    assert all(i < 300 for i in ids)


def test_frequent_words_are_short_and_everything_comes_back(tmp_path):
    tokenizer = _train(tmp_path)
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 3
    for text in nasty_strings(200, seed=10):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_other_special_tokens_can_be_chosen(tmp_path):
    names = ("<|begin_of_text|>", "<|end_of_text|>")
    assert _train(tmp_path, vocab_size=260, special_names=names).eos_ids == (259,)


@pytest.mark.parametrize(("size", "message"), [(300, "at least 384"), (4000, "give more text")])
def test_a_size_that_cannot_be_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        train_bpe(TEXTS, size)


def test_the_word_pattern_is_that_of_metas_code():
    assert meta_tokenizer().O200K_PATTERN == WORD_PATTERN


def test_nano_cuts_words_by_the_same_pattern():
    value = json.loads((NANO / "tokenizer.json").read_text("utf-8"))
    assert value["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": WORD_PATTERN}
