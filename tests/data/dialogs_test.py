"""Digit dialogs carry loss on their answers alone and keep pictures beside their tokens."""

import numpy as np
import pytest
from PIL import Image

from llama4_jax.checkpoint.location import NANO
from llama4_jax.config import nano
from llama4_jax.data import dialogs, images, sources
from llama4_jax.data.dialogs import DialogEncoder, Turn
from llama4_jax.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(NANO / "tokenizer.json")
VISION = nano().vision
PATCH = TOKENIZER.special_id("<|patch|>")
ENCODER = DialogEncoder(
    tokenizer=TOKENIZER, vision_config=VISION, max_tiles=nano().max_tiles, answer_weight=3.0
)


@pytest.fixture(scope="module")
def held_out():
    return sources.read_digits("held_out")


def grey(side, level=90):
    return Image.new("L", (side, side), level)


def counted(example):
    """The text of the tokens that carry loss."""
    return TOKENIZER.decode(example.tokens_T[example.weights_T > 0].tolist())


def test_only_the_answer_and_its_end_carry_loss():
    example = ENCODER.encode([Turn((grey(32),), "Which digit is this?", "7")])
    assert counted(example) == "7<|eot|>"
    assert set(example.weights_T.tolist()) == {0.0, 3.0}
    text = TOKENIZER.decode([t for t in example.tokens_T.tolist() if t != PATCH])
    assert text == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\n"
        "<|image_start|><|image|><|image_end|>Which digit is this?<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n7<|eot|>"
    )


def test_every_answer_of_a_longer_dialog_carries_loss():
    turns = [Turn((grey(32),), "One?", "1"), Turn((grey(20),), "And this?", "2", True)]
    example = ENCODER.encode(turns)
    assert counted(example) == "1<|eot|>2<|eot|>"
    assert len(example.tiles_NCHW) == 2


def test_a_question_may_stand_before_its_picture():
    tokens = ENCODER.encode([Turn((grey(32),), "Q", "1", True)]).tokens_T.tolist()
    assert "Q<|image_start|>" in TOKENIZER.decode(tokens)


def test_patch_tokens_match_the_tiles_and_never_carry_loss():
    # One tile; and 2 x 2 tiles with their global tile.
    example = ENCODER.encode([Turn((grey(32), grey(64)), "Which digits are these?", "1 and 2")])
    assert len(example.tiles_NCHW) == 1 + 5
    is_patch = example.tokens_T == PATCH
    assert is_patch.sum() == 6 * VISION.tokens_per_tile
    assert not example.weights_T[is_patch].any()


def test_a_typed_placeholder_is_ordinary_text():
    example = ENCODER.encode([Turn((grey(8),), "<|patch|><|image|>?", "1")])
    assert (example.tokens_T == PATCH).sum() == VISION.tokens_per_tile


def test_a_question_is_the_dialog_up_to_its_answer():
    turns = [Turn((grey(32),), "Which digit is this?", "7")]
    question, example = ENCODER.ask(turns), ENCODER.encode(turns)
    assert question.answer == "7"
    assert example.tokens_T.tolist()[: len(question.tokens)] == question.tokens
    assert example.weights_T[: len(question.tokens)].sum() == 0
    assert (example.weights_T[len(question.tokens) :] > 0).all()
    np.testing.assert_array_equal(question.tiles_NCHW, example.tiles_NCHW)


def test_drawn_dialogs_repeat_with_their_seed_and_answer_truly(held_out):
    kinds = set()
    for seed in range(60):
        turns = dialogs.draw_turns(held_out, seed, np.random.default_rng(seed))
        again = dialogs.draw_turns(held_out, seed, np.random.default_rng(seed))
        assert [t.question for t in turns] == [t.question for t in again]
        for turn, other in zip(turns, again, strict=True):
            assert turn.pictures == other.pictures
        kinds.add((len(turns), len(turns[0].pictures)))
        assert turns[0].answer.split(" and ")[0] == str(held_out.labels_N[seed])
    assert kinds == {(1, 1), (1, 2), (2, 1)}


def test_drawn_pictures_are_small_grey_and_show_ink(held_out):
    rng = np.random.default_rng(0)
    sides = []
    for index in range(200):
        picture = dialogs.draw_picture(held_out.pixels_NHW[index], rng)
        assert picture.mode == "L"
        assert picture.width == picture.height
        sides.append(picture.width)
        low, high = picture.getextrema()
        assert high - low > 100
    assert min(sides) >= 16
    assert max(sides) == 32
    assert 0.05 < np.mean(np.array(sides) < 32) < 0.25


def test_a_plain_turn_shows_the_scan_upright_in_one_tile(held_out):
    turn = dialogs.plain_turn(held_out, 3)
    tiles = images.preprocess(turn.pictures[0], VISION, 4)
    assert tiles.tiles_NCHW.shape == (1, 3, 32, 32)
    scan = held_out.pixels_NHW[3].astype(np.float32) / 127.5 - 1
    blocks = tiles.tiles_NCHW[0, 0].reshape(8, 4, 8, 4).mean(axis=(1, 3))
    assert np.corrcoef(blocks.ravel(), scan.ravel())[0, 1] > 0.95
    assert turn.answer == str(held_out.labels_N[3])


def test_the_example_pictures_are_held_out_digits(held_out, tmp_path):
    known = {}
    for index, pixels in enumerate(held_out.pixels_NHW):
        known[np.asarray(dialogs.picture_of(pixels)).tobytes()] = str(held_out.labels_N[index])
    files = sorted((NANO / "examples").glob("digit_*.png"))
    assert len(files) >= 3
    for file in files:
        with Image.open(file) as picture:
            assert picture.size == (VISION.image_size, VISION.image_size)
            label = known[np.asarray(picture).tobytes()]
        assert file.stem == f"digit_{label}"
    dialogs.save_digit(held_out.pixels_NHW[0], tmp_path / "digit.png")
    upright = images.load_image(tmp_path / "digit.png")
    plain = dialogs.plain_turn(held_out, 0).pictures[0]
    np.testing.assert_array_equal(np.asarray(upright)[..., 0], np.asarray(plain))
