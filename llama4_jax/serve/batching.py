"""How much of a job is done at once: none of it changes a result."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax

from llama4_jax.config import ModelConfig
from llama4_jax.model import Cache
from llama4_jax.serve.batches import group
from llama4_jax.serve.chunks import bucket

# Compiled, so that each device of a mesh makes its own part and no other.
_create_cache = jax.jit(
    Cache.create, static_argnums=0, static_argnames=("batch_size", "max_length", "dtype")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """Sizes that trade memory for speed.

    Attributes:
      window: requests that are sorted by length together; results are delivered in the order of
        the requests, window by window.
      rows: most requests in a batch.
      cache_tokens: most tokens a batch's cache holds, all rows together; a longer request is
        served alone.
      prefill_length: tokens of each request read per step, a power of two.
      steps: tokens chosen per dispatch; text streams in lumps of as many tokens.
    """

    window: int = 256
    rows: int = 8
    cache_tokens: int = 1 << 17
    prefill_length: int = 512
    steps: int = 8

    def __post_init__(self):
        for name in ("window", "rows", "cache_tokens", "prefill_length", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1.")
        if self.prefill_length & (self.prefill_length - 1):
            raise ValueError(
                f"prefill_length ({self.prefill_length}) must be a power of two; "
                f"choose {bucket(self.prefill_length)}."
            )

    def batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield the batches of rows of these lengths, as indices."""
        return group(lengths, max_rows=self.rows, max_tokens=self.cache_tokens, window=self.window)

    def make_cache(self, config: ModelConfig, lengths: Sequence[int]) -> Cache:
        """Make an empty cache for rows of these lengths, its sizes rounded up to powers of two.

        Rounding keeps the number of compiled programs small; a whole number of rows also lets
        the data axis of a mesh divide them.
        """
        return _create_cache(
            config.text,
            batch_size=bucket(len(lengths)),
            max_length=min(bucket(max(lengths), floor=64), config.text.max_positions),
            dtype=config.dtype,
        )
