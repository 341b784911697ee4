"""Choose the next token of every row from its logits; rows of a batch may differ in all numbers."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.serve.options import Options

Numbers = jax.Array | np.ndarray
NOTHING = -1


class DrawRows(NamedTuple):
    """How every row of a batch draws: arrays, so that other numbers are no new program.

    Attributes:
      temperature_B: float32.
      top_p_B: float32.
      min_p_B: float32.
      top_k_B: int32; 0 keeps every token.
      keys_B2: uint32, the key of each row's answer.
    """

    temperature_B: Numbers
    top_p_B: Numbers
    min_p_B: Numbers
    top_k_B: Numbers
    keys_B2: Numbers

    @staticmethod
    def of(rows: Sequence[Options], keys: Sequence[np.ndarray]) -> "DrawRows":
        """Collect the numbers of each row, resolved, as NumPy arrays."""
        return DrawRows(
            np.asarray([row.temperature for row in rows], np.float32),
            np.asarray([row.top_p for row in rows], np.float32),
            np.asarray([row.min_p for row in rows], np.float32),
            np.asarray([row.top_k for row in rows], np.int32),
            np.asarray(keys, np.uint32).reshape(len(rows), 2),
        )


class Changes(NamedTuple):
    """What happens to the logits of single tokens; I of them in each row.

    Attributes:
      ids_BI: int32; one beyond the vocabulary is padding.
      bias_BI: float32, added first.
      factor_BI: float32, divides a positive logit and multiplies a negative one then.
      minus_BI: float32, subtracted last.
    """

    ids_BI: Numbers
    bias_BI: Numbers
    factor_BI: Numbers
    minus_BI: Numbers


def answer_key(seed: int, *numbers: int) -> np.ndarray:
    """Return the random key of one answer, uint32 [2], from its seed and what tells it apart.

    Its draws then depend on these and on their positions only, never on neighbours in a batch.
    """
    text = ",".join(map(str, (seed, *numbers)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return np.frombuffer(digest, np.uint32)


def position_keys(keys_B2: Numbers, positions_B: Numbers) -> jax.Array:
    """Return typed random keys [B] of draws at these int32 positions."""
    keys_B = jax.random.wrap_key_data(jnp.asarray(keys_B2), impl="threefry2x32")
    return jax.vmap(jax.random.fold_in)(keys_B, jnp.asarray(positions_B))


def change_logits(logits_BV: jax.Array, changes: Changes) -> jax.Array:
    """Apply biases and penalties to float32 logits."""
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    ids_BI = jnp.asarray(changes.ids_BI)
    found_BI = logits_BV.at[rows_B1, ids_BI].get(mode="fill", fill_value=0) + changes.bias_BI
    factor_BI = changes.factor_BI
    found_BI = jnp.where(found_BI > 0, found_BI / factor_BI, found_BI * factor_BI)
    return logits_BV.at[rows_B1, ids_BI].set(found_BI - changes.minus_BI, mode="drop")


def mask_logits(logits_BV: jax.Array, allowed_BW: Numbers) -> jax.Array:
    """Rule out every token whose bit is not set: bit i % 32 of uint32 word i // 32."""
    ids_V = jnp.arange(logits_BV.shape[-1])
    word_BV = jnp.asarray(allowed_BW)[:, ids_V // 32]
    is_allowed_BV = (word_BV >> (ids_V % 32).astype(jnp.uint32)) & 1 == 1
    return jnp.where(is_allowed_BV, logits_BV, -jnp.inf)


def sample(logits_BV: jax.Array, positions_B: Numbers, rows: DrawRows) -> jax.Array:
    """Draw one token per row.

    What no row of a batch asks for is not computed: neither draws where all are greedy, nor ranks
    where none has top_p or top_k.

    Args:
      logits_BV: float32 [B, V].
      positions_B: int32 [B], where the drawn tokens will stand.
      rows: how each row draws.

    Returns:
      int32 [B] token ids; NOTHING where a logit is NaN, which would draw any token. Equal logits
      are taken in order of the token id.
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
            scores_BV = jax.lax.cond(
                jnp.any(is_cut_B & ~is_greedy_B),
                lambda s: keep_top_p(keep_top_k(s, rows.top_k_B), rows.top_p_B),
                lambda s: s,
                scores_BV,
            )
            scores_BV = jnp.where(scores_BV >= jnp.log(rows.min_p_B)[:, None], scores_BV, -jnp.inf)
            keys_B = position_keys(rows.keys_B2, positions_B)
            drawn_B = jax.vmap(jax.random.categorical)(keys_B, scores_BV).astype(jnp.int32)
            return jnp.where(is_greedy_B, greedy_B, drawn_B)

        token_B = jax.lax.cond(jnp.all(is_greedy_B), lambda _: greedy_B, draw, logits_BV)
        largest_B = jnp.take_along_axis(logits_BV, greedy_B[:, None], axis=-1)[:, 0]
        return jnp.where(jnp.isnan(largest_B), NOTHING, token_B)  # NaN counts as the largest


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
