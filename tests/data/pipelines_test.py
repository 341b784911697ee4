"""Streams of batches are deterministic, resumable and never show held-out data to training."""

import dataclasses
import json
import pathlib
import shutil
import sysconfig
from itertools import islice

import numpy as np
import pytest

from llama4_jax.checkpoint.location import NANO
from llama4_jax.config import nano
from llama4_jax.config.runs import OptimizerConfig, RunConfig
from llama4_jax.data import pipelines, sources
from llama4_jax.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(NANO / "tokenizer.json")
PATCH = TOKENIZER.special_id("<|patch|>")
EOT = TOKENIZER.special_id("<|eot|>")
MODEL = dataclasses.replace(nano(), pad_id=TOKENIZER.pad_id)


def make_run(**changes):
    settings = {
        "name": "test",
        "model": MODEL,
        "optimizer": OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=1),
        "mixture": (("code", 0.7), ("digits", 0.3)),
        "steps": 8,
        "batch_size": 4,
        "row_length": 256,
        "seed": 1,
    }
    return RunConfig(**settings | changes)


@pytest.fixture(scope="module")
def code_root(tmp_path_factory):
    """A slice of the standard library, large enough to have a held-out part."""
    root = tmp_path_factory.mktemp("code")
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.glob("*.py"))[:120]:
        shutil.copy(file, root / file.name)
    return root


@pytest.fixture(scope="module")
def train(code_root):
    return pipelines.train_batches(make_run(), TOKENIZER, code_root)


