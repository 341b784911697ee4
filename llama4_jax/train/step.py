"""Take one optimizer step, and measure a model on one batch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama4_jax.config.runs import LossConfig, RunConfig
from llama4_jax.train.loss import TokenSums, sum_in_chunks
from llama4_jax.train.optimizer import make_schedule
from llama4_jax.train.state import TrainState

Batch = Mapping[str, Any]
"""tokens_BT, targets_BT, positions_BT, segments_BT int32; loss_mask_BT float32 weights of the
targets; optionally tiles_NCHW float32, the images of the patch tokens in row-major order."""

Metrics = dict[str, jax.Array]


def batch_loss(model: Any, batch: Batch, *, config: LossConfig) -> tuple[jax.Array, TokenSums]:
    """Compute the training loss of a batch: the mean over counted targets plus the small terms.

    Returns:
        The float32 scalar to differentiate, and the sums it was made of.
    """
    hidden = model.encode(
        batch["tokens_BT"],
        tiles_NCHW=batch.get("tiles_NCHW"),
        positions_BT=batch["positions_BT"],
        segments_BT=batch["segments_BT"],
    )
    sums = sum_in_chunks(
        hidden.x_BTD,
        batch["targets_BT"],
        batch["loss_mask_BT"],
        unembed=model.unembed,
        chunks=config.chunks,
    )
    loss = sums.mean(sums.nll)
    if config.z_loss:
        loss += config.z_loss * sums.mean(sums.squared_log_z)
    return loss, sums


def make_train_step(
    run: RunConfig, optimizer: optax.GradientTransformationExtraArgs
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Compile the training step of a run.

    The state that goes in is given up (donated): its memory holds the state that comes out.
    Gradients carry the shardings of their parameters, and so do the moments and the update.

    Returns:
        (state, batch) -> (next state, float32 scalars "loss", "nll", "accuracy", "tokens",
        "gradient_norm" and "learning_rate").
    """
    schedule = make_schedule(run.optimizer, steps=run.steps)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_of(model: Any) -> tuple[jax.Array, TokenSums]:
            return batch_loss(model, batch, config=run.loss)

        (loss, sums), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.model)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.model)
            model = optax.apply_updates(state.model, updates)
        metrics = {
            "loss": loss,
            "nll": sums.mean(sums.nll),
            "accuracy": sums.mean(sums.correct),
            "tokens": sums.weight,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(step=state.step + 1, model=model, opt_state=opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def make_eval_step(config: LossConfig) -> Callable[[Any, Batch], TokenSums]:
    """Compile the measurement of a model on one batch: (model, batch) -> sums over its targets."""

    def measure(model: Any, batch: Batch) -> TokenSums:
        return batch_loss(model, batch, config=config)[1]

    return jax.jit(measure)
