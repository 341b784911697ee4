"""The real tokenizer.model gives the published ids, and folders are recognised."""

import hashlib
import json
import shutil

import pytest

from llama4_jax.text import HFTokenizer, TiktokenTokenizer, load_tokenizer
from llama4_jax.text.tiktoken_tokenizer import split_long
from tests.text.nasty import nasty_strings
from tests.text.reference import NANO, llama_models_path, meta_tokenizer, tokenizer_model

MODEL_FILE = llama_models_path("llama4/tokenizer.model")

GOLDEN = {
    "Hello world": [19873, 3817],
    "Hello, world! 12345 don't DON'T\n\n\tfoo  bar   ": [
        *(19873, 24, 3817, 13, 220, 7235, 2127, 5863, 93885, 59842, 368, 197, 16662, 220, 4157, 277)
    ],
    "你好，世界": [5098, 4219, 586, 14287],
    "🙂 emoji": [5796, 247, 224, 88230],
    "user": [1556],
    "assistant": [140680],
    "system": [15651],
    "ipython": [607, 6934],
    "\n\n": [368],
    "https://a.b/c//d\n": [2271, 1050, 77, 1943, 2646, 405, 80, 198],
    "1,234.56": [29, 24, 19414, 26, 4329],
    "": [],
}


def test_the_file_is_the_one_that_the_goldens_were_made_with():
    digest = hashlib.sha256(MODEL_FILE.read_bytes()).hexdigest()
    assert digest == "d0bdbaf59b0762c8c807617e2d8ea51420eb1b1de266df2495be755c8e0ed6ed"


@pytest.mark.parametrize(("text", "ids"), GOLDEN.items())
def test_a_text_has_its_published_ids_and_they_decode_to_it(text, ids):
    assert tokenizer_model().encode(text) == ids
    assert tokenizer_model().decode(ids) == text


def test_sizes_and_roles_are_those_of_llama_4():
    tokenizer = tokenizer_model()
    assert tokenizer.vocab_size == 202_048
    assert tokenizer.bos_id == 200_000
    assert tokenizer.eos_ids == (200_001, 200_007, 200_008)
    assert tokenizer.pad_id == 200_018


def test_nasty_strings_have_the_ids_of_metas_code_and_come_back():
    for text in nasty_strings(2000, seed=1):
        ids = tokenizer_model().encode(text)
        assert ids == meta_tokenizer().encode(text, bos=False, eos=False), repr(text)
        assert tokenizer_model().decode(ids) == text


def test_special_tokens_asked_for_have_the_ids_of_metas_code():
    for text in nasty_strings(300, seed=2):
        want = meta_tokenizer().encode(text, bos=True, eos=False, allowed_special="all")
        assert tokenizer_model().encode(text, allow_special=True, bos=True) == want


def test_a_special_token_typed_by_a_user_is_ordinary_text():
    ids = tokenizer_model().encode("<|eot|><|image|>")
    assert not any(tokenizer_model().is_special(i) for i in ids)
    assert tokenizer_model().decode(ids) == "<|eot|><|image|>"


def test_begin_of_text_is_never_doubled():
    tokenizer = tokenizer_model()
    assert tokenizer.encode("a", bos=True) == [200_000, 77]
    assert tokenizer.encode("<|begin_of_text|>a", allow_special=True, bos=True) == [200_000, 77]
    assert len(tokenizer.encode("<|begin_of_text|>a", bos=True)) > 3  # typed by a user


@pytest.mark.parametrize(
    "text",
    [
        " " * 25_000,
        " " * 25_001,
        "a" * 25_001,
        "\u3000" * 60_000 + "b" * 51_000 + " c",
        "ab " * 140_000,
        "x" * 399_999 + "\n\n" + "y" * 30_000,
    ],
    ids=["at the limit", "spaces", "letters", "both", "long text", "cut between line ends"],
)
def test_monsters_are_cut_where_metas_code_cuts_them(text):
    pieces = list(split_long(text))
    assert "".join(pieces) == text
    reference = meta_tokenizer()
    want = [
        piece
        for i in range(0, len(text), 400_000)
        for piece in reference._split_whitespaces_or_nonwhitespaces(text[i : i + 400_000], 25_000)
    ]
    assert pieces == want


def test_25001_spaces_are_392_tokens_as_in_metas_code():
    assert len(tokenizer_model().encode(" " * 25_001)) == 392


def test_unpaired_surrogates_become_replacement_characters():
    assert tokenizer_model().encode("a\ud800b") == tokenizer_model().encode("a\ufffdb")
    assert tokenizer_model().encode("\ud83d\ude42") == tokenizer_model().encode("🙂")


def test_special_tokens_can_be_left_out_of_the_text():
    ids = [200_000, 19873, 200_092, 3817, 200_008]
    assert tokenizer_model().decode(ids, skip_special=True) == "Hello world"
    assert tokenizer_model().decode(ids) == "<|begin_of_text|>Hello<|patch|> world<|eot|>"


def test_an_id_beyond_the_vocabulary_shows_as_unknown_and_a_negative_one_is_refused():
    assert tokenizer_model().decode([77, 202_050]) == "a\ufffd"
    with pytest.raises(ValueError, match="at least 0, not -1"):
        tokenizer_model().decode([77, -1])


def test_an_unknown_special_token_is_refused_by_name():
    with pytest.raises(ValueError, match="begin_of_sentence"):
        tokenizer_model().special_id("<|begin_of_sentence|>")


# ------------------------------------------------------------------------------ finding the files


def test_metas_layout_is_recognised(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    shutil.copy(MODEL_FILE, tmp_path / "tokenizer.model")
    assert isinstance(load_tokenizer(tmp_path), TiktokenTokenizer)
    assert isinstance(load_tokenizer(tmp_path / "tokenizer.model"), TiktokenTokenizer)


def test_hugging_faces_layout_is_recognised_and_wins(tmp_path):
    (tmp_path / "original").mkdir()
    shutil.copy(MODEL_FILE, tmp_path / "original" / "tokenizer.model")
    assert isinstance(load_tokenizer(tmp_path), TiktokenTokenizer)
    shutil.copy(NANO / "tokenizer.json", tmp_path)
    assert isinstance(load_tokenizer(tmp_path), HFTokenizer)


def test_a_folder_without_tokenizer_has_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x0a\x0e\x0a\x05<unk>\x15", "SentencePiece"),
        (b"IQ== 0\nIg== 2\n", "ranks are not 0 to 1"),
        (b"IQ== 0\nIg== 1\n", "254 of the 256 bytes are missing"),
        (b"", "256 of the 256 bytes are missing"),
    ],
)
def test_a_damaged_tokenizer_model_is_refused_with_the_reason(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


def test_the_tokenizer_of_llama_3_is_refused():
    with pytest.raises(ValueError, match=r"128000 ranks but Llama 4's tokenizer\.model has 200000"):
        load_tokenizer(llama_models_path("llama3/tokenizer.model"))


def test_a_tokenizer_json_of_another_kind_is_refused(tmp_path):
    value = json.loads((NANO / "tokenizer.json").read_text(encoding="utf-8"))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**value, "decoder": None}))
    with pytest.raises(ValueError, match="only byte-level"):
        load_tokenizer(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path)
