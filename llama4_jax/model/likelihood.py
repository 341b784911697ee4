"""Log probabilities of given tokens, for training, scoring and reinforcement learning alike.

All of them ask here, so that what a sampler and a trainer think of a token agrees by construction.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenLogprobs(NamedTuple):
    """What a model thinks of each target token.

    Attributes:
        logprob_BT: float32 natural logarithm of its probability.
        log_z_BT: float32 log-partition of the logits it was chosen among.
        is_best_BT: bool, whether no token is likelier.
    """

    logprob_BT: jax.Array
    log_z_BT: jax.Array
    is_best_BT: jax.Array


def logprobs_of_logits(logits_BTV: jax.Array, targets_BT: jax.Array) -> TokenLogprobs:
    """Score targets by logits, in float32.

    The target's logit is selected by comparison and not by a gather, so that a vocabulary axis
    sharded over the mesh needs only a sum over devices.

    Args:
        logits_BTV: logits of the next token.
        targets_BT: int32 ids of the next tokens.
    """
    with jax.named_scope("token_logprobs"):
        logits_BTV = logits_BTV.astype(jnp.float32)
        log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
        ids_BTV = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits_BTV.shape[-1]), 2)
        is_target_BTV = ids_BTV == targets_BT[..., None]
        target_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
        is_best_BT = target_BT >= jnp.max(logits_BTV, axis=-1)
        return TokenLogprobs(target_BT - log_z_BT, log_z_BT, is_best_BT)


def token_logprobs(
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    *,
    unembed: Callable[[jax.Array], jax.Array],
    chunks: int = 1,
) -> TokenLogprobs:
    """Score targets by hidden states, the logits of one chunk of the tokens at a time.

    Every chunk's logits are recomputed in a backward pass, so that B*T*V/chunks float32 values are
    the most that is ever alive. Chunk i holds the tokens i, i + chunks, i + 2*chunks, ...: rows
    sharded over the mesh then stay where they are.

    Args:
        x_BTD: final hidden states.
        targets_BT: int32 next tokens.
        unembed: maps hidden states [B, t, D] to logits [B, t, V], as `Llama4.unembed` does.
        chunks: number of chunks; divides T.

    Raises:
        ValueError: `chunks` does not divide T.
    """
    B, T = targets_BT.shape
    if T % chunks:
        raise ValueError(f"row length ({T}) must be divisible by chunks ({chunks})")
    if chunks == 1:
        return logprobs_of_logits(unembed(x_BTD), targets_BT)

    def split(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(B, T // chunks, chunks, *array.shape[2:]), 2, 0)

    @jax.checkpoint
    def score(chunk: tuple[jax.Array, jax.Array]) -> TokenLogprobs:
        x_BtD, targets_Bt = chunk
        return logprobs_of_logits(unembed(x_BtD), targets_Bt)

    found = jax.lax.map(score, (split(x_BTD), split(targets_BT)))
    return jax.tree.map(lambda chunk_CBt: jnp.moveaxis(chunk_CBt, 0, 2).reshape(B, T), found)
