"""Build the streams of batches that training and evaluation read.

A stream is a grain dataset: iterate it for dicts of numpy arrays (`packing.Batch`). The same
arguments give the same batches; an iterator's `get_state` is a small JSON-able dict, and a new
iterator after `set_state` goes on with exactly the batches that would have followed.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np

from llama4_jax.config import ModelConfig
from llama4_jax.config.runs import RunConfig
from llama4_jax.data import dialogs, sources
from llama4_jax.data.mixture import Part, mix
from llama4_jax.data.packing import Batch, BatchShape, Example, Packer
from llama4_jax.text.tokenizer import Tokenizer

# A batch has room for this many times the expected tiles, so that few rows wait for a tile.
TILE_ROOM = 1.3
# Characters of a piece of code for each slot of a row; a token of code has about three.
CHARACTERS_PER_SLOT = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """What a source needs to make examples.

    Attributes:
        tokenizer: of the model.
        model: the model that will read the examples.
        row_length: slots of a row, the usual length of a piece of code.
        split: "train" examples are shuffled and varied; "held_out" ones are in order and plain.
        seed: decides the shuffling and the variation.
        code_root: folder of the code; None is Python's standard library.
    """

    tokenizer: Tokenizer
    model: ModelConfig
    row_length: int
    split: sources.Split
    seed: int = 0
    code_root: pathlib.Path | None = None


# ------------------------------------------------------------------------------------- sources


def code_examples(reader: Reader) -> grain.MapDataset[Example]:
    """Return pieces of source files, each begun by the begin-of-text token, all tokens counting.

    The last piece of a file ends with the end-of-text token.
    """
    documents = sources.read_code(reader.split, reader.code_root)
    most = CHARACTERS_PER_SLOT * reader.row_length
    pieces = [
        (piece, is_last)
        for document in documents
        for cut in [cut_text(document.text, most)]
        for piece, is_last in zip(cut, [False] * (len(cut) - 1) + [True], strict=True)
    ]
    end_of_text = reader.tokenizer.special_id("<|end_of_text|>")

    def encode(piece: tuple[str, bool]) -> Example:
        text, is_last = piece
        tokens = reader.tokenizer.encode(text, bos=True)
        tokens_T = np.array(tokens + [end_of_text] * is_last, np.int32)
        return Example(tokens_T, np.ones(len(tokens_T), np.float32))

    return _in_order(reader, pieces).map(encode)


def digit_examples(reader: Reader) -> grain.MapDataset[Example]:
    """Return dialogs on handwritten digits; only the answers count.

    A drawn dialog that is too long for a row is replaced by the plain one on its scan.

    Raises:
        ValueError: the model has no vision encoder.
    """
    is_train = reader.split == "train"
    scans = sources.read_digits(reader.split)
    encoder = digit_encoder(
        reader.tokenizer, reader.model, answer_weight=dialogs.ANSWER_WEIGHT if is_train else 1.0
    )

    def plain(place: int) -> Example:
        return encoder.encode([dialogs.plain_turn(scans, place)])

    def drawn(place: int, rng: np.random.Generator) -> Example:
        example = encoder.encode(dialogs.draw_turns(scans, place, rng))
        return example if example.num_slots <= reader.row_length else plain(place)

    places = _in_order(reader, range(len(scans)))
    return places.random_map(drawn) if is_train else places.map(plain)


def _in_order(reader: Reader, items: Any) -> grain.MapDataset:
    """Return the items, reshuffled in every epoch when they are for training."""
    dataset = grain.MapDataset.source(items).seed(reader.seed)
    return dataset.shuffle() if reader.split == "train" else dataset


SOURCES: Mapping[str, Callable[[Reader], grain.MapDataset[Example]]] = {
    "code": code_examples,
    "digits": digit_examples,
}
"""Every source that a recipe's mixture may name."""


def cut_text(text: str, most: int) -> list[str]:
    """Cut code into pieces of at most `most` characters whose concatenation is the text.

    A piece ends, if it can, before a line without indentation that follows an empty line, else
    before any line, and reaches at least half of `most` unless the text ends.
    """
    pieces, start = [], 0
    while len(text) - start > most:
        window = text[start : start + most]
        half = most // 2
        best = max(
            (place for place in _statement_starts(window) if place >= half),
            default=window.rfind("\n", half) + 1,
        )
        stop = start + (best or most)
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def _statement_starts(window: str) -> list[int]:
    """Return the places after an empty line where a line begins without indentation."""
    places, place = [], window.find("\n\n")
    while place >= 0:
        after = place + 2
        if after < len(window) and not window[after].isspace():
            places.append(after)
        place = window.find("\n\n", place + 1)
    return places


# ------------------------------------------------------------------------------------- streams


