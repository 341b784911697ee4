"""The engine: requests come and go at any time, and every step serves all that are there.

A step is planned, dispatched and read one step later, while the next one runs: nothing waits for
the device but what needs its tokens. One thread calls `step`; any thread may submit and cancel.
"""

import collections
import dataclasses
import hashlib
import threading
from collections.abc import Iterable

import numpy as np

from llama4_jax.pretrained import Pretrained
from llama4_jax.serve import ngram
from llama4_jax.serve.adjust import Adjuster
from llama4_jax.serve.answers import Answering, Event, Judged
from llama4_jax.serve.asked import Asked, Tile
from llama4_jax.serve.background import BackgroundCompiler
from llama4_jax.serve.device import Call, Device, Extras
from llama4_jax.serve.grammar import Grammars
from llama4_jax.serve.options import Options
from llama4_jax.serve.pages import PageNames
from llama4_jax.serve.plan import Choice, Numbers, Piece
from llama4_jax.serve.requests import Prompt, RequestError
from llama4_jax.serve.sampling import NOTHING, answer_key
from llama4_jax.serve.scheduler import Draft, Scheduler, no_drafts
from llama4_jax.serve.sizes import EngineConfig, Work
from llama4_jax.serve.transcript import Ending, FinishReason, Transcript


@dataclasses.dataclass
class Counters:
    """What the engine has done since it was made."""

    steps: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0


