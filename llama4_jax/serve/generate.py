"""Answer a list of requests: all at once, or token by token as they come."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, overload

from llama4_jax.pretrained import Pretrained
from llama4_jax.serve.answers import Event, TokenLogprobs
from llama4_jax.serve.engine import Engine
from llama4_jax.serve.options import Options
from llama4_jax.serve.requests import (
    NOT_FINITE,
    Prompt,
    RequestError,
    Requests,
    list_requests,
    read_requests,
)
from llama4_jax.serve.sizes import EngineConfig, Work
from llama4_jax.serve.transcript import FinishReason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said to one request.

    Attributes:
      tokens: the new ones, the one that stopped it included.
      text: of the tokens without what stopped it; None without a tokenizer.
      finish_reason: "stop" after a stop token or text, "length" after `max_new_tokens`.
      logprobs: of the tokens, if asked for.
      prompt_logprobs: of the prompt's tokens after the first, if asked for.
      others: the further answers, if more than one was asked for.
    """

    tokens: list[int]
    text: str | None
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    others: "tuple[Answer, ...]" = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewToken:
    """One token of one answer, as soon as it is known.

    Attributes:
      index: of the request in the list.
      token: its id.
      text: what it makes certain of the text; "" within a character, where a stop text may have
        begun, at a stop token, and without a tokenizer. The texts of an answer's tokens join to
        the answer's text.
      choice: which of the request's answers.
    """

    index: int
    token: int
    text: str
    choice: int = 0


@overload
def generate(
    model: Pretrained | Engine,
    requests: Requests,
    *,
    max_new_tokens: int | None = ...,
    options: Options | None = ...,
    sampling: Options | None = ...,
    on_token: Callable[[NewToken], None] | None = ...,
    on_answer: Callable[[Answer], None] | None = ...,
    config: EngineConfig | None = ...,
    stream: Literal[False] = ...,
) -> list[Answer]: ...


@overload
def generate(
    model: Pretrained | Engine,
    requests: Requests,
    *,
    max_new_tokens: int | None = ...,
    options: Options | None = ...,
    sampling: Options | None = ...,
    config: EngineConfig | None = ...,
    stream: Literal[True],
) -> Iterator[NewToken]: ...


def generate(
    model: Pretrained | Engine,
    requests: Requests,
    *,
    max_new_tokens: int | None = None,
    options: Options | None = None,
    sampling: Options | None = None,
    on_token: Callable[[NewToken], None] | None = None,
    on_answer: Callable[[Answer], None] | None = None,
    config: EngineConfig | None = None,
    stream: bool = False,
) -> list[Answer] | Iterator[NewToken]:
    """Answer every request; their lengths may differ widely.

    An answer does not depend on the other requests, except that a sampled one depends on its place
    in the list and that batches of another size round differently.

    Args:
      model: a loaded model; or an engine that serves nobody else meanwhile, whose cache then
        stays for the next call.
      requests: what to continue.
      max_new_tokens: most tokens of one answer; instead of that of `options`.
      options: how requests are answered that do not say so themselves.
      sampling: another name of `options`.
      on_token: called with every token in the order it comes; tokens of different requests
        alternate.
      on_answer: called with every answer in the order of the requests, as soon as it and those
        before it are complete.
      config: how much is done at once, for a model that is no engine.
      stream: return an iterator of tokens; closing it ends what is under way.

    Returns:
      One answer per request, in the order of the requests; or the iterator.

    Raises:
      RequestError: a request cannot be read, or does not fit the model's positions together with
        its new tokens. Nothing has been generated then. Or a logit is NaN; answers before it have
        been delivered.
    """
    if options is not None and sampling is not None:
        raise ValueError("options and sampling are two names of one thing; give one of them.")
    options = options or sampling or Options()
    if max_new_tokens is not None:
        options = dataclasses.replace(options, max_new_tokens=max_new_tokens)
    job = _Job(model, requests, options, config)
    if stream:
        return job.tokens()
    answers: list[Answer] = []
    for new in job.tokens():
        if on_token is not None:
            on_token(new)
        while len(answers) < len(job) and job.is_complete(len(answers)):
            answers.append(job.answer(len(answers)))
            if on_answer is not None:
                on_answer(answers[-1])
    return answers


