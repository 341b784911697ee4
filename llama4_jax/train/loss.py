"""Sums over the tokens of a batch, weighted, from which losses and metrics are made."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llama4_jax.model.likelihood import TokenLogprobs


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


def sum_over_tokens(found: TokenLogprobs, weights_BT: jax.Array) -> TokenSums:
    """Sum the cross entropy and its companions over tokens, in float32.

    Args:
        found: What the model thinks of the targets.
        weights_BT: float32 weight of every target, zero to leave it out.
    """
    weights_BT = weights_BT.astype(jnp.float32)
    return TokenSums(
        nll=-jnp.sum(weights_BT * found.logprob_BT),
        squared_log_z=jnp.sum(weights_BT * found.log_z_BT**2),
        correct=jnp.sum(weights_BT * found.is_best_BT),
        weight=jnp.sum(weights_BT),
    )
