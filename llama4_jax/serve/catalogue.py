"""Which compiled programs there are, which of them a call takes, and which a request will need."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from llama4_jax.serve.asked import Asked
from llama4_jax.serve.options import MAX_LOGPROBS
from llama4_jax.serve.plan import CacheLayout, Piece, bucket
from llama4_jax.serve.programs import Shape
from llama4_jax.serve.scheduler import MAX_DRAFTS
from llama4_jax.serve.sizes import EngineConfig

SHORTEST = 16  # tokens of the smallest call that reads a prompt
LADDER = 4  # from one compiled length, width or count to the next
CHANGES = 256  # tokens of the smallest draw that changes logits
MAX_TILES = 16  # that are encoded in one call
WASTE = 8  # a call may be so many times larger than it need be, where that saves a compilation


class Form(NamedTuple):
    """What a draw is told, and asked for, beside the numbers of its rows.

    Attributes:
      top: likeliest tokens beside the log probability of the drawn one; None wants neither.
      changes: tokens of each row whose logits may change; 0 for none.
      masked: whether tokens may be ruled out.
    """

    top: int | None = None
    changes: int = 0
    masked: bool = False

    def covers(self, other: "Form") -> bool:
        """Would this do for the other?"""
        tops = [-1 if form.top is None else form.top for form in (self, other)]
        return tops[0] >= tops[1] and self.changes >= other.changes and self.masked >= other.masked


class Program(NamedTuple):
    """What tells one compiled program from another.

    Attributes:
      kind: which function of `programs`.
      shape: of the tokens that it reads or scores.
      form: of a draw or a score.
      count: rows of a draw, tiles of an encoder.
    """

    kind: Literal["read", "loop", "draw", "score", "encode"]
    shape: Shape | None = None
    form: Form | None = None
    count: int = 0


class Catalogue:
    """The programs of one engine.

    While it is open, a call takes the shape that fits it, and whoever asks first waits for the
    compiler. Once it is closed a call takes the smallest program there is that will do.

    Args:
      layout: of the cache.
      config: of the engine.
      pages: most of a row.
      ready: programs that are compiled; shared by all engines of the same model and sizes.
    """

    def __init__(
        self, layout: CacheLayout, config: EngineConfig, *, pages: int, ready: set[Program]
    ):
        self.compilations = 0  # that a step had to wait for
        self.is_closed = False
        self._layout, self._config, self._pages, self._ready = layout, config, pages, ready
        self._drafts = 1 + MAX_DRAFTS if config.speculate == "ngram" else 1

    def close(self, ask: Callable[[Sequence[Program]], None]) -> None:
        """Let steps take what is compiled from now on; `ask` is told what would fit them better."""
        self.is_closed, self._ask = True, ask

    def add(self, program: Program) -> None:
        """Take note that a program has been compiled."""
        self._ready.add(program)

    def use(self, program: Program) -> None:
        """Take note that a step dispatches a program."""
        if program not in self._ready:
            self._ready.add(program)
            self.compilations += 1

    def missing(self, programs: Iterable[Program]) -> list[Program]:
        """Return those that are not compiled."""
        return [program for program in programs if program not in self._ready]

    def any_read(self) -> Shape:
        """Return the shape of a call that has been compiled; there is one once anybody is served.

        Raises:
          StopIteration: nobody has been served.
        """
        return next(p.shape for p in tuple(self._ready) if p.kind == "read" and p.shape is not None)

    # -------------------------------------------------------------------- what a call takes

    def shape(
        self,
        kind: Literal["read", "loop"],
        pieces: Sequence[Piece],
        rows: Sequence[Asked],
        *,
        every: bool = False,
        keeps: bool = False,
        images: bool = False,
    ) -> Shape | None:
        """Choose the shape of a call; None if its pieces had better be read one by one."""
        wanted = self._shape(
            len(pieces),
            max(len(piece.tokens_T) for piece in pieces),
            max(len(piece.whole) for piece in pieces),
            max(len(piece.chunk) for piece in pieces),
            every=every,
            keeps=keeps,
            images=images,
        )
        if Program(kind, wanted) in self._ready and not self.is_closed:
            return wanted
        form = None
        if kind == "read" and self.is_closed and any(piece.draws for piece in pieces):
            form = self.form(rows, max((row.changes for row in rows), default=0))
        able = [
            shape
            for shape in self._able(kind, wanted)
            if form is None or any(each.covers(form) for each in self._draws(shape.draws))
        ]
        if not self.is_closed:
            able = [shape for shape in able if _cost(shape) <= WASTE * _cost(wanted)]
        if able:
            best = min(able, key=_cost)
            if self.is_closed and _cost(best) > 2 * _cost(wanted):
                self._note(kind, wanted, form)
            return best
        return None if self.is_closed and len(pieces) > 1 else wanted

    def form(self, rows: Sequence[Asked], longest: int) -> Form:
        """Return the form of a draw for these rows, one of which changes so many logits."""
        top = MAX_LOGPROBS if any(row.options.logprobs is not None for row in rows) else None
        if not longest and not any(row.options.has_form for row in rows):
            return Form(top)
        return Form(top, _rung(longest, CHANGES), True)  # one form for all that is rare

    def draw(self, rows: Sequence[Asked], count: int, longest: int) -> Form:
        """Choose the form of a draw of so many rows."""
        wanted = self.form(rows, longest)
        if not self.is_closed:
            return wanted
        able = [form for form in self._draws(count) if form.covers(wanted)]
        best = wanted
        if able and wanted not in able:
            best = min(able, key=lambda form: (form.changes, form.masked, form.top or 0))
        if longest > best.changes // LADDER:  # answers grow
            grown = best._replace(changes=LADDER * best.changes)
            self._ask([Program("draw", None, grown, each) for each in (count, 1)])
        return best

    def tiles(self, count: int) -> int:
        """Choose how many tiles are encoded by the next call of those that wait."""
        wanted = min(_rung(count, 1), MAX_TILES)
        if not self.is_closed:
            return wanted
        known = [program.count for program in tuple(self._ready) if program.kind == "encode"]
        self._ask([Program("encode", count=wanted)])
        return max(size for size in known if size <= wanted)

    # --------------------------------------------------------------- what a request will need

    def needs(self, row: Asked) -> list[Program]:
        """Return programs that will do for a choice from its beginning to its end."""
        return list(dict.fromkeys(self._needs(row)))

    def would_like(self, row: Asked) -> list[Program]:
        """Return smaller ones that its prompt may be read with."""
        lengths, longest = [SHORTEST], bucket(self._config.step_tokens)
        while lengths[-1] * LADDER < longest:
            lengths.append(lengths[-1] * LADDER)
        return [program for length in lengths for program in self._reading(row, length)]

    def _needs(self, row: Asked) -> Iterator[Program]:
        form = self.form([row], row.changes)
        if len(row.patches_N):
            yield Program("encode", count=1)
        yield from self._reading(row, self._config.step_tokens)
        whole, chunk = self._pages_of(row, 1)
        for tokens in {1, self._drafts}:
            shape = self._shape(self._config.max_rows, tokens, whole, chunk, every=True)
            if tokens == 1:
                yield Program("loop", shape)
            yield Program("read", shape)
            for each in (Form(), form, form._replace(top=MAX_LOGPROBS)):  # of mixed batches, too
                yield Program("draw", None, each, shape.draws)

    def _reading(self, row: Asked, length: int) -> Iterator[Program]:
        scored = row.options.prompt_logprobs is not None
        whole, chunk = self._pages_of(row, length)
        for images in {False, len(row.patches_N) > 0}:
            shape = self._shape(1, length, whole, chunk, keeps=scored, images=images)
            yield Program("read", shape)
            if scored:
                yield Program("score", shape, Form(MAX_LOGPROBS))
        yield Program("draw", None, self.form([row], row.changes), 1)

    def _pages_of(self, row: Asked, length: int) -> tuple[int, int]:
        """Return the most pages of both kinds that a call holds of a row."""
        end, layout = row.end, self._layout
        last = max(layout.chunk_size or 1, 1) - 1  # of a chunk, where a piece may begin
        return layout.whole_of(end), layout.chunk_of(0, min(last + length, end))

    def _shape(
        self, rows: int, tokens: int, whole: int, chunk: int, *, every: bool = False, **how: bool
    ) -> Shape:
        of_chunk = -(-(self._layout.chunk_size or 0) // self._layout.page_size)
        if not every:
            tokens = bucket(tokens, floor=SHORTEST)
            # Several chunks may be read at once, from the middle of the first.
            of_chunk = -(-chunk // of_chunk) * of_chunk if of_chunk else 0
        return Shape(
            rows=min(bucket(rows), bucket(self._config.max_rows)),
            tokens=bucket(tokens),
            whole=min(_rung(whole, 16 if every else 4), max(self._pages, 1)),
            chunk=max(of_chunk if chunk else 0, 1),
            every=every,
            **how,
        )

    def _able(self, kind: str, wanted: Shape) -> Iterator[Shape]:
        for program in tuple(self._ready):
            shape = program.shape
            if program.kind == kind and shape is not None and _covers(shape, wanted):
                yield shape

    def _draws(self, count: int) -> Iterator[Form]:
        """Yield the forms in which so many rows can draw."""
        for program in tuple(self._ready):
            if program.kind == "draw" and program.count == count and program.form is not None:
                yield program.form

    def _note(self, kind: Literal["read", "loop"], shape: Shape, form: Form | None) -> None:
        programs = [Program(kind, shape)]
        if form is not None:
            programs.append(Program("draw", None, form, shape.draws))
        if shape.keeps:
            programs.append(Program("score", shape, Form(MAX_LOGPROBS)))
        self._ask(programs)


def _covers(shape: Shape, wanted: Shape) -> bool:
    """Would a call of a shape do for what wants another?"""
    sizes = ("rows", "tokens", "whole", "chunk")
    flags = ("every", "keeps", "images")
    ours, theirs = dataclasses.asdict(shape), dataclasses.asdict(wanted)
    return all(ours[n] >= theirs[n] for n in sizes) and all(ours[n] == theirs[n] for n in flags)


def _cost(shape: Shape) -> int:
    return shape.rows * shape.tokens * (1 if shape.every else 64 + shape.whole)


def _rung(size: int, floor: int) -> int:
    """Round up by factors of LADDER from `floor`."""
    while floor < size:
        floor *= LADDER
    return floor
