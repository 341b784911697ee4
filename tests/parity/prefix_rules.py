"""How much of a trace is computed again by three rules of prefix caches: E7 of `make bench-serve`.

No model is run. Ours is the scheduler of the engine itself. The others are their rules on the pages
and bytes of ours: vLLM's one pool of 12-layer blocks, of which a page takes one for layers that see
everything and three for chunk layers, and SGLang's two pools, in which a hit needs a whole window
of C tokens in the chunk layers, or all from the beginning. All serve one request at a time and
forget what was used least recently.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from llama4_jax.cache.paged import page_bytes
from llama4_jax.config.families import scout
from llama4_jax.config.model import ModelConfig
from llama4_jax.serve.pages import Name, PageNames, PagePool
from llama4_jax.serve.plan import CacheLayout, Choice, Numbers
from llama4_jax.serve.scheduler import Scheduler
from llama4_jax.serve.sizes import EngineConfig

CHUNK, PAGE = 512, 16  # a sixteenth of Scout's chunk, and 32 pages of it
WINDOW_SHARE = 0.8  # SGLang's default: tokens of the chunk layers' pool for each of the other
LOCAL_BLOCKS = 3  # of 12 chunk layers each, for one of layers that see everything


class Visit(NamedTuple):
    """A request: its prompt, and the answer that it gets."""

    prompt_T: np.ndarray
    answer_T: np.ndarray


class Rule(Protocol):
    """A prefix cache."""

    def serve(self, visit: Visit) -> int:
        """Serve a request; return the tokens of its prompt that are computed."""
        ...


def small_scout() -> ModelConfig:
    """Return Scout with short chunks."""
    model = scout()
    return dataclasses.replace(model, text=dataclasses.replace(model.text, chunk_size=CHUNK))


def block_bytes() -> int:
    """Return the bytes of a page of 12 layers."""
    return page_bytes(small_scout().text, page_size=PAGE, dtype="bfloat16")[0]


class Ours:
    """The scheduler of the engine: what is found is its closed form, page by page."""

    def __init__(self, layout: CacheLayout):
        self.scheduler = Scheduler(layout, max_rows=1, step_tokens=CHUNK)

    @staticmethod
    def of_bytes(budget: int, *, rows: int) -> "Ours":
        """Divide a budget as an engine of so many rows does."""
        sizes = EngineConfig(max_rows=rows, step_tokens=CHUNK, page_size=PAGE, cache_bytes=budget)
        return Ours(sizes.layout(small_scout()))

    def serve(self, visit: Visit) -> int:
        scheduler, length, found = self.scheduler, len(visit.prompt_T), self.scheduler.found
        choice = Choice(
            number=0,
            tokens=Numbers(visit.prompt_T),
            prompt=length,
            limit=length + len(visit.answer_T),
            names=PageNames(PAGE),
        )
        scheduler.add(choice)
        for token in visit.answer_T.tolist():
            while not choice.pending:
                scheduler.plan()
            scheduler.commit(choice, [token])
        scheduler.drop(choice)
        return length - (scheduler.found - found)


class _Shelf:
    """Pages of one kind in a pool, each of so many blocks, and those that the row holds."""

    def __init__(self, pool: PagePool, kinds: Sequence[bytes]):
        self.pool, self.kinds = pool, kinds
        self.held: dict[int, list[int]] = {}

    def count(self, names: Sequence[Name]) -> int:
        """Count the first of these pages that are there, in all their blocks."""
        return min(len(self.pool.find([kind + name for name in names])) for kind in self.kinds)

    def hold(self, first: int, names: Sequence[Name]) -> None:
        """Hold pages that are there."""
        for page, name in enumerate(names, first):
            self.held[page] = self.pool.find([kind + name for kind in self.kinds])
            for block in self.held[page]:
                self.pool.hold(block)

    def make(self, page: int, name: Name | None) -> None:
        """Hold a new page; a full one has a name."""
        self.held[page] = [self.pool.take() for _ in self.kinds]
        for block, kind in zip(self.held[page], self.kinds, strict=True):
            if name is not None:
                self.pool.name(block, kind + name)

    def leave(self, before: int) -> None:
        """Give back the pages before this one, the last of them first."""
        for page in sorted((p for p in self.held if p < before), reverse=True):
            self.pool.release(self.held.pop(page))


class _Peer:
    """What the rules of others have in common: they differ in hits, and in what they leave."""

    def __init__(self, whole: PagePool, chunk: PagePool):
        self.whole = _Shelf(whole, [b"w"])
        self.chunk = _Shelf(chunk, [b"%d" % i for i in range(LOCAL_BLOCKS)])

    def hit(self, names: Sequence[Name]) -> int:
        """Return how many of these pages need not be computed."""
        raise NotImplementedError

    def oldest(self, page: int) -> int:
        """Return the first page that chunk layers need for a token in this one."""
        raise NotImplementedError

    def serve(self, visit: Visit) -> int:
        length = len(visit.prompt_T)
        read_T = np.concatenate([visit.prompt_T, visit.answer_T[:-1]])
        names = PageNames(PAGE).up_to(read_T)
        hit = self.hit(names[: (length - 1) // PAGE])
        first = self.oldest(hit)
        self.whole.hold(0, names[:hit])
        self.chunk.hold(first, names[first:hit])
        for page in range(hit, -(-len(read_T) // PAGE)):
            self.chunk.leave(self.oldest(page))
            for shelf in (self.whole, self.chunk):
                shelf.make(page, names[page] if page < len(names) else None)
        for shelf in (self.whole, self.chunk):
            shelf.leave(len(read_T))
        return length - hit * PAGE


class VLLM(_Peer):
    """Every group agrees: all pages, and in chunk layers those from the chunk's beginning."""

    def __init__(self, budget: int):
        pool = PagePool(budget // block_bytes())
        super().__init__(pool, pool)

    def oldest(self, page: int) -> int:
        return page - page % (CHUNK // PAGE)

    def hit(self, names: Sequence[Name]) -> int:
        whole = self.whole.count(names)
        first = self.oldest(whole)
        return first + self.chunk.count(names[first:whole])


class SGLang(_Peer):
    """Chunk layers are windows: a hit needs the last C tokens in them, or all there are."""

    def __init__(self, budget: int):
        pages = int(budget // block_bytes() / (1 + WINDOW_SHARE * LOCAL_BLOCKS))
        super().__init__(PagePool(pages), PagePool(int(WINDOW_SHARE * pages) * LOCAL_BLOCKS))

    def oldest(self, page: int) -> int:
        return max(0, page - CHUNK // PAGE)

    def hit(self, names: Sequence[Name]) -> int:
        found = streak = 0
        for page, name in enumerate(names[: self.whole.count(names)], start=1):
            streak = streak + 1 if self.chunk.count([name]) else 0
            if streak >= page - self.oldest(page):
                found = page
        return found


# ---------------------------------------------------------------------------------------- traces


def chats(seed: int, *, chats: int, turns: int) -> Iterator[Visit]:
    """Yield turns of chats that share a system prompt, each with all turns before it."""
    rng = np.random.default_rng(seed)
    system_T = rng.integers(0, 1 << 20, 150)
    histories = [system_T] * chats
    for _ in range(turns * chats):
        chat = int(rng.integers(chats))
        asked_T, answer_T = (rng.integers(0, 1 << 20, rng.integers(8, most)) for most in (60, 40))
        prompt_T = np.concatenate([histories[chat], asked_T])
        yield Visit(prompt_T, answer_T)
        histories[chat] = np.concatenate([prompt_T, answer_T])
        if len(histories[chat]) > 3 * CHUNK:
            histories[chat] = system_T  # another chat begins


def documents(seed: int, *, documents: int, visits: int, cut: bool) -> Iterator[Visit]:
    """Yield questions to long documents, which end with a chunk if they are cut."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 7, documents) * CHUNK - (0 if cut else rng.integers(1, CHUNK))
    texts = [rng.integers(0, 1 << 20, length) for length in lengths]
    for _ in range(visits):
        text_T = texts[int(rng.integers(documents))]
        asked_T, answer_T = (rng.integers(0, 1 << 20, rng.integers(8, most)) for most in (60, 40))
        yield Visit(np.concatenate([text_T, asked_T]), answer_T)


TRACES = {
    "chats": lambda size: chats(1, chats=size * 3 // 2, turns=12),
    "documents": lambda size: documents(2, documents=size * 2 // 3, visits=size * 4, cut=False),
    "documents cut at chunks": lambda size: documents(
        2, documents=size * 2 // 3, visits=size * 4, cut=True
    ),
}


def recomputed(rule: Rule, visits: Iterator[Visit]) -> float:
    """Return the share of prompts' tokens that is computed, those never seen before included."""
    computed = total = 0
    for visit in visits:
        computed += rule.serve(visit)
        total += len(visit.prompt_T)
    return computed / total


def capacity(rule: Rule, size: int) -> int:
    """Count the documents, cut at chunk ends, that stay when they are read one after the other."""
    rng, tail_T = np.random.default_rng(3), np.zeros(PAGE, np.int64)
    texts = [rng.integers(0, 1 << 20, 4 * CHUNK) for _ in range(size)]
    for text_T in texts:
        rule.serve(Visit(np.concatenate([text_T, tail_T]), tail_T[:1]))
    stayed = 0
    for text_T in reversed(texts):  # the last ones first, until one is gone
        if rule.serve(Visit(np.concatenate([text_T, tail_T]), tail_T[:1])) > PAGE:
            break
        stayed += 1
    return stayed


def compare(size: int = 60, *, rows: int = 4) -> dict[str, dict[str, float]]:
    """Return what each rule computes of each trace, and how many documents it holds.

    Args:
      size: chunks of all 48 layers that the bytes would hold.
      rows: of the engine whose division of the bytes is ours.
    """
    budget = size * (CHUNK // PAGE) * (1 + LOCAL_BLOCKS) * block_bytes()
    rules = {
        "ours": lambda: Ours.of_bytes(budget, rows=rows),
        "vllm": lambda: VLLM(budget),
        "sglang": lambda: SGLang(budget),
    }
    found = {
        name: {rule: recomputed(make(), trace(size)) for rule, make in rules.items()}
        for name, trace in TRACES.items()
    }
    held = {rule: float(capacity(make(), size)) for rule, make in rules.items()}
    return {**found, "documents held": held}
