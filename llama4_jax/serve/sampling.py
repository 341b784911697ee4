"""Choose the next token of every row from its logits."""

import dataclasses

import jax
import jax.numpy as jnp


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


def row_keys(seed: int, rows_B) -> jax.Array:
    """Derive one random key per row from the seed and the row's own number.

    A row's draws then depend on its number only, never on its neighbours in a batch.

    Args:
      seed: of the whole run.
      rows_B: int32 [B], the number of each row.

    Returns:
      Typed random keys [B].
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), rows_B)


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Draw one token per row.

    Args:
      logits_BV: float32 [B, V].
      keys_B: typed random keys [B], one for each row's draw; unused at temperature 0.
      sampling: the rule; `sampling.seed` has already gone into the keys.

    Returns:
      int32 [B] token ids. Equal logits are taken in order of the token id.
    """
    with jax.named_scope("sample"):
        if sampling.temperature == 0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        # The largest becomes 0 first, so that no temperature, however small, overflows.
        scores_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
        scores_BV = scores_BV.astype(jnp.float32) / sampling.temperature
        draw = jax.vmap(jax.random.categorical)
        if sampling.top_k is None and sampling.top_p == 1:
            return draw(keys_B, scores_BV).astype(jnp.int32)
        vocab_size = logits_BV.shape[-1]
        kept = vocab_size if sampling.top_k is None else min(sampling.top_k, vocab_size)
        ranked_BR, token_BR = jax.lax.top_k(scores_BV, kept)
        place_B = draw(keys_B, keep_top_p(ranked_BR, sampling.top_p))
        return jnp.take_along_axis(token_BR, place_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


def keep_top_p(ranked_BR: jax.Array, top_p: float) -> jax.Array:
    """Rule out the tail that follows more than `top_p` of the probability.

    A token stays while the probability strictly before it is at most top_p; the token that
    crosses the limit therefore stays, and so does the first.

    Args:
      ranked_BR: scores (log probabilities up to a constant) in falling order.
      top_p: in (0, 1].

    Returns:
      The scores with -inf in place of those ruled out.
    """
    if top_p == 1:  # a sum rounded above 1 must not cost the tail
        return ranked_BR
    probability_BR = jax.nn.softmax(ranked_BR, axis=-1)
    before_BR = jnp.cumsum(probability_BR, axis=-1) - probability_BR
    return jnp.where(before_BR <= top_p, ranked_BR, -jnp.inf)