def train_batches(
    run: RunConfig, tokenizer: Tokenizer, code_root: pathlib.Path | None = None
) -> grain.IterDataset[Batch]:
    """Return the endless stream of training batches of a run.

    Args:
        run: its mixture (shares are of tokens), batch_size, row_length, seed and model.
        tokenizer: of the model.
        code_root: folder of the code; None is Python's standard library.

    Raises:
        ValueError: the mixture names an unknown source, or one that the model cannot read.
    """
    reader = Reader(
        tokenizer=tokenizer,
        model=run.model,
        row_length=run.row_length,
        split="train",
        seed=run.seed,
        code_root=code_root,
    )
    mixture = mix(
        [
            Part(name=name, examples=_source(name)(reader), share=share)
            for name, share in run.mixture
        ]
    )
    expected = TILE_ROOM * mixture.tiles_per_slot * run.batch_size * run.row_length
    least = dialogs.MOST_PICTURES * (run.model.max_tiles + 1) if expected else 0
    tiles_per_row = math.ceil(max(expected, least) / run.batch_size)
    shape = _batch_shape(run, num_tiles=tiles_per_row * run.batch_size)
    return PackedBatches(_to_stream(mixture.examples), shape)


def held_out_batches(
    run: RunConfig, tokenizer: Tokenizer, code_root: pathlib.Path | None = None
) -> dict[str, grain.IterDataset[Batch]]:
    """Return one pass over the held-out part of every source of a run, by the source's name.

    The digits are as scanned, one to a dialog. The last batch of each is padded.
    """
    streams: dict[str, grain.IterDataset[Batch]] = {}
    for name, _ in run.mixture:
        reader = Reader(
            tokenizer=tokenizer,
            model=run.model,
            row_length=run.row_length,
            split="held_out",
            code_root=code_root,
        )
        examples = _source(name)(reader)
        tiles_per_slot = mix([Part(name=name, examples=examples, share=1.0)]).tiles_per_slot
        # Examples of equal tiles fill a row at best to the last slot, so this is always enough.
        tiles = math.ceil(tiles_per_slot * run.row_length) * run.batch_size
        streams[name] = PackedBatches(_to_stream(examples), _batch_shape(run, num_tiles=tiles))
    return streams


def _source(name: str) -> Callable[[Reader], grain.MapDataset[Example]]:
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r} in the mixture; choose of {sorted(SOURCES)}")
    return SOURCES[name]


def _batch_shape(run: RunConfig, num_tiles: int) -> BatchShape:
    vision = run.model.vision
    return BatchShape(
        batch_size=run.batch_size,
        row_length=run.row_length,
        pad_id=run.model.pad_id,
        num_tiles=num_tiles,
        tile_size=vision.image_size if vision else 1,
    )


def _to_stream(examples: grain.MapDataset[Example]) -> grain.IterDataset[Example]:
    return examples.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=64))


class PackedBatches(grain.IterDataset[Batch]):
    """A stream of examples, packed into batches."""

    def __init__(self, parent: grain.IterDataset[Example], shape: BatchShape) -> None:
        super().__init__(parent)
        self.shape = shape

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        return _PackedBatchesIterator(iter(self._parent), self.shape)


class _PackedBatchesIterator(grain.DatasetIterator[Batch]):
    """Packs on the fly. An example is drawn again from the parent's state before it was drawn."""

    def __init__(self, parent: grain.DatasetIterator[Example], shape: BatchShape) -> None:
        super().__init__(parent)
        self._packer = Packer(shape, self._draw)

    def _draw(self) -> tuple[Example, dict[str, Any]] | None:
        ticket = self._parent.get_state()
        example = next(self._parent, None)
        return None if example is None else (example, ticket)

    def _redraw(self, ticket: dict[str, Any]) -> Example:
        self._parent.set_state(ticket)
        return next(self._parent)

    def __next__(self) -> Batch:
        batch = self._packer.next_batch()
        if batch is None:
            raise StopIteration
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._parent.get_state(), "waiting": self._packer.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._packer.set_state(state["waiting"], self._redraw)
        self._parent.set_state(state["parent"])


# ----------------------------------------------------------------------------------- questions


def digit_encoder(
    tokenizer: Tokenizer, model: ModelConfig, answer_weight: float = 1.0
) -> dialogs.DialogEncoder:
    """Return the encoder of dialogs on pictures for a model.

    Raises:
        ValueError: the model has no vision encoder.
    """
    if model.vision is None:
        raise ValueError(f"{model.name} has no vision encoder; leave 'digits' out of the mixture")
    return dialogs.DialogEncoder(
        tokenizer=tokenizer,
        vision_config=model.vision,
        max_tiles=model.max_tiles,
        answer_weight=answer_weight,
    )


def digit_questions(tokenizer: Tokenizer, model: ModelConfig) -> list[dialogs.Question]:
    """Return one prompt for every held-out digit, to be answered by generation."""
    scans, encoder = sources.read_digits("held_out"), digit_encoder(tokenizer, model)
    return [encoder.ask([dialogs.plain_turn(scans, place)]) for place in range(len(scans))]
