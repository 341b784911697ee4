"""Make conversations about pictures of handwritten digits, with the loss on the answers."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from llama4_jax.config import VisionConfig
from llama4_jax.data.images import (
    ImageTiles,
    ImageTokenIds,
    image_tokens,
    preprocess,
    stack_tiles,
)
from llama4_jax.data.packing import Example
from llama4_jax.data.sources import DigitScans
from llama4_jax.text import chat
from llama4_jax.text import messages as chat_messages
from llama4_jax.text.tokenizer import Tokenizer

QUESTIONS = (
    "Which digit is this?",
    "What digit is this?",
    "Which digit do you see?",
    "What number is this?",
    "Which number is in the picture?",
    "Which digit is in the image?",
    "Read the digit.",
    "Name this digit.",
)
QUESTIONS_ON_TWO = ("Which digits are these?", "What digits are these?", "Read both digits.")
QUESTIONS_ON_ANOTHER = ("And this one?", "And which digit is this?", "Now this one.")

# Pictures in the longest drawn dialog.
MOST_PICTURES = 2

# An answer is two tokens in a dialog of about fifty, so each counts for this many tokens of code.
ANSWER_WEIGHT = 5.0

_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.NEAREST)


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """A question about pictures, and its answer."""

    pictures: tuple[Image.Image, ...]
    question: str
    answer: str
    question_first: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A prompt that ends where the assistant's answer begins.

    Attributes:
        tokens: ids of the prompt.
        tiles_NCHW: float32 tiles of its patch tokens.
        answer: the right answer.
    """

    tokens: list[int]
    tiles_NCHW: np.ndarray
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DialogEncoder:
    """Turns conversations into tokens and tiles in the model's chat form.

    Attributes:
        tokenizer: has the chat and the image special tokens.
        vision_config: of the model that will read the tiles.
        max_tiles: most tiles of one picture, without its global tile.
        answer_weight: loss weight of every token of an answer and of its end.
    """

    tokenizer: Tokenizer
    vision_config: VisionConfig
    max_tiles: int
    answer_weight: float = 1.0

    def encode(self, turns: Sequence[Turn]) -> Example:
        """Encode a whole conversation; only answers and their ends carry loss."""
        images, messages = self._read(turns)
        tokens = self._render(messages, is_prompt=False)
        weights_T = np.zeros(len(tokens), np.float32)
        for end in range(2, len(messages) + 1, 2):
            begin = len(self._render(messages[: end - 1], is_prompt=True))
            stop = len(self._render(messages[:end], is_prompt=False))
            weights_T[begin:stop] = self.answer_weight
        tiles_NCHW = stack_tiles(images, self.vision_config)
        return Example(np.array(tokens, np.int32), weights_T, tiles_NCHW)

    def ask(self, turns: Sequence[Turn]) -> Question:
        """Encode a conversation up to its last answer."""
        images, messages = self._read(turns)
        tokens = self._render(messages[:-1], is_prompt=True)
        return Question(tokens, stack_tiles(images, self.vision_config), turns[-1].answer)

    def _read(self, turns: Sequence[Turn]) -> tuple[list[ImageTiles], list[chat_messages.Message]]:
        """Cut the pictures into tiles, and write messages whose images carry their token ids."""
        ids = ImageTokenIds.from_tokenizer(self.tokenizer)
        images, messages = [], []
        for turn in turns:
            tiles = [preprocess(p, self.vision_config, self.max_tiles) for p in turn.pictures]
            runs = [chat_messages.Image(image_tokens(t, self.vision_config, ids)) for t in tiles]
            parts = [turn.question, *runs] if turn.question_first else [*runs, turn.question]
            messages.append(chat_messages.Message("user", parts))
            messages.append(chat_messages.Message("assistant", turn.answer))
            images += tiles
        return images, messages

    def _render(self, messages: Sequence[chat_messages.Message], *, is_prompt: bool) -> list[int]:
        return chat.render(
            messages,
            self.tokenizer,
            image_tokens=lambda image: image.source,
            add_generation_prompt=is_prompt,
        )


def plain_turn(scans: DigitScans, index: int, side: int = 32) -> Turn:
    """Return the first question on one scan, as it is, enlarged to `side` pixels."""
    picture = picture_of(scans.pixels_NHW[index], side)
    return Turn((picture,), QUESTIONS[0], str(scans.labels_N[index]))


def draw_turns(scans: DigitScans, index: int, rng: np.random.Generator) -> list[Turn]:
    """Draw a conversation on a scan: mostly one picture, else two at once or one after another.

    The other scans, the wording, the order and the looks of the pictures are drawn from `rng`.
    """

    def turn(indices: Sequence[int], questions: Sequence[str]) -> Turn:
        pictures = tuple(draw_picture(scans.pixels_NHW[i], rng) for i in indices)
        answer = " and ".join(str(scans.labels_N[i]) for i in indices)
        return Turn(pictures, str(rng.choice(questions)), answer, bool(rng.random() < 0.2))

    other, kind = int(rng.integers(len(scans))), rng.random()
    if kind < 0.2:
        return [turn((index, other), QUESTIONS_ON_TWO)]
    if kind < 0.3:
        return [turn((index,), QUESTIONS), turn((other,), QUESTIONS_ON_ANOTHER)]
    return [turn((index,), QUESTIONS)]


def picture_of(pixels_HW: np.ndarray, side: int = 32) -> Image.Image:
    """Enlarge an 8 x 8 scan to a grey picture of `side` pixels, bright ink on black."""
    return Image.fromarray(pixels_HW).resize((side, side), Image.Resampling.BILINEAR)


def draw_picture(pixels_HW: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Draw a scan with a little noise of place, size, tilt and contrast.

    Most pictures have 32 pixels a side, one in eight fewer; ink is bright on black, as in scans.
    """
    side = int(rng.integers(16, 32)) if rng.random() < 0.125 else 32
    scan = Image.fromarray(pixels_HW)
    if rng.random() < 0.25:
        scan = scan.resize((side, side), _FILTERS[rng.integers(len(_FILTERS))])
    else:
        scan = _move(scan, side, rng)
    dark, bright = rng.uniform(0, 20), rng.uniform(200, 255)
    ink_HW = np.asarray(scan, np.float32) / 255
    return Image.fromarray(np.round(dark + (bright - dark) * ink_HW).astype(np.uint8))


def _move(scan: Image.Image, side: int, rng: np.random.Generator) -> Image.Image:
    """Enlarge a scan with a random small shift, zoom and turn about its centre."""
    width, height = scan.size
    zoom, angle = rng.uniform(0.9, 1.15), rng.uniform(-0.1, 0.1)
    shift_x, shift_y = rng.uniform(-0.05, 0.05, 2) * side
    cos, sin = np.cos(angle) / zoom * width / side, np.sin(angle) / zoom * width / side
    x, y = side / 2 + shift_x, side / 2 + shift_y
    # Pillow asks for the map from new pixels to old ones.
    back = (cos, sin, width / 2 - cos * x - sin * y, -sin, cos, height / 2 + sin * x - cos * y)
    return scan.transform((side, side), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)


def save_digit(pixels_HW: np.ndarray, path: pathlib.Path, side: int = 32) -> None:
    """Write an 8 x 8 scan as a greyscale PNG of `side` pixels, one tile of the nano model."""
    picture_of(pixels_HW, side).save(path, format="PNG", optimize=True)
