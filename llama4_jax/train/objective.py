"""Objectives: pure functions of model, batch and key to a loss and metrics.

`make_train_step` takes any of them: pretraining is here, others are made by who needs them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from llama4_jax.config.runs import LossConfig
from llama4_jax.model.likelihood import token_logprobs
from llama4_jax.train.balance import RouterBalance, balance_of_routers
from llama4_jax.train.loss import TokenSums, sum_over_tokens

Batch = Mapping[str, Any]
"""tokens_BT, targets_BT, positions_BT, segments_BT int32; loss_mask_BT float32 weights of the
targets; optionally tiles_NCHW float32, the images of the patch tokens in row-major order. An
objective may ask for more."""

Metrics = dict[str, jax.Array]

Objective = Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]]
"""(model, batch, random key) -> float32 scalar to differentiate, and metrics."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class BatchLoss:
    """What a batch costs.

    Attributes:
        total: float32 scalar to differentiate: the mean over counted targets plus small terms.
        sums: The sums over targets it was made of.
        balance: How evenly the experts are used, or None for a model without experts.
    """

    total: jax.Array
    sums: TokenSums
    balance: RouterBalance | None


def batch_loss(model: Any, batch: Batch, *, config: LossConfig, remat: bool = False) -> BatchLoss:
    """Compute the next-token loss of a batch.

    Args:
        model: A `Llama4`.
        batch: The batch.
        config: Terms of the loss.
        remat: Recompute activations in the backward pass instead of keeping them.
    """
    hidden = model.encode(
        batch["tokens_BT"],
        batch.get("tiles_NCHW"),
        positions_BT=batch["positions_BT"],
        segments_BT=batch["segments_BT"],
        remat=remat,
    )
    found = token_logprobs(
        hidden.x_BTD, batch["targets_BT"], unembed=model.unembed, chunks=config.chunks
    )
    sums = sum_over_tokens(found, batch["loss_mask_BT"])
    total, balance = sums.mean(sums.nll), None
    if config.z_loss:
        total += config.z_loss * sums.mean(sums.squared_log_z)
    if hidden.router_load is not None:
        experts_per_token = model.config.text.experts_per_token
        balance = balance_of_routers(hidden.router_load, experts_per_token=experts_per_token)
        if config.balance:
            total += config.balance * balance.loss
    return BatchLoss(total=total, sums=sums, balance=balance)


def pretraining(config: LossConfig, *, remat: bool = False) -> Objective:
    """Return the objective of next-token prediction; see `batch_loss`.

    Its metrics are "nll", "accuracy" and "tokens"; and with experts "balance",
    "largest_expert_share" and "router_entropy", and by mixture layer "router/tokens" int32 [L, E],
    "router/largest_share" [L] and "router/entropy" [L].
    """

    def objective(model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del key
        loss = batch_loss(model, batch, config=config, remat=remat)
        sums = loss.sums
        metrics = {
            "nll": sums.mean(sums.nll),
            "accuracy": sums.mean(sums.correct),
            "tokens": sums.weight,
        }
        if (balance := loss.balance) is not None:
            metrics |= {
                "balance": balance.loss,
                "largest_expert_share": balance.largest_share_L.mean(),
                "router_entropy": balance.entropy_L.mean(),
                "router/tokens": balance.tokens_LE,
                "router/largest_share": balance.largest_share_L,
                "router/entropy": balance.entropy_L,
            }
        return loss.total, metrics

    return objective
