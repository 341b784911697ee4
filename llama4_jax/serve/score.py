"""Score texts: the log probability of every token given those before it."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from llama4_jax.pretrained import Pretrained
from llama4_jax.serve.engine import Engine
from llama4_jax.serve.generate import make_engine, run
from llama4_jax.serve.options import Options
from llama4_jax.serve.requests import Prompt, RequestError, Requests, read_requests
from llama4_jax.serve.sizes import EngineConfig

SCORING = Options(max_new_tokens=0, prompt_logprobs=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """How likely a text is.

    Attributes:
      tokens: of the text, the begin-of-text token and images included.
      logprobs: natural logarithm of each token's probability given all before it; the first
        token, given nothing, has none, so there is one fewer than tokens.
      nll: minus the sum of `logprobs`.
    """

    tokens: list[int]
    logprobs: list[float]
    nll: float


def score(
    model: Pretrained | Engine,
    requests: Requests,
    *,
    on_score: Callable[[Score], None] | None = None,
    config: EngineConfig | None = None,
) -> list[Score]:
    """Score every request; their lengths may differ widely.

    Long texts are read in pieces through the cache and logits are made for a few tokens at a
    time, so memory grows with the cache only.

    Args:
      model: a loaded model, or an engine that serves nobody else meanwhile.
      requests: what to score.
      on_score: called with every score in the order of the requests, as soon as it and those
        before it are complete.
      config: how much is done at once, for a model that is no engine.

    Returns:
      One score per request, in the order of the requests.

    Raises:
      RequestError: a request cannot be read or is longer than the model's positions; nothing has
        been scored then. Or a log probability is not finite; those before it have been delivered.
    """
    pretrained = model.pretrained if isinstance(model, Engine) else model
    prompts = read_requests(pretrained, requests)
    for prompt in prompts:
        _check_length(pretrained, prompt)
    options = [SCORING] * len(prompts)
    engine = make_engine(model, prompts, options, config)
    found: dict[int, list[float]] = {}
    scores: list[Score] = []
    for index, event in run(engine, prompts, options):
        found[index] = [each.logprob for each in event.prompt_logprobs or ()]
        while len(scores) in found:
            values = found.pop(len(scores))
            tokens = prompts[len(scores)].tokens_T.tolist()
            _refuse_non_finite(values, index=len(scores))
            scores.append(Score(tokens=tokens, logprobs=values, nll=-math.fsum(values)))
            if on_score is not None:
                on_score(scores[-1])
    return scores


def _refuse_non_finite(logprobs: Sequence[float], *, index: int) -> None:
    """Refuse a log probability that is no number, as damaged weights give it."""
    for place, value in enumerate(logprobs, start=1):
        if not math.isfinite(value):
            raise RequestError(
                f"request {index}: the log probability of token {place} is {value}; the checkpoint "
                "is damaged, or overflows in this dtype: try float32.",
                index,
            )


def _check_length(pretrained: Pretrained, prompt: Prompt) -> None:
    length, limit = len(prompt.tokens_T), pretrained.config.text.max_positions
    if length > limit:
        raise RequestError(
            f"request {prompt.index} has {length} tokens, more than the model's {limit} "
            "positions; divide it.",
            prompt.index,
        )
