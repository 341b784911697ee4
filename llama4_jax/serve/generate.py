"""Continue prompts: prefill in chunks, decode several steps per dispatch, stream as tokens come."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.model import Cache
from llama4_jax.pretrained import Pretrained
from llama4_jax.serve.batching import BatchingConfig
from llama4_jax.serve.chunks import bucket, split_prompts
from llama4_jax.serve.requests import Prompt, RequestError, Requests, read_requests
from llama4_jax.serve.sampling import Sampling, SamplingRows, row_keys
from llama4_jax.serve.steps import (
    NO_TOKEN,
    RowRules,
    decode_steps,
    prefill_chunk,
    sample_first,
)
from llama4_jax.text import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said to one request.

    Attributes:
      tokens: the new ones, the one that stopped it included.
      text: of the tokens without the one that stopped it; None without a tokenizer.
      finish_reason: "stop" after a stop token, "length" after `max_new_tokens`.
    """

    tokens: list[int]
    text: str | None
    finish_reason: FinishReason


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewToken:
    """One token of one answer, as soon as it is known.

    Attributes:
      index: of the request in the list.
      token: its id.
      text: what it adds to the text so far; "" within a character, at a stop token, and without
        a tokenizer. The texts of an answer's tokens join to the answer's text.
    """

    index: int
    token: int
    text: str


def generate(
    pretrained: Pretrained,
    requests: Requests,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    on_token: Callable[[NewToken], None] | None = None,
    on_answer: Callable[[Answer], None] | None = None,
    batching: BatchingConfig | None = None,
) -> list[Answer]:
    """Answer every request; their lengths may differ widely.

    An answer does not depend on the other requests, except that a sampled one depends on its place
    in the list and that batches of another size round differently.

    Args:
      pretrained: the model, its tokenizer if it has one, and its generation defaults.
      requests: what to continue: one request or several, each a Request, a prompt, or a mapping
        of a Request's fields.
      max_new_tokens: most tokens of one answer.
      sampling: how tokens are chosen; None takes the checkpoint's defaults.
      on_token: called with every token in the order it comes; tokens of different requests
        alternate.
      on_answer: called with every answer in the order of the requests, as soon as it and those
        before it are complete.
      batching: how much is done at once.

    Returns:
      One answer per request, in the order of the requests.

    Raises:
      RequestError: a request cannot be read, or does not fit the model's positions together with
        `max_new_tokens`. Nothing has been generated then.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1.")
    batching = batching or BatchingConfig()
    sampling = sampling or default_sampling(pretrained)
    prompts = read_requests(pretrained, requests)
    lengths = [_needed_length(pretrained, prompt, max_new_tokens) for prompt in prompts]
    transcripts = [_Transcript(pretrained, max_new_tokens) for _ in prompts]
    answers: list[Answer] = []
    with pretrained.on_mesh():
        for batch in batching.batches(lengths):
            rows = [prompts[index] for index in batch]
            for row, token in _run_batch(pretrained, rows, max_new_tokens, sampling, batching):
                text = transcripts[batch[row]].add(token)
                if on_token is not None:
                    on_token(NewToken(index=batch[row], token=token, text=text))
            while len(answers) < len(prompts) and transcripts[len(answers)].is_complete:
                answers.append(transcripts[len(answers)].answer())
                if on_answer is not None:
                    on_answer(answers[-1])
    return answers


def default_sampling(pretrained: Pretrained) -> Sampling:
    """Return the checkpoint's own way to choose tokens; greedy if it names none."""
    generation = pretrained.generation
    return Sampling(
        temperature=generation.temperature, top_p=generation.top_p, top_k=generation.top_k
    )


def _needed_length(pretrained: Pretrained, prompt: Prompt, max_new_tokens: int) -> int:
    length, limit = len(prompt.tokens_T), pretrained.config.text.max_positions
    # The last new token is never read, so it needs no position.
    if length + max_new_tokens - 1 > limit:
        raise RequestError(
            f"request {prompt.index} has {length} prompt tokens, which with {max_new_tokens} new "
            f"ones exceed the model's {limit} positions; shorten the prompt, or choose "
            f"max_new_tokens of at most {max(0, limit - length + 1)}.",
            prompt.index,
        )
    return length + max_new_tokens