def assert_equal_batches(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_a_batch_is_a_dict_of_arrays_of_fixed_shape(train):
    batches = list(islice(train, 6))
    for batch in batches:
        for name in ("tokens_BT", "targets_BT", "segments_BT", "positions_BT"):
            assert batch[name].shape == (4, 256)
            assert batch[name].dtype == np.int32
        assert batch["loss_mask_BT"].dtype == batch["tiles_NCHW"].dtype == np.float32
        assert batch["tiles_NCHW"].shape == batches[0]["tiles_NCHW"].shape
        assert batch["tiles_NCHW"].shape[0] % 4 == 0  # rows and tiles divide over the same mesh


def test_the_stream_mixes_code_and_digits_with_little_padding(train):
    batches = list(islice(train, 12))
    tokens = np.concatenate([b["tokens_BT"].ravel() for b in batches])
    targets = np.concatenate([b["targets_BT"].ravel() for b in batches])
    weights = np.concatenate([b["loss_mask_BT"].ravel() for b in batches])
    segments = np.concatenate([b["segments_BT"].ravel() for b in batches])
    assert (segments > 0).mean() > 0.97
    assert set(weights.tolist()) == {0.0, 1.0, 5.0}
    assert not weights[targets == PATCH].any()
    assert (targets[weights == 5] == EOT).sum() > 20
    assert 0.15 < 1 - (weights == 1).mean() < 0.45  # the share of digits, about
    assert (tokens == PATCH).any()


def test_patch_tokens_have_their_tiles(train):
    for batch in islice(train, 6):
        used = (batch["tokens_BT"] == PATCH).sum() // MODEL.vision.tokens_per_tile
        assert (batch["tokens_BT"] == PATCH).sum() % MODEL.vision.tokens_per_tile == 0
        is_blank = (batch["tiles_NCHW"] == 0).all(axis=(1, 2, 3))
        assert is_blank.tolist() == [False] * used + [True] * (len(is_blank) - used)


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(train, code_root):
    again = pipelines.train_batches(make_run(), TOKENIZER, code_root)
    other = pipelines.train_batches(make_run(seed=2), TOKENIZER, code_root)
    for one, same, different in zip(islice(train, 3), again, other, strict=False):
        assert_equal_batches(one, same)
        assert (one["tokens_BT"] != different["tokens_BT"]).any()


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_an_iterator_goes_on_from_its_saved_state(train, taken):
    iterator = iter(train)
    for _ in range(taken):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = list(islice(iterator, 4))
    resumed = iter(train)
    next(resumed)
    resumed.set_state(state)
    for one, other in zip(expected, islice(resumed, 4), strict=True):
        assert_equal_batches(one, other)


def test_every_epoch_of_digits_is_drawn_anew(code_root):
    run = make_run(mixture=(("digits", 1.0),))
    reader = pipelines.Reader(
        tokenizer=TOKENIZER, model=MODEL, row_length=run.row_length, split="train"
    )
    epoch = pipelines.digit_examples(reader)
    twice = epoch.repeat(2)
    assert len(twice) == 2 * len(epoch)
    first, second = twice[0], twice[len(epoch)]
    assert first.tiles_NCHW.shape != second.tiles_NCHW.shape or (
        (first.tiles_NCHW != second.tiles_NCHW).any()
    )


def test_held_out_digits_come_once_each_as_scanned():
    run = make_run(mixture=(("digits", 1.0),), batch_size=8)
    first, second = (list(pipelines.held_out_batches(run, TOKENIZER)["digits"]) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_equal_batches(one, other)
    answers = [
        TOKENIZER.decode([target])
        for batch in first
        for target in batch["targets_BT"][batch["loss_mask_BT"] > 0].tolist()
        if target != EOT
    ]
    labels = sources.read_digits("held_out").labels_N
    assert answers == [str(label) for label in labels]


def test_held_out_code_is_read_whole_and_in_order(code_root):
    run = make_run(mixture=(("code", 1.0),))
    batches = list(pipelines.held_out_batches(run, TOKENIZER, code_root)["code"])
    tokens = np.concatenate([b["tokens_BT"][b["segments_BT"] > 0] for b in batches])
    text = TOKENIZER.decode(tokens.tolist(), skip_special=True)
    # Only the last token of a file's last piece is never an input, and that is end-of-text; a
    # piece inside a file loses its last token as input but keeps it as target.
    targets = sum(int(b["loss_mask_BT"].sum()) for b in batches)
    documents = sources.read_code("held_out", code_root)
    pieces = [p for d in documents for p in pipelines.cut_text(d.text, 3 * 256)]
    expected = sum(len(TOKENIZER.encode(p)) for p in pieces) + len(documents)
    assert targets == expected
    assert documents[0].text[:200] in text
    assert "tiles_NCHW" not in batches[0]


def test_questions_cover_every_held_out_digit():
    questions = pipelines.digit_questions(TOKENIZER, MODEL)
    labels = sources.read_digits("held_out").labels_N
    assert [question.answer for question in questions] == [str(label) for label in labels]
    assert all(question.tiles_NCHW.shape == (1, 3, 32, 32) for question in questions)


def test_unknown_sources_and_blind_models_are_refused(code_root):
    with pytest.raises(ValueError, match=r"unknown source 'cod' .* \['code', 'digits'\]"):
        pipelines.train_batches(make_run(mixture=(("cod", 1.0),)), TOKENIZER, code_root)
    blind = dataclasses.replace(MODEL, vision=None, patch_id=None)
    with pytest.raises(ValueError, match="nano has no vision encoder"):
        pipelines.train_batches(make_run(model=blind), TOKENIZER, code_root)
    run = make_run(model=blind, mixture=(("code", 1.0),))
    assert "tiles_NCHW" not in next(iter(pipelines.train_batches(run, TOKENIZER, code_root)))


@pytest.mark.parametrize("batch_size, row_length", [(1, 64), (2, 128), (1, 300)])
def test_short_rows_and_small_batches_hold_every_dialog(batch_size, row_length):
    run = make_run(mixture=(("digits", 1.0),), batch_size=batch_size, row_length=row_length)
    for batch in islice(pipelines.train_batches(run, TOKENIZER), 40):
        assert (batch["targets_BT"] == EOT).any()


def test_a_row_too_short_for_any_dialog_is_refused():
    run = make_run(mixture=(("digits", 1.0),), row_length=20)
    with pytest.raises(ValueError, match=r"slots and may not be cut, but row_length is 20"):
        next(iter(pipelines.train_batches(run, TOKENIZER)))


@pytest.mark.parametrize("most", [40, 200, 1000])
def test_pieces_of_code_join_to_the_text_and_keep_their_size(most):
    text = pathlib.Path(pipelines.__file__).read_text()
    pieces = pipelines.cut_text(text, most)
    assert "".join(pieces) == text
    assert all(most // 2 <= len(piece) <= most for piece in pieces[:-1])
    assert 0 < len(pieces[-1]) <= most


def test_code_is_cut_before_statements_then_before_lines_then_anywhere():
    body = "def f():\n    return 1\n\n\ndef g():\n    return 2\n    # tail\n    # more\n"
    first, second, *_ = pipelines.cut_text(body, 36)
    assert (first, second[:7]) == ("def f():\n    return 1\n\n\n", "def g()")
    assert pipelines.cut_text("aaaa\nbbbb\ncccc\n", 11) == ["aaaa\nbbbb\n", "cccc\n"]
    assert pipelines.cut_text("a" * 25, 10) == ["a" * 10, "a" * 10, "a" * 5]
    assert pipelines.cut_text("", 10) == [""]
