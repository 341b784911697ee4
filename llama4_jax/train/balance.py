"""How evenly routers use their experts: what a step reports of it, and what evens it.

Two things do: a loss, whose gradient also disturbs what the router learns from the text, and a bias
on the choice of experts, which no gradient touches.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.config.model import TextConfig
from llama4_jax.config.pattern import layer_pattern
from llama4_jax.layers.feed_forward import RouterLoad
from llama4_jax.layers.param import leaf_name


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


def move_biases(model: Any, tokens_LE: jax.Array, *, rate: float) -> Any:
    """Raise the balance bias of experts with less than the mean load, lower that of the others.

    bias += rate * sign(mean load - load): a step of one length, whatever the imbalance, so that a
    batch that is unlike the others does little.

    Args:
        model: A `Llama4` with balance biases.
        tokens_LE: tokens of the whole batch that chose each expert, by mixture layer.
        rate: Length of the step.

    Raises:
        ValueError: The model has no balance biases.

    Source: arXiv 2408.15664, algorithm 1.
    """
    rows = _rows_of_biases(model.config.text)
    load_LE = tokens_LE.astype(jnp.float32)
    change_LE = rate * jnp.sign(load_LE.mean(-1, keepdims=True) - load_LE)

    def move(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        own = rows.pop(leaf_name(path), None)
        return leaf if own is None else leaf + change_LE[np.asarray(own)].reshape(leaf.shape)

    moved = jax.tree_util.tree_map_with_path(move, model)
    if rows:
        raise ValueError(f"the model has no {next(iter(rows))}; build it with balance_bias")
    return moved


def _rows_of_biases(text: TextConfig) -> dict[str, list[int]]:
    """Return, for the name of each bias array, the rows of [L, E] arrays that it stands for."""
    pattern = layer_pattern(text)
    rows: dict[str, list[int]] = {}
    for row, layer in enumerate(text.moe_layers):
        rows.setdefault(f"decoder.{pattern.name(layer)[0]}.ffn.bias_E", []).append(row)
    return rows
