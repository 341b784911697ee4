"""What an engine tells of its answers, and what it keeps of each while it is in the making."""

import dataclasses
from typing import NamedTuple

import numpy as np

from llama4_jax.serve.asked import Asked
from llama4_jax.serve.grammar import Matcher
from llama4_jax.serve.plan import Choice, Piece
from llama4_jax.serve.transcript import FinishReason, Transcript


class TokenLogprobs(NamedTuple):
    """What the model thought of a token, before temperature and the rest.

    Attributes:
      logprob: natural logarithm of its probability.
      likeliest: (token, log probability) of the likeliest in its place, in falling order.
    """

    logprob: float
    likeliest: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """What a step brought one answer.

    Attributes:
      request: the number that `submit` returned.
      choice: which of the request's answers.
      tokens: new ones, in order.
      texts: what each makes certain of the text; "" without a tokenizer.
      logprobs: of each new token, if asked for.
      prompt_logprobs: of each token of the prompt after the first, if asked for, once and with
        the first answer.
      finish_reason: why the answer has ended, or None; "failed" if a logit was NaN.
    """

    request: int
    choice: int
    tokens: list[int]
    texts: list[str]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None


class Judged:
    """Log probabilities as they came from the device."""

    def __init__(self, logprobs, likeliest):
        self._logprobs = np.asarray(logprobs)
        self._ids = None if likeliest is None else np.asarray(likeliest.ids)
        self._values = None if likeliest is None else np.asarray(likeliest.logprobs)

    def token(self, at, count: int) -> TokenLogprobs:
        """Return what stands at an index, with so many likeliest tokens."""
        likeliest: list[tuple[int, float]] = []
        if count and self._ids is not None and self._values is not None:
            ids, values = self._ids[at][:count].tolist(), self._values[at][:count].tolist()
            likeliest = list(zip(ids, values, strict=True))
        return TokenLogprobs(float(self._logprobs[at]), likeliest)


@dataclasses.dataclass(eq=False, kw_only=True)
class Answering:
    """One answer in the making."""

    request: int
    index: int
    choice: Choice
    asked: Asked
    transcript: Transcript
    matcher: Matcher | None
    scores: list[TokenLogprobs] | None  # of the prompt

    def take_scores(self, piece: Piece, row: int, scores: Judged) -> None:
        """Keep what the model thought of the prompt's tokens after those of a piece."""
        wanted = self.asked.options.prompt_logprobs
        if self.scores is None or wanted is None:
            return
        end = min(piece.end, self.choice.prompt - 1)
        for position in range(max(piece.start, len(self.scores)), end):
            self.scores.append(scores.token((row, position - piece.start), wanted))
