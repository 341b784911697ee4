"""Choose the next token of every row from its logits; rows of a batch may differ in all numbers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a next token is drawn.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token and ignores the rest.
      top_p: keep, in falling order of probability, the tokens before which at most this much
        probability lies; in (0, 1], 1 keeps all. The likeliest token is always kept.
      top_k: keep only this many likeliest tokens, None keeps all. It acts before top_p.
      seed: of the random draws; the same seed, request and place in the list draw the same.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature ({self.temperature}) must be a finite number of at least 0; "
                "0 takes the likeliest token, 1 samples the model's own distribution."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p ({self.top_p}) must be above 0 and at most 1; 1 keeps every token."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(
                f"top_k ({self.top_k}) must be at least 1; leave it out to keep every token."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed ({self.seed}) must lie in 0..{2**32 - 1}.")


Numbers = jax.Array | np.ndarray


class SamplingRows(NamedTuple):
    """The numbers of `Sampling` for every row of a batch: other numbers are no new program.

    Attributes:
      temperature_B: float32.
      top_p_B: float32.
      top_k_B: int32; 0 keeps every token.
    """

    temperature_B: Numbers
    top_p_B: Numbers
    top_k_B: Numbers

    @staticmethod
    def of(rows: Sequence[Sampling]) -> "SamplingRows":
        """Collect the numbers of each row, as NumPy arrays."""
        return SamplingRows(
            np.asarray([row.temperature for row in rows], np.float32),
            np.asarray([row.top_p for row in rows], np.float32),
            np.asarray([min(row.top_k or 0, 2**31 - 1) for row in rows], np.int32),
        )


def row_keys(seeds_B: Numbers, rows_B: Numbers) -> jax.Array:
    """Derive one random key per row from its seed and its own number.

    A row's draws then depend on these only, never on its neighbours in a batch.

    Args:
      seeds_B: uint32 [B].
      rows_B: int32 [B], the number of each row.

    Returns:
      Typed random keys [B].
    """
    return jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(
        jnp.asarray(seeds_B, jnp.uint32), jnp.asarray(rows_B, jnp.int32)
    )


def sample(logits_BV: jax.Array, keys_B: jax.Array, rows: SamplingRows) -> jax.Array:
    """Draw one token per row.

    What no row of a batch asks for is not computed: neither draws where all are greedy, nor ranks
    where none has top_k or top_p.

    Args:
      logits_BV: float32 [B, V].
      keys_B: typed random keys [B], one for each row's draw; unused at temperature 0.
      rows: how each row draws.

    Returns:
      int32 [B] token ids. Equal logits are taken in order of the token id.
    """
    with jax.named_scope("sample"):
        greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        is_greedy_B = rows.temperature_B == 0
        is_cut_B = (rows.top_p_B < 1) | (rows.top_k_B > 0)

        def draw(logits_BV: jax.Array) -> jax.Array:
            # The largest becomes 0 first, so that no temperature, however small, overflows.
            scores_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
            warmth_B = jnp.where(is_greedy_B, 1.0, rows.temperature_B)
            scores_BV = scores_BV.astype(jnp.float32) / warmth_B[:, None]
            is_any_cut = jnp.any(is_cut_B & ~is_greedy_B)
            scores_BV = jax.lax.cond(
                is_any_cut,
                lambda s: keep_top_p(keep_top_k(s, rows.top_k_B), rows.top_p_B),
                lambda s: s,
                scores_BV,
            )
            drawn_B = jax.vmap(jax.random.categorical)(keys_B, scores_BV).astype(jnp.int32)
            return jnp.where(is_greedy_B, greedy_B, drawn_B)

        return jax.lax.cond(jnp.all(is_greedy_B), lambda _: greedy_B, draw, logits_BV)


def keep_top_k(scores_BV: jax.Array, top_k_B: Numbers) -> jax.Array:
    """Rule out all but the k largest scores of each row, the lower id first among equals.

    Args:
      scores_BV: float32.
      top_k_B: int32; 0, like V or more, keeps all.

    Returns:
      The scores with -inf in place of those ruled out.
    """
    vocab_size = scores_BV.shape[-1]
    wanted_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, vocab_size), vocab_size)

    def reaches(is_above_BV: jax.Array) -> jax.Array:
        return is_above_BV.sum(-1) >= wanted_B

    keys_BV, least_B = _threshold(scores_BV, reaches)
    is_above_BV, is_equal_BV = keys_BV > least_B[:, None], keys_BV == least_B[:, None]
    room_B = wanted_B - is_above_BV.sum(-1)
    is_kept_BV = is_above_BV | (is_equal_BV & (jnp.cumsum(is_equal_BV, -1) <= room_B[:, None]))
    return jnp.where(is_kept_BV, scores_BV, -jnp.inf)


def keep_top_p(scores_BV: jax.Array, top_p_B: Numbers) -> jax.Array:
    """Rule out the tail that follows more than `top_p` of the probability.

    A token stays while the probability strictly before it is at most top_p; the token that
    crosses the limit therefore stays, and so does the first. The lower id is first among equals.

    Args:
      scores_BV: float32 scores (log probabilities up to a constant).
      top_p_B: float32 in (0, 1]; 1 keeps all.

    Returns:
      The scores with -inf in place of those ruled out.
    """
    probability_BV = jax.nn.softmax(scores_BV, axis=-1)

    def exceeds(is_above_BV: jax.Array) -> jax.Array:
        return jnp.where(is_above_BV, probability_BV, 0).sum(-1) > top_p_B

    keys_BV, least_B = _threshold(scores_BV, exceeds)
    is_above_BV, is_equal_BV = keys_BV > least_B[:, None], keys_BV == least_B[:, None]
    before_B = jnp.where(is_above_BV, probability_BV, 0).sum(-1)
    each_B = jnp.where(is_equal_BV, probability_BV, 0).max(-1)
    place_BV = jnp.cumsum(is_equal_BV, -1) - 1  # among its equals
    before_BV = before_B[:, None] + place_BV * each_B[:, None]
    is_kept_BV = is_above_BV | (is_equal_BV & (before_BV <= top_p_B[:, None]))
    # A sum rounded above 1 must not cost the tail.
    return jnp.where(is_kept_BV | (top_p_B >= 1)[:, None], scores_BV, -jnp.inf)


def _threshold(
    scores_BV: jax.Array, holds: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Find the largest threshold at which a monotone condition on what reaches it still holds.

    Bit by bit, without sorting: 32 passes over the scores.

    Args:
      scores_BV: float32.
      holds: of bool [B, V], whether a score reaches the threshold, to bool [B]; what holds for some
        scores holds for more.

    Returns:
      uint32 keys [B, V] in the order of the scores, and the threshold [B] among them; 0, which
      everything reaches, where it never holds.
    """
    scores_BV = jnp.where(scores_BV == 0, 0.0, scores_BV)  # -0 is as likely
    bits_BV = jax.lax.bitcast_convert_type(scores_BV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    keys_BV = jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)

    def settle(i: jax.Array, found_B: jax.Array) -> jax.Array:
        tried_B = found_B | (sign >> i.astype(jnp.uint32))
        return jnp.where(holds(keys_BV >= tried_B[:, None]), tried_B, found_B)

    start_B = jnp.zeros(scores_BV.shape[0], jnp.uint32)
    return keys_BV, jax.lax.fori_loop(0, 32, settle, start_B)
