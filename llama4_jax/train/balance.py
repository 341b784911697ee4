"""How evenly routers use their experts: what a step reports of it, and the loss that evens it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llama4_jax.layers.feed_forward import RouterLoad


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class RouterBalance:
    """How evenly the routers of a batch use their experts; L are the mixture layers in order.

    Attributes:
        loss: float32 scalar: 1 when every expert gets the same share of tokens and of probability,
            at most the number of experts. Layers are averaged.
        tokens_LE: int32 tokens that chose each expert.
        largest_share_L: share of a layer's choices that its busiest expert gets.
        entropy_L: mean over tokens of the entropy of a router's softmax, in nats.
    """

    loss: jax.Array
    tokens_LE: jax.Array
    largest_share_L: jax.Array
    entropy_L: jax.Array


def balance_of_routers(load: RouterLoad, *, experts_per_token: int) -> RouterBalance:
    """Add up the load of a batch and compute its loss, E * sum over experts of share * probability.

    The share of choices is a count and has no gradient; the mean probability, a softmax of the
    logits, pulls the router towards experts that are chosen less. Padding is in neither.

    Args:
        load: of every mixture layer, each array with a leading L.
        experts_per_token: Experts that a token chooses.

    Source: arXiv 2101.03961, equations 4-6.
    """
    with jax.named_scope("balance_of_routers"):
        tokens_LE, probability_LE, entropy_L = (part.sum(1) for part in load)
        choices = jnp.maximum(tokens_LE[0].sum(), 1).astype(jnp.float32)
        tokens = choices / experts_per_token
        share_LE = tokens_LE / choices
        num_experts = tokens_LE.shape[1]
        return RouterBalance(
            loss=num_experts * jnp.mean(jnp.sum(share_LE * probability_LE / tokens, axis=-1)),
            tokens_LE=tokens_LE,
            largest_share_L=share_LE.max(-1),
            entropy_L=entropy_L / tokens,
        )
