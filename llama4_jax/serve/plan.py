"""What a step reads, and the rows that it reads it of: plain numbers, which may travel to hosts."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llama4_jax.serve.pages import PageNames


def bucket(size: int, *, floor: int = 1) -> int:
    """Return the smallest power of two that is at least `size` and at least `floor`."""
    return max(floor, 1 << max(0, size - 1).bit_length())


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """How many pages there are, and what a row needs of them.

    Attributes:
      page_size: tokens of a page.
      chunk_size: tokens of a chunk; None if no layer has chunks.
      whole_pages: for layers that see everything; None if there is no such layer.
      chunk_pages: for chunk layers.
      keep_prefixes: whether pages that nobody holds stay until their place is needed.
    """

    page_size: int
    chunk_size: int | None
    whole_pages: int | None
    chunk_pages: int
    keep_prefixes: bool = True

    def whole_of(self, end: int) -> int:
        """Count the pages of the first `end` tokens in layers that see everything."""
        return 0 if self.whole_pages is None else -(-end // self.page_size)

    def chunk_of(self, start: int, end: int) -> int:
        """Count the pages of chunk layers while tokens from `start` to `end` are read."""
        return 0 if self.chunk_size is None else -(-(end - self.base(start)) // self.page_size)

    def base(self, position: int) -> int:
        """Return the first position of the chunk of a position."""
        return 0 if self.chunk_size is None else position // self.chunk_size * self.chunk_size

    def chunk_end(self, position: int) -> int:
        """Return the end of the chunk of a position."""
        return 2**62 if self.chunk_size is None else self.base(position) + self.chunk_size

    def fits(self, tokens: int) -> bool:
        """Can a row that is alone hold so many tokens?"""
        chunk = self.chunk_of(0, min(tokens, self.chunk_size or 0))
        return self.whole_of(tokens) <= (self.whole_pages or 0) and chunk <= self.chunk_pages


class Numbers:
    """A growing array of int32: what was taken from it stays as it is."""

    def __init__(self, values: Sequence[int] | np.ndarray = ()):
        self._values = np.array(values, np.int32)
        self._count = len(self._values)

    def __len__(self) -> int:
        return self._count

    @property
    def array(self) -> np.ndarray:
        """All numbers; not to be written to."""
        return self._values[: self._count]

    def extend(self, values: Sequence[int]) -> None:
        """Append numbers."""
        end = self._count + len(values)
        if end > len(self._values):
            grown = np.empty(max(16, 2 * end), np.int32)
            grown[: self._count] = self.array
            self._values = grown
        self._values[self._count : end] = values
        self._count = end


class Piece(NamedTuple):
    """What a step reads of one row.

    Attributes:
      number: of the choice.
      row: its place on the device.
      start: position of the first token.
      tokens_T: int32; of a row that is answering, the last token and then drafts.
      is_drawn: whether the first token is the one drawn last, which only the device knows yet.
      draws: whether a token is drawn after the last of these (after each, if there are drafts).
      loops: how many tokens are drawn and read one after the other, the first of these included;
        1 where that is not the device's own affair.
      whole: pages of layers that see everything.
      chunk: pages of chunk layers, from the beginning of the chunk of `start`.
    """

    number: int
    row: int
    start: int
    tokens_T: np.ndarray
    is_drawn: bool
    draws: bool
    loops: int
    whole: np.ndarray
    chunk: np.ndarray

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + len(self.tokens_T) + self.loops - 1


class Plan(NamedTuple):
    """What one step reads: rows that are answering, and pieces of prompts."""

    decode: list[Piece]
    prefill: list[Piece]


class Hit(NamedTuple):
    """So many first tokens of a row whose keys and values are there, and in which pages."""

    length: int
    whole: list[int]
    chunk: list[int]


@dataclasses.dataclass(eq=False, kw_only=True)
class Choice:
    """One answer in the making, as the scheduler sees it.

    Attributes:
      number: names it.
      tokens: those known: the prompt, then what was drawn.
      prompt: tokens of the prompt.
      limit: most tokens, the prompt included.
      names: of its pages.
      order: the smaller, the sooner it is served.
      reuses: whether it may begin with pages that are there already.
      after: another choice with the same prompt, which is to read it first.
    """

    number: int
    tokens: Numbers
    prompt: int
    limit: int
    names: PageNames
    order: tuple[int, int] = (0, 0)
    reuses: bool = True
    after: "Choice | None" = None

    row: int | None = None
    computed: int = 0  # tokens whose keys and values are stored, or will be by what is planned
    pending: int = 0  # tokens drawn and not known yet
    is_read: bool = False  # its prompt is, or never will be
    whole: Numbers = dataclasses.field(default_factory=Numbers)
    chunk: Numbers = dataclasses.field(default_factory=Numbers)
    base: int = 0  # position of the first token in `chunk`
    named: int = 0  # pages that have their names

    @property
    def total(self) -> int:
        """Tokens, those not known yet included."""
        return len(self.tokens) + self.pending

    @property
    def is_answering(self) -> bool:
        """Is only its last token left to read?"""
        return self.computed == self.total - 1

    @property
    def is_drawn_out(self) -> bool:
        """Is there nothing more to plan for it? The last token of all is never read."""
        return self.total >= self.limit and self.computed >= self.limit - 1

    @property
    def to_read(self) -> int:
        """Tokens that are known and will be read."""
        return min(len(self.tokens), self.limit - 1)
