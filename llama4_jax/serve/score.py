"""Score texts: the log probability of every token given those before it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from llama4_jax import parallel
from llama4_jax.model import Cache, Llama4
from llama4_jax.model.likelihood import token_logprobs
from llama4_jax.pretrained import Pretrained
from llama4_jax.serve.batching import BatchingConfig
from llama4_jax.serve.chunks import split_prompts
from llama4_jax.serve.requests import Prompt, RequestError, Requests, read_requests

LOGITS = 1 << 26  # most logits of a batch that exist at once: 256 MiB in float32


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
    pretrained: Pretrained,
    requests: Requests,
    *,
    on_score: Callable[[Score], None] | None = None,
    batching: BatchingConfig | None = None,
) -> list[Score]:
    """Score every request; their lengths may differ widely.

    Long texts are read in chunks through the cache and logits are made for a few tokens at a
    time, so memory grows with the cache only.

    Args:
      pretrained: the model, and its tokenizer if it has one.
      requests: what to score: one request or several, each a Request, a text, or a mapping of a
        Request's fields.
      on_score: called with every score in the order of the requests, as soon as it and those
        before it are complete.
      batching: how much is done at once.

    Returns:
      One score per request, in the order of the requests.

    Raises:
      RequestError: a request cannot be read or is longer than the model's positions; nothing has
        been scored then. Or a log probability is not finite; those before it have been delivered.
    """
    batching = batching or BatchingConfig()
    prompts = read_requests(pretrained, requests)
    lengths = [_checked_length(pretrained, prompt) for prompt in prompts]
    found: dict[int, np.ndarray] = {}
    scores: list[Score] = []
    for batch in batching.batches(lengths):
        with pretrained.on_mesh():
            logprobs = _score_batch(pretrained, [prompts[index] for index in batch], batching)
        found.update(zip(batch, logprobs, strict=True))
        while len(scores) in found:
            values = found.pop(len(scores)).tolist()
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


def _checked_length(pretrained: Pretrained, prompt: Prompt) -> int:
    length, limit = len(prompt.tokens_T), pretrained.config.text.max_positions
    if length > limit:
        raise RequestError(
            f"request {prompt.index} has {length} tokens, more than the model's {limit} "
            "positions; divide it.",
            prompt.index,
        )
    return length


def _score_batch(
    pretrained: Pretrained, prompts: Sequence[Prompt], batching: BatchingConfig
) -> list[np.ndarray]:
    """Return the float32 log probabilities of every prompt's tokens after the first."""
    model, config = pretrained.model, pretrained.config
    cache = batching.make_cache(config, [len(prompt.tokens_T) for prompt in prompts])
    num_rows = cache.lengths_B.shape[0]
    rows = [prompt.row(config) for prompt in prompts]
    found = [np.zeros(len(row.tokens_T), np.float32) for row in rows]
    for chunk in split_prompts(
        rows, num_rows=num_rows, chunk_length=batching.prefill_length, pad_id=config.pad_id
    ):
        targets_BT = np.zeros_like(chunk.tokens_BT)
        for index, (row, start) in enumerate(zip(rows, chunk.starts_B, strict=False)):
            next_T = row.tokens_T[start + 1 : start + 1 + chunk.lengths_B[index]]
            targets_BT[index, : len(next_T)] = next_T
        cache, logprobs_BT = score_chunk(
            model,
            cache,
            chunk.tokens_BT,
            chunk.positions_BT,
            targets_BT,
            chunk.tiles_NCHW,
            chunks=_num_chunks(chunk.tokens_BT.shape, config.text.vocab_size),
        )
        logprobs_BT = np.asarray(logprobs_BT)
        for index, start in enumerate(chunk.starts_B[: len(rows)]):
            length = chunk.lengths_B[index]
            found[index][start : start + length] = logprobs_BT[index, :length]
    return [logprobs_T[:-1] for logprobs_T in found]


def _num_chunks(shape: tuple[int, ...], vocab_size: int) -> int:
    """Return in how many chunks of T logits are made, a power of two."""
    chunks = 1
    while chunks < shape[1] and math.prod(shape) * vocab_size > LOGITS * chunks:
        chunks *= 2
    return chunks


@functools.partial(jax.jit, static_argnames=("chunks",), donate_argnames=("cache",))
def score_chunk(
    model: Llama4,
    cache: Cache,
    tokens_BT,
    positions_BT,
    targets_BT,
    tiles_NCHW=None,
    *,
    chunks: int,
) -> tuple[Cache, jax.Array]:
    """Append one chunk of every text to the cache and score the token after each of its tokens.

    Args:
      model: reads it.
      cache: of what was read before; donated.
      tokens_BT: int32 [B, T].
      positions_BT: int32 [B, T], -1 at padding.
      targets_BT: int32 [B, T], the token after each.
      tiles_NCHW: of the patch tokens in this chunk.
      chunks: of T, for which logits are made one after another; divides T.

    Returns:
      The cache, and float32 [B, T]: the log probability of each target.
    """
    hidden = model.encode(tokens_BT, tiles_NCHW, positions_BT=positions_BT, cache=cache)
    assert hidden.cache is not None
    # A chunk holds tokens of every row, so no mesh axis may divide T here.
    x_BTD = parallel.shard(hidden.x_BTD, ("batch", None, "embed"))
    found = token_logprobs(x_BTD, targets_BT, unembed=model.unembed, chunks=chunks)
    return hidden.cache, found.logprob_BT
