"""Compute the next-token loss without holding all logits of a batch at once."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TokenSums:
    """Sums over the counted tokens of a batch, float32 scalars.

    Attributes:
        nll: Sum of weight times negative log-likelihood, in nats.
        squared_log_z: Sum of weight times the squared log-partition.
        correct: Sum of weight over tokens whose target has the largest logit.
        weight: Sum of weights.
    """

    nll: jax.Array
    squared_log_z: jax.Array
    correct: jax.Array
    weight: jax.Array

    def mean(self, value: jax.Array) -> jax.Array:
        """Divide one of the sums by the weight; zero when nothing was counted."""
        return value / jnp.where(self.weight > 0, self.weight, 1.0)


def sum_over_tokens(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> TokenSums:
    """Sum the cross entropy and its companions over tokens, in float32.

    The target's logit is selected by comparison and not by a gather, so that a vocabulary axis
    sharded over the mesh needs only a sum over devices.

    Args:
        logits_BTV: Logits of the next token.
        targets_BT: int32 ids of the next tokens; any id where the weight is zero.
        weights_BT: float32 weight of every target, zero to leave it out.
    """
    with jax.named_scope("sum_over_tokens"):
        logits_BTV = logits_BTV.astype(jnp.float32)
        weights_BT = weights_BT.astype(jnp.float32)
        log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
        ids_BTV = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits_BTV.shape[-1]), 2)
        is_target_BTV = ids_BTV == targets_BT[..., None]
        target_logit_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
        is_correct_BT = target_logit_BT >= jnp.max(logits_BTV, axis=-1)
        return TokenSums(
            nll=jnp.sum(weights_BT * (log_z_BT - target_logit_BT)),
            squared_log_z=jnp.sum(weights_BT * log_z_BT**2),
            correct=jnp.sum(weights_BT * is_correct_BT),
            weight=jnp.sum(weights_BT),
        )


def sum_in_chunks(
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    unembed: Callable[[jax.Array], jax.Array],
    chunks: int,
) -> TokenSums:
    """Sum the cross entropy over `chunks` pieces of the rows, one piece's logits at a time.

    Every piece's logits are recomputed in the backward pass, so that B*T*V/chunks float32 values
    are the most that is ever alive. Piece i holds the positions i, i + chunks, i + 2*chunks, ...:
    rows sharded over the mesh then stay where they are.

    Args:
        x_BTD: Final hidden states.
        targets_BT: int32 next tokens.
        weights_BT: float32 weights of the targets.
        unembed: Maps hidden states [B, t, D] to logits [B, t, V].
        chunks: Number of pieces; divides T.

    Raises:
        ValueError: `chunks` does not divide T.
    """
    length = targets_BT.shape[1]
    if length % chunks:
        raise ValueError(
            f"row length ({length}) must be divisible by chunks ({chunks}); choose a divisor."
        )
    if chunks == 1:
        return sum_over_tokens(unembed(x_BTD), targets_BT, weights_BT)

    def split(array: jax.Array) -> jax.Array:
        rows, _, *rest = array.shape
        return jnp.moveaxis(array.reshape(rows, length // chunks, chunks, *rest), 2, 0)

    @jax.checkpoint
    def add_piece(total: TokenSums, piece: tuple[jax.Array, ...]) -> tuple[TokenSums, None]:
        x, targets, weights = piece
        sums = sum_over_tokens(unembed(x), targets, weights)
        return jax.tree.map(jnp.add, total, sums), None

    zero = jnp.zeros((), jnp.float32)
    start = TokenSums(nll=zero, squared_log_z=zero, correct=zero, weight=zero)
    pieces = (split(x_BTD), split(targets_BT), split(weights_BT))
    total, _ = jax.lax.scan(add_piece, start, pieces)
    return total
