"""A tokenizer.json gives the ids of Meta's file, and none of its traps bites."""

import json
import shutil

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from llama4_jax.text import HFTokenizer, load_tokenizer
from llama4_jax.text.hf_tokenizer import bytes_by_character
from tests.text.nasty import nasty_strings
from tests.text.reference import NANO, ROOT, hugging_face_twin, tokenizer_model

GOLDEN = json.loads((ROOT / "tests/golden/nano_tokenizer.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """A tokenizer.json with Meta's ranks, as published: no tokens after vision, a stray pad."""
    folder = tmp_path_factory.mktemp("twin")
    hugging_face_twin(folder / "tokenizer.json")
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>"}
    config["pad_token"] = "<|finetune_right_pad_id|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def test_nasty_strings_have_the_ids_of_metas_file(twin):
    for text in nasty_strings(3000, seed=3):
        ids = twin.encode(text)
        assert ids == tokenizer_model().encode(text), repr(text)
        assert twin.decode(ids) == text


def test_special_tokens_asked_for_have_the_ids_of_metas_file(twin):
    for text in nasty_strings(300, seed=4):
        want = tokenizer_model().encode(text, allow_special=True)
        assert twin.encode(text, allow_special=True) == want


def test_bytes_that_are_no_text_decode_as_with_metas_file(twin):
    ids = [i for i in range(0, 200_000, 37) if b"\xff" > twin.token_bytes(i) > b"\x80"][:500]
    assert twin.decode(ids) == tokenizer_model().decode(ids)


def test_the_padding_token_is_metas_and_not_the_stray_one(twin):
    assert twin.special_tokens["<|finetune_right_pad_id|>"] == 201_134
    assert twin.pad_id == 200_018


def test_all_three_stop_tokens_end_a_generation(twin):
    assert twin.eos_ids == (200_001, 200_007, 200_008)


def test_an_id_that_the_file_lacks_shows_as_unknown(twin):
    assert twin.vocab_size == 201_135
    assert twin.decode([77, 202_047]) == "a\ufffd"


def test_the_byte_alphabet_is_that_of_the_library():
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte_of = bytes_by_character()
    assert sorted(byte_of) == sorted(pre_tokenizers.ByteLevel.alphabet())
    for text in nasty_strings(200, seed=5):
        spelled = to_bytes.pre_tokenize_str(text)
        assert bytes(byte_of[c] for c in spelled[0][0]) == text.encode()


# --------------------------------------------------------------------------------------- nano


def test_nano_ids_are_those_of_transformers():
    tokenizer = load_tokenizer(NANO)
    for case in GOLDEN["texts"]:
        assert tokenizer.encode(case["text"]) == case["plain"], case["text"]
        assert tokenizer.encode(case["text"], allow_special=True) == case["special"], case["text"]
        assert tokenizer.encode(case["text"], bos=True)[0] == tokenizer.bos_id


def test_nano_decodes_as_transformers_does():
    tokenizer = load_tokenizer(NANO)
    for case in GOLDEN["ids"]:
        assert tokenizer.decode(case["ids"]) == case["text"]
        assert tokenizer.decode(case["ids"], skip_special=True) == case["without_special"]


def test_nano_roles_are_those_that_transformers_reads():
    tokenizer = load_tokenizer(NANO)
    assert tokenizer.vocab_size == GOLDEN["vocab_size"] == 2048
    assert tokenizer.bos_id == GOLDEN["bos_id"]
    assert tokenizer.pad_id == GOLDEN["pad_id"]
    assert GOLDEN["eos_id"] in tokenizer.eos_ids


def test_the_post_processor_never_adds_a_second_begin_of_text():
    by_library = tokenizers.Tokenizer.from_file(str(NANO / "tokenizer.json"))
    text = "<|begin_of_text|>a"
    assert by_library.encode(text).ids == [1920, 1920, 64]
    assert load_tokenizer(NANO).encode(text, allow_special=True, bos=True) == [1920, 64]


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(NANO / "tokenizer.json"))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("a b c d e")) == 5


# ------------------------------------------------------------------------- other vocabularies


def _edited(tmp_path, edit, config=None):
    value = json.loads((NANO / "tokenizer.json").read_text("utf-8"))
    edit(value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return HFTokenizer(tmp_path / "tokenizer.json")


def _rename_specials(value):
    for token in value["added_tokens"]:
        token["content"] = token["content"].replace("<|", "<<")
    value["post_processor"] = None


def test_roles_come_from_the_config_where_the_names_are_others(tmp_path):
    config = {"bos_token": "<<begin_of_text|>", "eos_token": {"content": "<<eot|>"}}
    tokenizer = _edited(tmp_path, _rename_specials, config)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (1920, (1928,), 1928)


def test_a_vocabulary_without_end_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none of the end tokens"):
        _edited(tmp_path, _rename_specials)


def test_begin_of_text_is_refused_where_there_is_none(tmp_path):
    tokenizer = _edited(tmp_path, _rename_specials, {"eos_token": "<<eot|>"})
    with pytest.raises(ValueError, match="no begin-of-text token"):
        tokenizer.encode("a", bos=True)


def test_a_special_token_that_swallows_neighbours_is_refused(tmp_path):
    with pytest.raises(ValueError, match="swallow"):
        _edited(tmp_path, lambda value: value["added_tokens"][3].update(lstrip=True))


def test_runs_too_long_for_the_vocabularys_pattern_are_cut_as_by_metas_tokenizer(twin):
    for text in (" " * 60_000 + "a", "a" * 60_000, "\n" * 60_000 + "b " * 10):
        assert twin.encode(text) == tokenizer_model().encode(text)


def test_a_pattern_that_gives_up_is_an_error_and_not_a_panic(tmp_path):
    def catastrophe(value):
        value["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "(a|a)*$"}

    tokenizer = _edited(tmp_path, catastrophe)
    with pytest.raises(ValueError, match="pattern cannot cut this text"):
        tokenizer.encode("a" * 100 + "b")


def test_an_id_out_of_all_proportion_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one has the id 4000000000"):
        _edited(tmp_path, lambda value: value["model"]["vocab"].update(zzz=4_000_000_000))


@pytest.mark.parametrize("named", [["a"], {"content": ["a"]}, 5, {"a": {}}])
def test_a_named_token_that_is_no_text_counts_as_none(tmp_path, named):
    assert _edited(tmp_path, lambda _: None, {"eos_token": named}).eos_ids


def test_a_damaged_config_is_named(tmp_path):
    shutil.copy(NANO / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(tmp_path)