def _run_batch(
    pretrained: Pretrained,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling,
    batching: BatchingConfig,
) -> Iterator[tuple[int, int]]:
    """Yield (row, token) in the order the tokens come."""
    model = pretrained.model
    cache, last_BD = _prefill(pretrained, prompts, max_new_tokens, batching)
    stop_ids = pretrained.generation.stop_ids
    rules = _rules(prompts, len(last_BD), max_new_tokens, sampling, stop_ids)
    state, new_BT = sample_first(model, cache, last_BD, rules)
    made = 0
    while True:
        made += new_BT.shape[1]
        # The next steps are under way on the device while these tokens are read here.
        ahead = None
        if made < max_new_tokens:
            state, ahead = decode_steps(model, state, rules, steps=batching.steps)
        tokens_TB = np.asarray(new_BT).T
        for tokens_B in tokens_TB:
            yield from (
                (row, int(token)) for row, token in enumerate(tokens_B) if token != NO_TOKEN
            )
        if ahead is None or (tokens_TB[-1] == NO_TOKEN).all():
            return
        new_BT = ahead


def _rules(
    prompts: Sequence[Prompt],
    num_rows: int,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
) -> RowRules:
    """Lay out what was asked of each row; rows beyond the prompts only fill the batch up."""
    fill = num_rows - len(prompts)
    numbers_B = np.asarray([*(prompt.index for prompt in prompts), *[0] * fill])
    stop_ids_BS = np.full((num_rows, bucket(len(stop_ids), floor=8)), NO_TOKEN, np.int32)
    stop_ids_BS[:, : len(stop_ids)] = stop_ids
    return RowRules(
        sampling=SamplingRows.of([sampling] * num_rows),
        keys_B=row_keys(np.full(num_rows, sampling.seed, np.uint32), numbers_B),
        limit_B=np.asarray([max_new_tokens] * len(prompts) + [0] * fill, np.int32),
        stop_ids_BS=stop_ids_BS,
    )


def _prefill(
    pretrained: Pretrained, prompts: Sequence[Prompt], max_new_tokens: int, batching: BatchingConfig
) -> tuple[Cache, jax.Array]:
    """Read the prompts; return the cache and the hidden state of each one's last token."""
    model, config = pretrained.model, pretrained.config
    rows = [prompt.row(config) for prompt in prompts]
    cache = batching.make_cache(config, [len(row.tokens_T) + max_new_tokens for row in rows])
    num_rows = cache.lengths_B.shape[0]
    last_BD = jnp.zeros((num_rows, config.text.embed_dim), config.dtype)
    lengths_B = np.zeros(num_rows, np.int32)
    lengths_B[: len(rows)] = [len(row.tokens_T) for row in rows]
    for chunk in split_prompts(
        rows, num_rows=num_rows, chunk_length=batching.prefill_length, pad_id=config.pad_id
    ):
        place_B = lengths_B - 1 - chunk.starts_B
        ends_B = np.where(place_B < chunk.lengths_B, place_B, -1)
        cache, last_BD = prefill_chunk(
            model, cache, last_BD, chunk.tokens_BT, chunk.positions_BT, ends_B, chunk.tiles_NCHW
        )
    return cache, last_BD


class _Transcript:
    """One answer in the making."""

    def __init__(self, pretrained: Pretrained, max_new_tokens: int):
        self._stop_ids = set(pretrained.generation.stop_ids)
        self._limit = max_new_tokens
        self._decoder = _decoder(pretrained.tokenizer)
        self._tokens: list[int] = []
        self._texts: list[str] = []

    @property
    def is_stopped(self) -> bool:
        return self._tokens[-1:] != [] and self._tokens[-1] in self._stop_ids

    @property
    def is_complete(self) -> bool:
        return self.is_stopped or len(self._tokens) == self._limit

    def add(self, token: int) -> str:
        """Append a token; return the text it adds."""
        self._tokens.append(token)
        if self._decoder is None:
            return ""
        text = "" if self.is_stopped else self._decoder.push([token])
        if self.is_complete:
            text += self._decoder.finish()
        self._texts.append(text)
        return text

    def answer(self) -> Answer:
        return Answer(
            tokens=self._tokens,
            text=None if self._decoder is None else "".join(self._texts),
            finish_reason="stop" if self.is_stopped else "length",
        )


def _decoder(tokenizer: Tokenizer | None) -> StreamDecoder | None:
    return None if tokenizer is None else StreamDecoder(tokenizer)
