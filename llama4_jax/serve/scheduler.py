"""Which tokens every step reads, and in which pages: a pure function of what the host knows.

Rows that are answering come first, one token each and what is drafted for them; the rest of a
step's tokens goes to prompts, in pieces, the oldest first. Of prompts longer than a step one is
read at a time, and shorter ones pass it. Pages of both kinds are reserved together or not at all.
When there are none the youngest row is preempted: it waits again, and its tokens, those it has
answered included, are read once more.

Nothing here touches a device, and a plan is a small structure of plain numbers, so that it can be
tested without a model and sent to other hosts.
"""

import bisect
import heapq
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from llama4_jax.serve.pages import PagePool
from llama4_jax.serve.plan import CacheLayout, Choice, Hit, Numbers, Piece, Plan

MAX_DRAFTS = 7  # with the token before them they are the most that decode attention takes


Draft = Callable[[Choice, int], Sequence[int]]
"""Guesses the next tokens of a choice, at most so many."""


def no_drafts(choice: Choice, most: int) -> Sequence[int]:
    """Guess nothing."""
    return ()


class Scheduler:
    """Plan steps over rows that come and go.

    Args:
      layout: of the cache.
      max_rows: most rows at a time.
      step_tokens: most tokens of a step; at least `max_rows`.
    """

    def __init__(self, layout: CacheLayout, *, max_rows: int, step_tokens: int):
        self.layout = layout
        self.whole = PagePool(layout.whole_pages or 0, keep=layout.keep_prefixes)
        self.chunk = PagePool(layout.chunk_pages, keep=layout.keep_prefixes)
        self.running: list[Choice] = []  # in order
        self.waiting: list[Choice] = []
        self.preemptions = 0
        self.looked_up = 0  # tokens of prompts that were sought, and those found
        self.found = 0
        self._step_tokens = step_tokens
        self._rows = list(range(max_rows))
        self._planned: set[int] = set()

    def add(self, choice: Choice) -> None:
        """Let a choice wait for its turn.

        Raises:
          ValueError: it could never be finished, even alone.
        """
        if not self.layout.fits(choice.limit - 1):
            raise ValueError(
                f"{choice.limit} tokens do not fit the cache; shorten the prompt, ask for fewer "
                "new tokens, or give the cache more bytes."
            )
        bisect.insort(self.waiting, choice, key=lambda c: c.order)

    def drop(self, choice: Choice) -> None:
        """Forget a choice: it is finished, or nobody wants it any more."""
        choice.is_read = True
        if choice.row is None:
            if choice in self.waiting:
                self.waiting.remove(choice)
            return
        self._release(choice)
        self.running.remove(choice)

    def commit(self, choice: Choice, tokens: Sequence[int], *, loops: int = 1) -> None:
        """Learn what a piece drew: a token for each loop, or with drafts those accepted and one."""
        choice.pending -= loops
        choice.tokens.extend(tokens)
        if choice.row is not None:
            choice.computed = min(choice.computed, choice.total - 1)

    def plan(self, draft: Draft = no_drafts, *, loops: int = 1) -> Plan:
        """Decide what the next step reads.

        Args:
          draft: guesses tokens.
          loops: most tokens that the device may draw of a row by itself while nobody waits.
        """
        if self.waiting or any(not c.is_answering and not c.is_drawn_out for c in self.running):
            loops = 1
        self._planned = set()
        preempted = self.preemptions
        budget = self._step_tokens
        decode, prefill = [], []
        for choice in [c for c in self.running if c.is_answering and not c.is_drawn_out]:
            if choice.row is not None and budget:  # or an earlier one of these took its pages
                piece = self._answer(choice, draft, budget, loops)
                if piece is not None:
                    decode.append(piece)
                    budget -= len(piece.tokens_T)
        is_full = self._read_prompts(prefill, budget)
        if not is_full and self.preemptions == preempted:
            self._admit(prefill, budget - sum(len(piece.tokens_T) for piece in prefill))
        for choice in self.running:
            if choice.number in self._planned:
                self._leave(choice, self.layout.base(choice.computed - 1))
        return Plan(decode, prefill)

    def find_prefix(self, choice: Choice) -> Hit:
        """Find how much of a choice's tokens is there already, in whole pages.

        All pages of layers that see everything, and of chunk layers those from the beginning of
        the chunk in which the hit ends: none, if it ends with a chunk. One token is left to read.
        """
        layout, size = self.layout, self.layout.page_size
        names = choice.names.up_to(choice.tokens.array)[: (choice.to_read - 1) // size]
        if not choice.reuses:
            names = []
        whole = self.whole.find(names) if layout.whole_pages is not None else []
        count = len(names) if layout.whole_pages is None else len(whole)
        first = layout.base(count * size) // size
        chunk = []
        if layout.chunk_size is not None:
            chunk = self.chunk.find(names[first:count])
            count = first + len(chunk)
        return Hit(count * size, whole[:count], chunk)

    # ------------------------------------------------------------------------- parts of a plan

    def _answer(self, choice: Choice, draft: Draft, budget: int, loops: int) -> Piece | None:
        """Plan the next token of a row, with drafts or further ones if there is room."""
        start = choice.computed
        drafts: Sequence[int] = ()
        # Neither may leave the chunk: a rejection could not return, and a loop has one table.
        room = min(choice.limit - choice.total, self.layout.chunk_end(start) - start)
        loops, most = min(loops, room), min(MAX_DRAFTS, budget - 1, room - 1)
        if most > 0 and not choice.pending:
            drafts = draft(choice, most)[:most]
        if not self._reserve(choice, start + loops + len(drafts)):
            drafts, loops = (), 1
            while not self._reserve(choice, start + 1):
                victim = next(c for c in reversed(self.running) if c.number not in self._planned)
                self._preempt(victim)
                if victim is choice:
                    return None
        last = [0] if choice.pending else choice.tokens.array[-1:]
        return self._piece(choice, np.asarray([*last, *drafts], np.int32), loops)

    def _read_prompts(self, pieces: list[Piece], budget: int) -> bool:
        """Plan pieces of prompts that are being read; return whether one found no room."""
        is_long_read = False
        reading = [c for c in self.running if not c.is_answering and not c.is_drawn_out]
        for choice in reading:
            is_long = self._is_long(choice)
            if choice.row is None or choice.pending or not budget or (is_long and is_long_read):
                continue
            others = len(reading) > 1 or bool(self.waiting)
            most = self._most(budget, is_long and others)
            piece = self._read(choice, most)
            while piece is None:  # the youngest gives way, unless that is this one
                victim = next(c for c in reversed(self.running) if c.number not in self._planned)
                if victim is choice:
                    return True
                self._preempt(victim)
                piece = self._read(choice, most)
            is_long_read |= is_long
            pieces.append(piece)
            budget -= len(piece.tokens_T)
        return False

    def _admit(self, pieces: list[Piece], budget: int) -> None:
        """Let waiting choices in, in their order, while there are rows, tokens and pages."""
        is_long_read = any(self._is_long(choice) for choice in self.running)
        for choice in list(self._ready()):
            if not self._rows or not budget:
                return
            hit = self.find_prefix(choice)
            is_long = choice.to_read - hit.length > self._step_tokens
            if is_long and is_long_read:
                continue
            piece = self._enter(choice, hit, self._most(budget, is_long))
            if piece is None:
                return
            self.looked_up += len(choice.tokens)
            self.found += hit.length
            self.waiting.remove(choice)
            bisect.insort(self.running, choice, key=lambda c: c.order)
            is_long_read |= is_long
            pieces.append(piece)
            budget -= len(piece.tokens_T)

    def _enter(self, choice: Choice, hit: Hit, most: int) -> Piece | None:
        """Give a choice a place, the pages of a hit and its first piece; or nothing at all."""
        for pool, pages in ((self.whole, hit.whole), (self.chunk, hit.chunk)):
            for page in pages:
                pool.hold(page)
        choice.row = heapq.heappop(self._rows)
        choice.whole, choice.chunk = Numbers(hit.whole), Numbers(hit.chunk)
        choice.base, choice.computed = self.layout.base(hit.length), hit.length
        choice.named = hit.length // self.layout.page_size
        spare = len(self.running)  # each of them may need another page soon
        needed = self.layout.whole_of(choice.to_read) - len(choice.whole)
        if needed <= 0 or needed + spare <= self.whole.available:
            piece = self._read(choice, most, spare)
            if piece is not None:
                return piece
        self._release(choice)
        return None

    def _most(self, budget: int, is_long: bool) -> int:
        """Leave half a step to others beside a long prompt."""
        return min(budget, max(1, self._step_tokens // 2)) if is_long else budget

    def _is_long(self, choice: Choice) -> bool:
        return choice.to_read - choice.computed > self._step_tokens

    def _ready(self) -> Iterator[Choice]:
        """Yield what may be admitted: whose tokens are known, and whose elder has read them."""
        for choice in self.waiting:
            if not choice.pending and (choice.after is None or choice.after.is_read):
                yield choice

    def _read(self, choice: Choice, most: int, spare: int = 0) -> Piece | None:
        """Plan the next piece of a prompt: as much as there are pages for, or none."""
        start = choice.computed
        end = min(start + most, choice.to_read)
        for stop in (end, min(end, self.layout.chunk_end(start))):
            if self._reserve(choice, stop, spare):
                return self._piece(choice, choice.tokens.array[start:stop])
        return None

    def _piece(self, choice: Choice, tokens_T: np.ndarray, loops: int = 1) -> Piece:
        """Take note that these tokens are read, and whether one is drawn after them."""
        start, row, is_drawn = choice.computed, choice.row, choice.pending > 0
        assert row is not None
        choice.computed += len(tokens_T) + loops - 1
        draws = choice.computed >= choice.total and choice.total < choice.limit
        choice.is_read |= draws
        choice.pending += loops * draws
        self._planned.add(choice.number)
        pages = choice.whole.array, choice.chunk.array
        return Piece(choice.number, row, start, tokens_T, is_drawn, draws, loops, *pages)

    # --------------------------------------------------------------------------------- pages

    def _reserve(self, choice: Choice, end: int, spare: int = 0) -> bool:
        """Take all pages of both kinds for tokens up to `end`, or none."""
        start = choice.computed
        self._leave(choice, self.layout.base(start))
        whole = self.layout.whole_of(end) - len(choice.whole)
        chunk = self.layout.chunk_of(start, end) - len(choice.chunk)
        for pool, needed in ((self.whole, whole), (self.chunk, chunk)):
            if needed > 0 and needed + spare > pool.available:
                return False
        choice.whole.extend([self.whole.take() for _ in range(whole)])
        choice.chunk.extend([self.chunk.take() for _ in range(chunk)])
        return True

    def _leave(self, choice: Choice, base: int) -> None:
        """Name the full pages of a row, and give back those of chunks before `base`."""
        size = self.layout.page_size
        full = min(choice.computed, len(choice.tokens)) // size
        if full == choice.named and base <= choice.base:
            return
        names = choice.names.up_to(choice.tokens.array[: full * size])
        first = choice.base // size
        for page in range(choice.named, full):
            if page < len(choice.whole):
                self.whole.name(int(choice.whole.array[page]), names[page])
            if 0 <= page - first < len(choice.chunk):
                self.chunk.name(int(choice.chunk.array[page - first]), names[page])
        choice.named = full
        if self.layout.chunk_size is not None and base > choice.base:
            left = (base - choice.base) // size
            # Only who begins alike and then differs within this chunk could use them.
            self.chunk.release(choice.chunk.array[:left].tolist(), first_to_go=True)
            choice.chunk, choice.base = Numbers(choice.chunk.array[left:]), base

    def _release(self, choice: Choice) -> None:
        """Take a row's place and its pages, which keep their names."""
        assert choice.row is not None
        self._leave(choice, choice.base)
        self.whole.release(choice.whole.array.tolist())
        self.chunk.release(choice.chunk.array.tolist())
        heapq.heappush(self._rows, choice.row)
        choice.row, choice.computed, choice.named, choice.base = None, 0, 0, 0
        choice.whole, choice.chunk = Numbers(), Numbers()

    def _preempt(self, choice: Choice) -> None:
        self.preemptions += 1
        self._release(choice)
        self.running.remove(choice)
        self.add(choice)
