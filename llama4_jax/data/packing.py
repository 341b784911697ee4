"""Pack examples of any length into rows of one length, without losing or mixing anything.

An example of n tokens has n - 1 slots: slot t holds token t as input and token t + 1 as target. A
row takes slots of several examples one after another; each run of slots is a segment with its own
number (1, 2, ..) and positions from 0, so that it cannot see its neighbours. Text is cut where a
row ends and goes on in another row; an example with pictures stays whole. A batch also has a fixed
number of tiles, which hold its pictures in the order of their patch tokens, row by row.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

# Examples looked at to fill a row before it is padded.
LOOKAHEAD = 32
# A row's rest shorter than this is not worth the first part of a longer text.
SHORTEST_PART = 16

Batch = dict[str, np.ndarray]
"""tokens_BT, targets_BT, segments_BT (0 is padding), positions_BT (-1 is padding) int32;
loss_mask_BT float32 weights of the targets; tiles_NCHW float32 when the shape has tiles."""


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One training document.

    Attributes:
        tokens_T: int32 ids, at least two.
        weights_T: float32 weight of each token as a target; the first is never a target.
        tiles_NCHW: float32 tiles of its patch tokens, in order; None for text.
    """

    tokens_T: np.ndarray
    weights_T: np.ndarray
    tiles_NCHW: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.tokens_T) < 2 or len(self.tokens_T) != len(self.weights_T):
            raise ValueError(
                f"an example needs two or more tokens and one weight each, not "
                f"{len(self.tokens_T)} tokens and {len(self.weights_T)} weights"
            )

    @property
    def num_slots(self) -> int:
        """Inputs that have a target."""
        return len(self.tokens_T) - 1

    @property
    def num_tiles(self) -> int:
        """Tiles of its pictures."""
        return 0 if self.tiles_NCHW is None else len(self.tiles_NCHW)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Fixed sizes of a batch.

    Attributes:
        batch_size: rows.
        row_length: slots of a row.
        pad_id: token that fills unused slots.
        num_tiles: tiles of a batch; 0 leaves tiles_NCHW out.
        tile_size: side of a tile, pixels.
    """

    batch_size: int
    row_length: int
    pad_id: int
    num_tiles: int = 0
    tile_size: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "row_length", "tile_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")

    def check(self, example: Example) -> None:
        """Refuse an example that fits no batch of this shape.

        Raises:
            ValueError: its pictures need more tiles, or a whole row is too short for it.
        """
        if example.num_tiles > self.num_tiles:
            raise ValueError(
                f"an example has {example.num_tiles} tiles but a batch has only {self.num_tiles}; "
                f"raise num_tiles or make the pictures smaller"
            )
        if example.num_tiles and example.num_slots > self.row_length:
            raise ValueError(
                f"an example with pictures has {example.num_slots} slots and may not be cut, but "
                f"row_length is {self.row_length}; raise it or make the pictures smaller"
            )


class BatchBuilder:
    """A batch that is being filled, row by row from the left."""

    def __init__(self, shape: BatchShape) -> None:
        rows = (shape.batch_size, shape.row_length)
        self._shape = shape
        self._row = self._column = self._segment = self._tiles_used = 0
        self._arrays: Batch = {
            "tokens_BT": np.full(rows, shape.pad_id, np.int32),
            "targets_BT": np.full(rows, shape.pad_id, np.int32),
            "loss_mask_BT": np.zeros(rows, np.float32),
            "segments_BT": np.zeros(rows, np.int32),
            "positions_BT": np.full(rows, -1, np.int32),
        }
        if shape.num_tiles:
            side = shape.tile_size
            self._arrays["tiles_NCHW"] = np.zeros((shape.num_tiles, 3, side, side), np.float32)

    @property
    def is_full(self) -> bool:
        """Whether no row is left."""
        return self._row == self._shape.batch_size

    @property
    def is_empty(self) -> bool:
        """Whether nothing was placed yet."""
        return self._row == self._column == 0

    def fits(self, example: Example, start: int) -> bool:
        """Say whether slots of an example, from `start` on, may go to the current row now."""
        room = self._shape.row_length - self._column
        rest = example.num_slots - start
        if example.num_tiles:
            return rest <= room and self._tiles_used + example.num_tiles <= self._shape.num_tiles
        return room >= min(rest, SHORTEST_PART) or self._column == 0

    def place(self, example: Example, start: int) -> int:
        """Write slots of an example from `start` on; return how many found room."""
        count = min(example.num_slots - start, self._shape.row_length - self._column)
        here = (self._row, slice(self._column, self._column + count))
        inputs, targets = slice(start, start + count), slice(start + 1, start + 1 + count)
        self._segment += 1
        self._arrays["tokens_BT"][here] = example.tokens_T[inputs]
        self._arrays["targets_BT"][here] = example.tokens_T[targets]
        self._arrays["loss_mask_BT"][here] = example.weights_T[targets]
        self._arrays["segments_BT"][here] = self._segment
        self._arrays["positions_BT"][here] = np.arange(count)
        if example.num_tiles:
            stop = self._tiles_used + example.num_tiles
            self._arrays["tiles_NCHW"][self._tiles_used : stop] = example.tiles_NCHW
            self._tiles_used = stop
        self._column += count
        if self._column == self._shape.row_length:
            self.end_row()
        return count

    def end_row(self) -> None:
        """Leave the rest of the current row as padding."""
        self._row, self._column, self._segment = self._row + 1, 0, 0

    def finish(self) -> Batch:
        """Return the arrays; rows not reached are padding."""
        return self._arrays


@dataclasses.dataclass(frozen=True, eq=False)
class _Waiting:
    """A drawn example, the slots of it that are already placed, and where it was drawn."""

    example: Example
    start: int
    ticket: Any


class Packer:
    """Draw examples and make batches, remembering what did not fit.

    The oldest waiting example that fits goes first; a new one is drawn when none fits; a row is
    padded when LOOKAHEAD examples wait and none fits.

    Args:
        shape: of the batches.
        draw: returns the next example with a ticket from which it can be drawn again, or None at
            the end.
    """

    def __init__(self, shape: BatchShape, draw: Callable[[], tuple[Example, Any] | None]) -> None:
        self._shape = shape
        self._draw = draw
        self._waiting: list[_Waiting] = []

    def next_batch(self) -> Batch | None:
        """Return the next batch, the last one padded, or None when everything was packed."""
        builder = BatchBuilder(self._shape)
        while not builder.is_full:
            chosen = self._choose(builder)
            if chosen is None:
                if not self._waiting:
                    break
                builder.end_row()
                continue
            waiting = self._waiting.pop(chosen)
            start = waiting.start + builder.place(waiting.example, waiting.start)
            if start < waiting.example.num_slots:
                self._waiting.insert(0, dataclasses.replace(waiting, start=start))
        return None if builder.is_empty else builder.finish()

    def _choose(self, builder: BatchBuilder) -> int | None:
        """Return the place in the queue of the example to put next, drawing as needed."""
        for index, waiting in enumerate(self._waiting):
            if builder.fits(waiting.example, waiting.start):
                return index
        while len(self._waiting) < LOOKAHEAD and (drawn := self._draw()) is not None:
            example, ticket = drawn
            self._shape.check(example)
            self._waiting.append(_Waiting(example, 0, ticket))
            if builder.fits(example, 0):
                return len(self._waiting) - 1
        return None

    def get_state(self) -> list[list[Any]]:
        """Return [start, ticket] of every example that waits, oldest first."""
        return [[waiting.start, waiting.ticket] for waiting in self._waiting]

    def set_state(self, state: list[list[Any]], redraw: Callable[[Any], Example]) -> None:
        """Wait for the examples of a saved state again, drawn by their tickets."""
        self._waiting = [_Waiting(redraw(ticket), start, ticket) for start, ticket in state]


def pack(examples: Iterable[Example], shape: BatchShape) -> Iterator[Batch]:
    """Yield batches of all the examples; the last batch is padded.

    Raises:
        ValueError: an example with pictures fits no batch.
    """
    source = iter(examples)

    def draw() -> tuple[Example, None] | None:
        example = next(source, None)
        return None if example is None else (example, None)

    packer = Packer(shape, draw)
    while (batch := packer.next_batch()) is not None:
        yield batch
