"""Text completions: prompts as texts or ids, answered or only scored."""

import dataclasses
from collections.abc import Callable
from typing import Any

from llama4_jax.pretrained import Pretrained
from llama4_jax.serve.answers import Event, TokenLogprobs
from llama4_jax.serve.options import Options
from llama4_jax.serve.requests import Request
from llama4_jax.server.fields import DEFAULT_MAX_TOKENS, Fields, read_options
from llama4_jax.server.structure import read_form
from llama4_jax.server.tokens import completion_logprobs

_MAX_PROMPTS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """What a client asks of prompts.

    Attributes:
      requests: the prompts, in order.
      options: (room for new tokens) -> how each is answered.
      echo: whether the prompt stands before the answer.
      logprobs: alternatives to tell of every token; None tells nothing.
      stream, usage, running_usage, token_ids: as in a chat.
    """

    requests: list[Request]
    options: Callable[[int], Options]
    echo: bool
    logprobs: int | None
    stream: bool
    usage: bool
    running_usage: bool
    token_ids: bool


def read_completion(fields: Fields) -> CompletionRequest:
    """Read a request of /v1/completions.

    Raises:
      ApiError: a field has a value that is not allowed.
    """
    allow_special = fields.flag("allow_special")
    requests = [
        Request(prompt=prompt, allow_special=allow_special)
        if isinstance(prompt, str)
        else Request(tokens=prompt)
        for prompt in _prompts(fields)
    ]
    most, echo = fields.whole("max_tokens", DEFAULT_MAX_TOKENS["completion"]), fields.flag("echo")
    logprobs, usage = fields.whole("logprobs"), fields.inner("stream_options")
    form = read_form(fields)
    prompt_logprobs = fields.whole("prompt_logprobs", logprobs if echo else None)

    def options(room: int) -> Options:
        del room  # the default is short
        return read_options(
            fields,
            max_new_tokens=most,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs if most or prompt_logprobs is not None else 0,
            **form,
        )

    asked = CompletionRequest(
        requests=requests,
        options=options,
        echo=echo,
        logprobs=logprobs,
        stream=fields.flag("stream"),
        usage=usage is not None and usage.flag("include_usage"),
        running_usage=usage is not None and usage.flag("continuous_usage_stats"),
        token_ids=fields.flag("return_token_ids"),
    )
    options(1)
    return asked


def _prompts(fields: Fields) -> list[Any]:
    """Return the prompts, each a text or a list of ids."""
    given = fields.any("prompt")
    must = "a text, a list of texts, token ids, or lists of token ids"
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise fields.wrong("prompt", must)
    if all(isinstance(token, int) and not isinstance(token, bool) for token in given):
        return [given]
    if len(given) > _MAX_PROMPTS:
        raise fields.wrong("prompt", f"at most {_MAX_PROMPTS} prompts")
    is_text = isinstance(given[0], str)
    if not all(isinstance(prompt, str if is_text else list) for prompt in given):
        raise fields.wrong("prompt", must)
    return given


class CompletionAnswer:
    """One answer in the making.

    Args:
      pretrained: whose tokens they are.
      asked: what the client wants.
      prompt: the ids of the prompt.
      index: of the choice.
    """

    def __init__(
        self, pretrained: Pretrained, asked: CompletionRequest, prompt: list[int], index: int
    ) -> None:
        self.index, self.prompt = index, prompt
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._asked, self._tokenizer = asked, pretrained.tokenizer
        self._text = ""
        self._scores: list[TokenLogprobs | None] = []
        self._echo = self._spell_prompt() if asked.echo else ""
        self._is_told = not asked.echo  # whether the prompt has been sent

    def _spell_prompt(self) -> str:
        tokens, tokenizer = self.prompt, self._tokenizer
        if tokenizer is None:
            return ""
        begins = bool(tokens) and tokens[0] == tokenizer.bos_id
        return tokenizer.decode(tokens[begins:])

    def take(self, event: Event) -> dict[str, Any]:
        """Add what a step brought; return the choice of an event that tells it."""
        text, tokens = "".join(event.texts), list(event.tokens)
        scores: list[TokenLogprobs | None] = [*(event.logprobs or [])]
        if event.prompt_logprobs is not None and self._asked.echo:
            self._scores = [None, *event.prompt_logprobs]
        offset = len(self._echo) + len(self._text)
        self._text += text
        self.tokens += tokens
        if self._asked.logprobs is not None:
            self._scores += scores
        if not self._is_told:
            self._is_told, offset = True, 0
            text, tokens, scores = self._echo + text, self.prompt + tokens, self._scores
        if event.finish_reason is not None:
            self.finish_reason = (
                "stop" if event.finish_reason == "cancelled" else event.finish_reason
            )
        return {
            "index": self.index,
            "text": text,
            "logprobs": self._logprobs(tokens, scores, offset),
            "finish_reason": self.finish_reason,
            **({"token_ids": tokens} if self._asked.token_ids else {}),
        }

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """Add what a step brought; return the choices that tell it."""
        return [self.take(event)]

    def choice(self) -> dict[str, Any]:
        """Return the whole answer as a choice."""
        tokens = (self.prompt if self._asked.echo else []) + self.tokens
        return {
            "index": self.index,
            "text": self._echo + self._text,
            "logprobs": self._logprobs(tokens, self._scores, 0),
            "finish_reason": self.finish_reason,
            **({"token_ids": tokens} if self._asked.token_ids else {}),
        }

    def _logprobs(
        self, tokens: list[int], scores: list[TokenLogprobs | None], offset: int
    ) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        return completion_logprobs(self._tokenizer, tokens, scores, offset=offset)
