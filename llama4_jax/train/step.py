"""Take one optimizer step, and measure a model on one batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama4_jax.config.runs import LossConfig, RunConfig
from llama4_jax.train.balance import RouterBalance, balance_of_routers, move_biases
from llama4_jax.train.loss import TokenSums, sum_in_chunks
from llama4_jax.train.optimizer import make_schedule
from llama4_jax.train.state import TrainState

Batch = Mapping[str, Any]
"""tokens_BT, targets_BT, positions_BT, segments_BT int32; loss_mask_BT float32 weights of the
targets; optionally tiles_NCHW float32, the images of the patch tokens in row-major order."""

Metrics = dict[str, jax.Array]


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
    """Compute the training loss of a batch.

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
    sums = sum_in_chunks(
        hidden.x_BTD,
        batch["targets_BT"],
        batch["loss_mask_BT"],
        unembed=model.unembed,
        chunks=config.chunks,
    )
    total, balance = sums.mean(sums.nll), None
    if config.z_loss:
        total += config.z_loss * sums.mean(sums.squared_log_z)
    if hidden.router_load is not None:
        experts_per_token = model.config.text.experts_per_token
        balance = balance_of_routers(hidden.router_load, experts_per_token=experts_per_token)
        if config.balance:
            total += config.balance * balance.loss
    return BatchLoss(total=total, sums=sums, balance=balance)


def make_train_step(
    run: RunConfig, optimizer: optax.GradientTransformationExtraArgs
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Compile the training step of a run.

    The state that goes in is given up (donated): its memory holds the state that comes out.
    Gradients carry the shardings of their parameters, and so do the moments and the update.

    Returns:
        (state, batch) -> (next state, float32 scalars "loss", "nll", "accuracy", "tokens",
        "gradient_norm" and "learning_rate"; and with experts "balance", "largest_expert_share" and
        "router_entropy", and by mixture layer "router/tokens" int32 [L, E],
        "router/largest_share" [L] and "router/entropy" [L]).
    """
    schedule = make_schedule(run.optimizer, steps=run.steps)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_of(model: Any) -> tuple[jax.Array, BatchLoss]:
            loss = batch_loss(model, batch, config=run.loss, remat=run.remat)
            return loss.total, loss

        (_, loss), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.model)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.model)
            model = optax.apply_updates(state.model, updates)
            if loss.balance is not None and (rate := run.optimizer.balance_bias_rate):
                model = move_biases(model, loss.balance.tokens_LE, rate=rate)
        sums = loss.sums
        metrics = {
            "loss": loss.total,
            "nll": sums.mean(sums.nll),
            "accuracy": sums.mean(sums.correct),
            "tokens": sums.weight,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
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
        return TrainState(step=state.step + 1, model=model, opt_state=opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def make_eval_step(config: LossConfig) -> Callable[[Any, Batch], TokenSums]:
    """Compile the measurement of a model on one batch: (model, batch) -> sums over its targets."""

    def measure(model: Any, batch: Batch) -> TokenSums:
        return batch_loss(model, batch, config=config).sums

    return jax.jit(measure)
