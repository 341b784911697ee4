"""Random arrivals, aborts and preemptions on a played device: every slot read holds what it should.

A slot of the device holds a hash of all tokens up to its own, and a draw is a function of that
hash, so every answer is known in advance, whatever the plans are.
"""

import collections
import functools

import numpy as np
import pytest

from llama4_jax.serve.pages import PageNames
from llama4_jax.serve.plan import CacheLayout, Choice, Numbers
from llama4_jax.serve.scheduler import Scheduler

CHUNK, PAGE, WORDS, STOP = 8, 4, 5, 4
DEAD = None


class Truth:
    """A choice as it goes when it is alone: tokens up to its limit, hashes, and where it ends."""

    def __init__(self, choice, salt, stops):
        self.choice, self.prompt = choice, choice.prompt
        self.tokens, self.chains = choice.tokens.array.tolist(), []
        chain, self.end = hash(salt), choice.limit
        for position in range(choice.limit - 1):
            chain = hash((chain, self.tokens[position]))
            self.chains.append(chain)
            if position + 1 == len(self.tokens):
                self.tokens.append(chain % WORDS)
                if stops and self.tokens[-1] == STOP:
                    self.end = min(self.end, len(self.tokens))


class PlayedDevice:
    """Pages of hashes, and the token drawn last in every row."""

    def __init__(self, layout, rows):
        self.layout, self.last = layout, [DEAD] * rows
        self.whole = [[DEAD] * PAGE for _ in range(layout.whole_pages or 0)]
        self.chunk = [[DEAD] * PAGE for _ in range(layout.chunk_pages)]

    def bury(self, scheduler):
        """Mark every page that is neither held nor cached, so that reading it shows."""
        for pool, pages in ((scheduler.whole, self.whole), (scheduler.chunk, self.chunk)):
            for page in pool._free:
                pages[page] = [DEAD] * PAGE

    def read(self, piece, truth, salt, *, verifies):
        """Play a piece and return what is drawn."""
        start, tokens = piece.start, piece.tokens_T.tolist()
        if piece.is_drawn:
            tokens[0] = self.last[piece.row]
        assert tokens[0] == truth.tokens[start]
        tables = []
        if self.layout.whole_pages is not None:
            tables.append((self.whole, piece.whole, 0))
        if self.layout.chunk_size is not None:
            tables.append((self.chunk, piece.chunk, self.layout.base(start)))
        for pages, table, first in tables:
            for position in range(first, start):
                page, slot = divmod(position - first, PAGE)
                assert pages[table[page]][slot] == truth.chains[position]
        chain, drawn = (truth.chains[start - 1] if start else hash(salt)), []
        for _ in range(piece.loops - 1):  # the device goes on by itself
            tokens.append(functools.reduce(lambda c, t: hash((c, t)), tokens, chain) % WORDS)
        for position, token in enumerate(tokens, start):
            chain = hash((chain, token))
            drawn.append(chain % WORDS)
            for pages, table, first in tables:
                page, slot = divmod(position - first, PAGE)
                pages[table[page]][slot] = chain
        if not piece.draws:
            return []
        drawn = drawn if verifies else drawn[-1:]
        accepted = piece.loops - 1
        while accepted < len(drawn) - 1 and tokens[accepted + 1] == drawn[accepted]:
            accepted += 1
        self.last[piece.row] = drawn[accepted]
        return drawn[: accepted + 1]


