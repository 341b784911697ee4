"""How large an engine is: rows, tokens of a step, pages. None of it changes an answer."""

import dataclasses
import math
from typing import Literal

import jax

from llama4_jax.cache.paged import KVCache, page_bytes
from llama4_jax.config import ModelConfig
from llama4_jax.config.pattern import layer_pattern
from llama4_jax.serve.plan import CacheLayout, bucket

PAGE = 64  # tokens; whole tiles of every kernel
CACHE_BYTES = 1 << 30  # where a device does not say how much memory it has
CHUNK_SHARE = 0.4  # of the bytes, for chunks that rows which ended leave to those that begin alike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """All that an engine will ever do, if that is known.

    Attributes:
      choices: answers.
      tokens: of all of them, prompts included.
    """

    choices: int
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes that trade memory for speed, and ways to save either.

    Attributes:
      max_rows: most answers in the making at a time.
      step_tokens: most tokens that a step reads.
      max_context: most tokens of a row, prompt and answer; None is the model's positions.
      cache_bytes: of keys and values, over all devices; None is most of what the devices have left,
        or 1 GiB where they do not say.
      page_size: tokens of a page; None chooses it.
      kv_cache: what keys and values are stored in: "auto" is the model's dtype.
      speculate: "ngram" drafts tokens from what was read before and verifies them together.
      keep_prefixes: whether what was computed stays for requests that begin alike.
      loops: most tokens that the device draws of a row by itself while nobody waits and no answer
        needs the host between two tokens; tokens then come in lumps of as many.
      feature_tiles: image tiles whose features are kept.
    """

    max_rows: int = 32
    step_tokens: int = 512
    max_context: int | None = None
    cache_bytes: int | None = None
    page_size: int | None = None
    kv_cache: KVCache = "auto"
    speculate: Literal["none", "ngram"] = "none"
    keep_prefixes: bool = True
    loops: int = 8
    feature_tiles: int = 64

    def __post_init__(self) -> None:
        for name in ("max_rows", "step_tokens", "max_context", "cache_bytes", "page_size",
                     "feature_tiles", "loops"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1.")
        for name, known in (
            ("kv_cache", ("auto", "int8", "fp8")),
            ("speculate", ("none", "ngram")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {known}.")
        if self.step_tokens < self.max_rows:
            raise ValueError(
                f"step_tokens ({self.step_tokens}) must be at least max_rows ({self.max_rows}), "
                "a token for every row."
            )

    def context(self, model: ModelConfig) -> int:
        """Return the most tokens of a row.

        Raises:
          ValueError: the model has fewer positions.
        """
        limit = model.text.max_positions
        if self.max_context is not None and self.max_context > limit:
            raise ValueError(
                f"max_context ({self.max_context}) exceeds the model's {limit} positions."
            )
        return self.max_context or limit

    def layout(
        self, model: ModelConfig, *, devices: int = 1, work: Work | None = None
    ) -> CacheLayout:
        """Divide the bytes of the cache into pages.

        Chunk layers get pages for one chunk of every row, the spare one that admission leaves each
        and those of a step, or what the bytes allow; the rest goes to layers that see everything.
        Where prefixes are kept, they get CHUNK_SHARE of the bytes if that is more; less, if a row
        of the whole context fits only then.

        Args:
          model: whose cache it is.
          devices: over which each page is divided.
          work: all that there will ever be, if that is known; saves memory.

        Raises:
          ValueError: pages do not divide a chunk, or not one row fits.
        """
        text, context = model.text, self.context(model)
        page = self.page_size or largest_page(text.chunk_size, devices)
        of_whole, of_chunk = page_bytes(
            text, page_size=page, dtype=model.dtype, kv_cache=self.kv_cache
        )
        kinds = layer_pattern(text).kinds
        has_whole = any(kind.visibility.chunk_size is None for kind in kinds)
        chunk = text.chunk_size if any(kind.visibility.chunk_size for kind in kinds) else None
        budget = self.cache_bytes or _left()
        per_chunk = 0 if chunk is None else -(-min(chunk, context) // page)
        rows = self.max_rows if work is None else min(self.max_rows, work.choices)
        wanted = rows * (per_chunk + 1) + -(-self.step_tokens // page)
        most = None  # pages of all tokens, the last one of each row in part
        if work is not None:
            most = bucket(-(-work.tokens // page) + work.choices)
            wanted = min(bucket(wanted), most)
        chunk_pages = 0 if chunk is None else min(wanted, budget // 2 // of_chunk)
        if self.keep_prefixes and work is None and chunk is not None and has_whole:
            share, of_context = int(CHUNK_SHARE * budget), -(-context // page) * of_whole
            if of_context < budget:
                share = min(share, budget - of_context)
            chunk_pages = max(chunk_pages, share // of_chunk)
        whole_pages = (budget - chunk_pages * of_chunk) // of_whole if has_whole else None
        if whole_pages is not None and most is not None:
            whole_pages = min(whole_pages, most)
        least = per_chunk if most is None else min(per_chunk, most)
        if chunk_pages < least or (whole_pages is not None and whole_pages < 1):
            raise ValueError(
                f"cache_bytes ({budget:,}) hold no row; a chunk takes {per_chunk * of_chunk:,} "
                f"and every further page {of_whole:,}."
            )
        return CacheLayout(
            page_size=page,
            chunk_size=chunk,
            whole_pages=whole_pages,
            chunk_pages=chunk_pages,
            keep_prefixes=self.keep_prefixes,
        )


def largest_page(chunk_size: int | None, devices: int) -> int:
    """Return the largest page of at most PAGE slots on each device that divides a chunk."""
    page = PAGE * devices
    return page if chunk_size is None else math.gcd(page, chunk_size)


def _left() -> int:
    """Return nine tenths of the bytes that are free on all devices."""
    total = 0
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return CACHE_BYTES
        total += stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return total * 9 // 10