class _Job:
    """A list of requests and what is known of their answers."""

    def __init__(
        self,
        model: Pretrained | Engine,
        requests: Requests,
        options: Options,
        config: EngineConfig | None,
    ):
        pretrained = model.pretrained if isinstance(model, Engine) else model
        listed = list_requests(requests)
        self._prompts = read_requests(pretrained, listed)
        self._options = [request.options or options for request in listed]
        self._has_text = pretrained.tokenizer is not None
        self._engine = make_engine(model, self._prompts, self._options, config)
        self._parts = [[_Part() for _ in range(options.n)] for options in self._options]

    def __len__(self) -> int:
        return len(self._prompts)

    def tokens(self) -> Iterator[NewToken]:
        """Answer; yield every token as it comes."""
        for index, event in run(self._engine, self._prompts, self._options):
            if event.finish_reason == "failed":
                raise RequestError(f"request {index}: {NOT_FINITE}", index)
            pairs = list(zip(event.tokens, event.texts, strict=True))
            for place, (token, text) in enumerate(pairs, start=1):
                if place == len(pairs):  # an answer is complete with its last token, not before
                    self._parts[index][event.choice].add(event)
                yield NewToken(index=index, token=token, text=text, choice=event.choice)

    def is_complete(self, index: int) -> bool:
        return all(part.finish_reason for part in self._parts[index])

    def answer(self, index: int) -> Answer:
        first, *others = (part.answer(self._has_text) for part in self._parts[index])
        self._parts[index] = []
        return dataclasses.replace(first, others=tuple(others))


class _Part:
    """One answer in the making."""

    def __init__(self):
        self.finish_reason: FinishReason | None = None
        self._tokens: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] | None = None
        self._prompt_logprobs: list[TokenLogprobs] | None = None

    def add(self, event: Event) -> None:
        self._tokens += event.tokens
        self._texts += event.texts
        if event.logprobs is not None:
            self._logprobs = [*(self._logprobs or []), *event.logprobs]
        self._prompt_logprobs = event.prompt_logprobs or self._prompt_logprobs
        self.finish_reason = event.finish_reason

    def answer(self, has_text: bool) -> Answer:
        assert self.finish_reason is not None
        return Answer(
            tokens=self._tokens,
            text="".join(self._texts) if has_text else None,
            finish_reason=self.finish_reason,
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
        )


def make_engine(
    model: Pretrained | Engine,
    prompts: Sequence[Prompt],
    options: Sequence[Options],
    config: EngineConfig | None,
) -> Engine:
    """Return the engine, or one with a cache for these requests alone; check that all fit.

    Raises:
      ValueError: for the first request that does not.
    """
    if isinstance(model, Engine):
        if config is not None:
            raise ValueError("an engine has its config already; leave config out.")
        engine = model
    else:
        each = list(zip(prompts, options, strict=True))
        tokens = sum((len(prompt.tokens_T) + o.max_new_tokens) * o.n for prompt, o in each)
        work = Work(choices=sum(o.n for o in options) or 1, tokens=tokens or 1)
        engine = Engine(model, config, work=work)
    for prompt, o in zip(prompts, options, strict=True):
        engine.check(prompt, o)
    return engine


def run(
    engine: Engine, prompts: Sequence[Prompt], options: Sequence[Options]
) -> Iterator[tuple[int, Event]]:
    """Serve requests, a few more than there are rows at a time; yield (index, event)."""
    left = iter(zip(range(len(prompts)), prompts, options, strict=True))
    index_of: dict[int, int] = {}
    open_choices: dict[int, int] = {}
    try:
        while True:
            while len(open_choices) < 2 * engine.config.max_rows:
                following = next(left, None)
                if following is None:
                    break
                index, prompt, wanted = following
                request = engine.submit(prompt, wanted)
                index_of[request], open_choices[request] = index, wanted.n
            if not open_choices:
                return
            for event in engine.step():
                if event.finish_reason is not None:
                    open_choices[event.request] -= 1
                    if not open_choices[event.request]:
                        del open_choices[event.request]
                yield index_of[event.request], event
    finally:
        for request in open_choices:
            engine.cancel(request)
        if open_choices:
            engine.step()
            engine.settle()