class Engine:
    """Serve requests on one model.

    Args:
      pretrained: the model, its tokenizer if it has one, and its generation defaults.
      config: sizes.
      work: all that there will ever be, if that is known; saves memory.

    Raises:
      ValueError: the cache holds no row.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        config: EngineConfig | None = None,
        *,
        work: Work | None = None,
    ):
        self.pretrained, self.config = pretrained, config or EngineConfig()
        self.counters = Counters()
        self.context = self.config.context(pretrained.config)
        devices = 1
        if pretrained.mesh is not None:
            devices = dict(pretrained.mesh.shape).get("context", 1)
        layout = self.config.layout(pretrained.config, devices=devices, work=work)
        self.scheduler = Scheduler(
            layout, max_rows=self.config.max_rows, step_tokens=self.config.step_tokens
        )
        with pretrained.on_mesh():
            self.device = Device(pretrained, layout, self.config)
        self._answers: dict[int, Answering] = {}  # by the numbers of their choices
        self._asked: dict[int, Asked] = {}
        self._attended: set[int] = set()  # choices that need more than tokens of each draw
        self._of_request: dict[int, list[int]] = {}
        self._in_flight: collections.deque[list[Call]] = collections.deque()
        self._inbox: collections.deque[tuple[str, int, list[Answering]]] = collections.deque()
        self._compiler: BackgroundCompiler | None = None
        self._changed = threading.Condition()
        self._grammars = Grammars(
            pretrained.tokenizer,
            pretrained.config.text.vocab_size,
            pretrained.generation.stop_ids,
        )
        self._numbers = self._requests = 0
        self.draft: Draft = lambda choice, most: ngram.draft(choice.tokens.array, most)

    # ------------------------------------------------------------------------ from any thread

    def check(self, prompt: Prompt, options: Options) -> Options:
        """Return options with the checkpoint's defaults filled in.

        Raises:
          RequestError: the request could not be served, whatever else there is.
        """
        model, length = self.pretrained.config, len(prompt.tokens_T)
        if length + max(options.max_new_tokens, 1) - 1 > self.context:
            raise RequestError(
                f"request {prompt.index} has {length} prompt tokens, which with "
                f"{options.max_new_tokens} new ones exceed the model's {self.context} positions; "
                "shorten the prompt, or choose max_new_tokens of at most "
                f"{max(0, self.context - length + 1)}.",
                prompt.index,
            )
        if not self.scheduler.layout.fits(length + options.max_new_tokens - 1):
            raise RequestError(
                f"request {prompt.index} has {length} prompt tokens, which with "
                f"{options.max_new_tokens} new ones do not fit the cache; give it more bytes.",
                prompt.index,
            )
        if options.stop and self.pretrained.tokenizer is None:
            raise RequestError(
                f"request {prompt.index}: without a tokenizer give stop_ids, not stop.",
                prompt.index,
            )
        try:
            if options.has_form:
                self._grammars.matcher(options)
            return options.resolved(self.pretrained.generation, model.text.vocab_size)
        except ValueError as error:
            raise RequestError(f"request {prompt.index}: {error}", prompt.index) from error

    def submit(self, prompt: Prompt, options: Options) -> int:
        """Let a request wait for its turn; return the number that its events will bear.

        Raises:
          ValueError: it could not be served.
        """
        options = self.check(prompt, options)
        row = prompt.row(self.pretrained.config)
        tiles = [Tile(hashlib.blake2b(t.tobytes(), digest_size=16).digest(), t)
                 for t in row.tiles_NCHW]  # fmt: skip
        patches_N = np.zeros(0, np.int64)
        if tiles:
            patches_N = np.flatnonzero(row.tokens_T == self.pretrained.config.patch_id)
        spans = [
            (int(first), int(last) + 1, tile.digest)
            for (first, last), tile in zip(row.tile_spans_N2, tiles, strict=True)
        ]
        with self._changed:
            request, answers = self._requests, []
            self._requests += 1
            for index in range(options.n):
                elder = answers[0].choice if answers else None
                asked = Asked(
                    options if index == 0 else dataclasses.replace(options, prompt_logprobs=None),
                    answer_key(options.seed, prompt.index, index),
                    row.tokens_T,
                    patches_N,
                    tiles,
                    Adjuster(options, row.tokens_T) if options.changes_logits else None,
                )
                answers.append(self._answer(request, index, asked, spans, elder))
            self._inbox.append(("submit", request, answers))
            self._changed.notify()
        return request

    def cancel(self, request: int) -> None:
        """End a request; the next step frees its pages. It may have ended already."""
        with self._changed:
            self._inbox.append(("cancel", request, []))
            self._changed.notify()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until there is something to do; return whether there is."""
        with self._changed:
            return self._changed.wait_for(lambda: self.is_busy, timeout)

    @property
    def is_busy(self) -> bool:
        """Is there anything to do?"""
        if self._compiler is not None and self._compiler.has_news:
            return True
        planned = self.scheduler.running or self.scheduler.waiting
        return bool(self._inbox or self._in_flight or planned)

    def compile_beside(self, foreseen: Iterable[Asked] = ()) -> None:
        """Let no step wait for the compiler from now on.

        Steps take programs that are compiled, and a request whose programs are not waits until a
        thread has made them. Call `close` in the end.

        Args:
          foreseen: choices like those to come, whose programs are compiled before they do.
        """
        with self.pretrained.on_mesh():
            example = self.device.example()
        catalogue = self.device.catalogue
        self._compiler = BackgroundCompiler(
            example, catalogue, enter=self.pretrained.on_mesh, on_ready=self._wake
        )
        catalogue.close(self._compiler.ask)
        for asked in foreseen:
            self._compiler.ask([*catalogue.needs(asked), *catalogue.would_like(asked)])

    def close(self) -> None:
        """End the thread that compiles, if there is one."""
        if self._compiler is not None:
            self._compiler.close()

    # ----------------------------------------------------------------------------- the thread

    def step(self) -> list[Event]:
        """Serve everything that is there by a step; return what became known."""
        with self.pretrained.on_mesh():
            events = self._read_inbox()
            speculates = self.config.speculate == "ngram"
            loops = 1 if speculates or self._attended else self.config.loops
            plan = self.scheduler.plan(self.draft if speculates else no_drafts, loops=loops)
            if not plan.decode and not plan.prefill:
                return events + self.settle()
            self.counters.steps += 1
            asked = {p.number: self._asked[p.number] for p in (*plan.decode, *plan.prefill)}
            calls = self.device.read(plan, asked, draws=not self._attended)
            # Masks and penalties need the tokens before; they are read while the model runs.
            pieces = [(p, c) for c in calls for p in c.pieces if p.draws]
            if any(self._is_adjusted(self._answers[p.number]) for p, _ in pieces):
                events += self.settle()
            for call in calls:
                self.device.draw(call, asked, self._extras(call))
            self._in_flight.append(calls)
            while len(self._in_flight) > (0 if speculates else 1):
                events += self._settle(self._in_flight.popleft())
        return events

    def settle(self) -> list[Event]:
        """Wait for all that is under way; return what became known."""
        events = []
        while self._in_flight:
            events += self._settle(self._in_flight.popleft())
        return events

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _answer(self, request: int, index: int, asked: Asked, spans, elder) -> Answering:
        options, prompt_T = asked.options, asked.prompt_T
        size = self.scheduler.layout.page_size
        choice = Choice(
            number=self._numbers,
            tokens=Numbers(prompt_T),
            prompt=len(prompt_T),
            limit=len(prompt_T) + options.max_new_tokens,
            names=PageNames(size, salt=options.cache_salt, tiles=spans),
            order=(options.priority, self._numbers),
            reuses=options.prompt_logprobs is None,
            after=elder,
        )
        self._numbers += 1
        tokenizer, ending = self.pretrained.tokenizer, Ending.of(options)
        return Answering(
            request=request,
            index=index,
            choice=choice,
            asked=asked,
            transcript=Transcript(tokenizer, ending, skip_special=options.skip_special),
            matcher=self._grammars.matcher(options) if options.has_form else None,
            scores=None if options.prompt_logprobs is None else [],
        )

    def _read_inbox(self) -> list[Event]:
        events = []
        compiler = self._compiler
        for number in [] if compiler is None else compiler.released():
            self.scheduler.add(self._answers[number].choice)
        while self._inbox:
            kind, request, answers = self._inbox.popleft()
            if kind == "submit":
                self._of_request[request] = [a.choice.number for a in answers]
                for answer in answers:
                    self._answers[answer.choice.number] = answer
                    self._asked[answer.choice.number] = answer.asked
                    if self._is_adjusted(answer) or answer.asked.options.logprobs is not None:
                        self._attended.add(answer.choice.number)
                    self.counters.prompt_tokens += answer.choice.prompt
                    if answer.choice.limit == 1:  # there is nothing to read for a score
                        events.append(self._end(answer, "length"))
                    elif compiler is None or compiler.admits(answer.choice.number, answer.asked):
                        self.scheduler.add(answer.choice)
                continue
            for number in list(self._of_request.get(request, ())):
                events.append(self._end(self._answers[number], "cancelled"))
        return events

    def _end(self, answer: Answering, reason: FinishReason) -> Event:
        self._forget(answer)
        return Event(
            request=answer.request,
            choice=answer.index,
            tokens=[],
            texts=[],
            prompt_logprobs=answer.scores,
            finish_reason=reason,
        )

    def _forget(self, answer: Answering) -> None:
        self.scheduler.drop(answer.choice)
        number = answer.choice.number
        del self._answers[number]
        del self._asked[number]
        self._attended.discard(number)
        if self._compiler is not None:
            self._compiler.forget(number)
        left = self._of_request[answer.request]
        left.remove(answer.choice.number)
        if not left:
            del self._of_request[answer.request]

    @staticmethod
    def _is_adjusted(answer: Answering) -> bool:
        return answer.asked.adjuster is not None or answer.matcher is not None

    def _extras(self, call: Call) -> dict[int, Extras]:
        """Return what changes the logits of a call's rows; those that have ended need nothing."""
        extras = {}
        for piece in call.pieces:
            answer = self._answers.get(piece.number)
            if answer is None or not piece.draws or not self._is_adjusted(answer):
                continue
            drafts = piece.tokens_T[1:].tolist() if call.shape.every else []
            extras[piece.number] = Extras(
                None if answer.asked.adjuster is None else answer.asked.adjuster.draws(drafts),
                None if answer.matcher is None else answer.matcher.masks(drafts),
            )
        return extras

    def _settle(self, calls: list[Call]) -> list[Event]:
        events = []
        for call in calls:
            tokens = None if call.drawn is None else np.asarray(call.drawn.token_R)
            scores = Judged(*call.scores) if call.scores is not None else None
            judged = None
            if call.drawn is not None and call.drawn.logprob_R is not None:
                judged = Judged(call.drawn.logprob_R, call.drawn.likeliest)
            for row, piece in enumerate(call.pieces):
                answer = self._answers.get(piece.number)
                if answer is None:  # it has ended, and this was drawn for nothing
                    continue
                if scores is not None:
                    answer.take_scores(piece, row, scores)
                if piece.draws:
                    assert tokens is not None
                    at = row * call.draws
                    count = piece.loops if call.read is None else call.draws
                    drawn = tokens[at : at + count].tolist()
                    events.append(self._take(answer, piece, drawn, at, judged))
                elif piece.end >= answer.choice.limit - 1:  # a prompt that was only to be scored
                    events.append(self._end(answer, "length"))
        return events

    def _take(
        self, answer: Answering, piece: Piece, drawn: list[int], at: int, judged: "Judged | None"
    ) -> Event:
        """Take the drawn tokens whose drafts were right, up to the end of the answer."""
        drafts = piece.tokens_T[1:].tolist() if len(drawn) > piece.loops else []
        count = piece.loops
        while count <= len(drafts) and drafts[count - 1] == drawn[count - 1]:
            count += 1
        self.counters.drafted += len(drafts)
        self.counters.accepted += count - piece.loops
        taken, texts, transcript = [], [], answer.transcript
        for token in drawn[:count]:
            if token == NOTHING:
                return self._end(answer, "failed")
            taken.append(token)
            texts.append(transcript.add(token))
            if transcript.finish_reason is not None:
                break
            if answer.asked.adjuster is not None:
                answer.asked.adjuster.add(token)
            if answer.matcher is not None:
                answer.matcher.advance(token)
                if answer.matcher.is_over:
                    texts[-1] += transcript.stop()
                    break
        self.counters.new_tokens += len(taken)
        self.scheduler.commit(answer.choice, taken, loops=piece.loops)
        scores, wanted = answer.scores, answer.asked.options.logprobs
        answer.scores = None
        if transcript.finish_reason is not None:
            self._forget(answer)
        found = None
        if wanted is not None and judged is not None:
            found = [judged.token(at + i, wanted) for i in range(len(taken))]
        return Event(
            request=answer.request,
            choice=answer.index,
            tokens=taken,
            texts=texts,
            logprobs=found,
            prompt_logprobs=scores,
            finish_reason=transcript.finish_reason,
        )
