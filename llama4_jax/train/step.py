"""Take one optimizer step of any objective, and measure a model on one batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama4_jax.config.runs import LossConfig, RunConfig
from llama4_jax.train.balance import move_biases
from llama4_jax.train.loss import TokenSums
from llama4_jax.train.objective import Batch, Metrics, Objective, batch_loss, pretraining
from llama4_jax.train.optimizer import make_schedule
from llama4_jax.train.state import TrainState
from llama4_jax.train.trainable import Trainable, all_parameters, combine, partition


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    trainable: Trainable = all_parameters,
    schedule: optax.Schedule | None = None,
    after_update: Callable[[Any, Metrics], Any] | None = None,
    seed: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Compile a training step.

    The state that goes in is given up (donated): its memory holds the state that comes out.
    Gradients carry the shardings of their parameters, and so do the moments and the update.

    Args:
        objective: What is minimised.
        optimizer: Made for the trained parameters, like the state (`start_state`).
        trainable: Which parameters are trained; the others have neither gradient nor moments.
        schedule: Of the learning rate, for the metrics.
        after_update: (model, metrics) -> model, a rule beside the gradient.
        seed: Of the keys that the objective gets, one for each step.

    Returns:
        (state, batch) -> (next state, the objective's metrics with "loss", "gradient_norm" and, if
        there is a schedule, "learning_rate").
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trained, frozen = partition(state.model, trainable)
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_of(trained: Any) -> tuple[jax.Array, Metrics]:
            return objective(combine(trained, frozen), batch, key)

        (loss, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
            model = combine(optax.apply_updates(trained, updates), frozen)
            if after_update is not None:
                model = after_update(model, metrics)
        metrics = {"loss": loss, **metrics, "gradient_norm": optax.tree.norm(gradients)}
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        return TrainState(step=state.step + 1, model=model, opt_state=opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def pretraining_step(
    run: RunConfig, optimizer: optax.GradientTransformationExtraArgs
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Compile the training step of a run: next-token loss, balance biases moved if it asks so."""
    rate = run.optimizer.balance_bias_rate

    def move(model: Any, metrics: Metrics) -> Any:
        return move_biases(model, metrics["router/tokens"], rate=rate)

    return make_train_step(
        pretraining(run.loss, remat=run.remat),
        optimizer,
        schedule=make_schedule(run.optimizer, steps=run.steps),
        after_update=move if rate else None,
        seed=run.seed,
    )


def make_eval_step(config: LossConfig) -> Callable[[Any, Batch], TokenSums]:
    """Compile the measurement of a model on one batch: (model, batch) -> sums over its targets."""

    def measure(model: Any, batch: Batch) -> TokenSums:
        return batch_loss(model, batch, config=config).sums

    return jax.jit(measure)