class Game:
    """An engine without a model: it submits, plays plans with a lag, aborts and stops."""

    def __init__(self, seed, *, lag, drafts, chunk=CHUNK, whole=True, loops=1):
        self.rng = rng = np.random.default_rng(seed)
        self.layout = CacheLayout(
            page_size=PAGE,
            chunk_size=chunk,
            whole_pages=int(rng.integers(11, 20)) if whole else None,
            chunk_pages=int(rng.integers(2, 16)) if chunk else 0,
            keep_prefixes=bool(rng.random() < 0.8),
        )
        self.rows, self.step_tokens = int(rng.integers(1, 12)), int(rng.integers(11, 40))
        self.scheduler = Scheduler(self.layout, max_rows=self.rows, step_tokens=self.step_tokens)
        self.device = PlayedDevice(self.layout, self.rows)
        self.lag, self.drafts, self.loops = lag, drafts, loops
        self.live, self.salts = {}, {}
        self.in_flight = collections.deque()
        self.documents = [rng.integers(0, WORDS, 5 * CHUNK) for _ in range(3)]
        self.count = self.ended = 0

    def submit(self):
        rng = self.rng
        length = int(rng.integers(1, 5 * CHUNK))
        document = self.documents[rng.integers(3)].copy()
        document[int(rng.integers(0, 5 * CHUNK)) :] = rng.integers(0, WORDS)
        limit = min(length + int(rng.integers(0, 16)), 5 * CHUNK + 3)
        salt, stops, elder = str(rng.integers(2)), rng.random() < 0.5, None
        for _ in range(rng.integers(1, 4)):
            choice = Choice(
                number=self.count,
                tokens=Numbers(document[:length]),
                prompt=length,
                limit=max(limit, length),
                names=PageNames(PAGE, salt=salt),
                order=(int(rng.integers(2)), self.count),
                reuses=bool(rng.random() < 0.9),
                after=elder,
            )
            self.count += 1
            truth = Truth(choice, salt, stops)
            if choice.limit > 1:
                self.scheduler.add(choice)
                self.live[choice.number] = truth
                self.salts[choice.number] = salt
                elder = elder or choice

    def guess(self, choice, most):
        """Draft rightly, wrongly, or rightly up to some token."""
        known, truth = len(choice.tokens), self.live[choice.number].tokens
        right = truth[known : known + most]
        if self.rng.random() < 0.3:
            return right
        return [*right[: self.rng.integers(0, most + 1)], *self.rng.integers(0, WORDS, most)][:most]

    def step(self):
        scheduler, rng = self.scheduler, self.rng
        if rng.random() < 0.1 and self.live:
            self.end(int(rng.choice(list(self.live))))
        self.device.bury(scheduler)
        draft = self.guess if self.drafts else lambda *_: ()
        plan = scheduler.plan(draft, loops=self.loops)
        self.check(plan)
        results = []
        for pieces, verifies in ((plan.decode, True), (plan.prefill, False)):
            for piece in pieces:
                truth, salt = self.live[piece.number], self.salts[piece.number]
                drawn = self.device.read(piece, truth, salt, verifies=verifies)
                results.append((piece, drawn))
        self.in_flight.append(results)
        while len(self.in_flight) > self.lag:
            self.settle()

    def settle(self):
        for piece, drawn in self.in_flight.popleft():
            number = piece.number
            truth = self.live.get(number)
            if truth is None:  # it has ended, and this was drawn for nothing
                continue
            choice = truth.choice
            if drawn:
                start = len(choice.tokens)
                room = truth.end - start
                assert drawn == truth.tokens[start : start + len(drawn)]
                self.scheduler.commit(choice, drawn[:room], loops=piece.loops)
            if len(choice.tokens) == truth.end and (
                len(choice.tokens) > choice.prompt or choice.computed >= choice.limit - 1
            ):
                self.end(number)

    def end(self, number):
        self.scheduler.drop(self.live.pop(number).choice)
        self.ended += 1

    def check(self, plan):
        pieces, scheduler = (*plan.decode, *plan.prefill), self.scheduler
        assert sum(len(piece.tokens_T) for piece in pieces) <= self.step_tokens
        assert len({piece.row for piece in pieces}) == len(pieces)
        written = [set(), set()]
        for piece in pieces:
            assert piece.end <= self.live[piece.number].choice.limit - 1
            assert len(piece.tokens_T) > 0
            base = self.layout.base(piece.start)
            for kind, (table, first) in enumerate(((piece.whole, 0), (piece.chunk, base))):
                pages = {
                    int(table[(position - first) // PAGE])
                    for position in range(piece.start, piece.end)
                    if len(table)
                }
                assert not pages & written[kind], "a page has two writers"
                written[kind] |= pages
        for piece in plan.decode:
            if piece.end > piece.start + 1 and self.layout.chunk_size:
                assert piece.start // CHUNK == (piece.end - 1) // CHUNK
        for pool in (scheduler.whole, scheduler.chunk):
            assert pool.held + pool.available == pool.count
        for choice in scheduler.running:  # of chunk layers a row holds its current chunk alone
            assert self.layout.base(max(choice.computed - 1, 0)) <= choice.base + CHUNK
            assert len(choice.chunk) <= CHUNK // PAGE or not self.layout.chunk_size

    def play(self, steps):
        for _ in range(steps):
            while self.rng.random() < 0.3:
                self.submit()
            self.step()
        for _ in range(100 * (1 + len(self.live))):
            if not self.live:
                break
            self.step()
        assert not self.live, "a choice never ends"
        assert self.scheduler.whole.held == self.scheduler.chunk.held == 0
        assert not self.scheduler.running and not self.scheduler.waiting
        assert sorted(self.scheduler._rows) == list(range(self.rows))


WAYS = [
    {"lag": 1, "drafts": False},
    {"lag": 1, "drafts": False, "loops": 4},
    {"lag": 0, "drafts": True},
    {"lag": 1, "drafts": False, "chunk": None},
    {"lag": 0, "drafts": True, "whole": False},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_every_answer_is_that_of_a_choice_alone_and_nothing_is_left(way, seed):
    Game(seed, **way).play(150)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_hundred_thousand_steps_hold_the_invariants(way):
    for seed in range(100, 120):
        Game(seed, **way).play(1000)


@pytest.mark.parametrize("loops", [1, 4])
def test_a_row_holds_all_pages_of_some_layers_and_one_chunk_of_others(loops):
    """After n tokens: n tokens, and (n - 1) % CHUNK + 1 of the current chunk, to a page."""
    layout = CacheLayout(page_size=PAGE, chunk_size=CHUNK, whole_pages=20, chunk_pages=8)
    scheduler = Scheduler(layout, max_rows=1, step_tokens=16)
    tokens = Numbers(range(21))
    choice = Choice(number=0, tokens=tokens, prompt=21, limit=60, names=PageNames(PAGE))
    scheduler.add(choice)
    while not choice.is_drawn_out:
        (piece,) = [piece for pieces in scheduler.plan(loops=loops) for piece in pieces]
        stored = choice.computed
        assert scheduler.whole.held == -(-stored // PAGE)
        assert scheduler.chunk.held == -(-((stored - 1) % CHUNK + 1) // PAGE)
        if piece.draws:
            scheduler.commit(choice, [1] * piece.loops, loops=piece.loops)
    scheduler.drop(choice)
    assert scheduler.whole.held == scheduler.chunk.held == 0
