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
    Gradients carry the shardings of their parameters, and so do the moments and the update. A loss
    or gradient norm that is not finite leaves parameters, moments and what `after_update` changes
    as they were, and is counted: a branch, since to choose between old and new arrays would copy
    the old ones.

    Args:
        objective: What is minimised.
        optimizer: Made for the trained parameters, like the state (`start_state`); is given the
            gradients' norm as `norm`.
        trainable: Which parameters are trained; the others have neither gradient nor moments.
        schedule: Of the learning rate, for the metrics.
        after_update: (model, metrics) -> model, a rule beside the gradient.
        seed: Of the keys that the objective gets, one for each step.

    Returns:
        (state, batch) -> (next state, the objective's metrics with "loss", "gradient_norm",
        "skipped", "skipped_in_a_row" and, if there is a schedule, "learning_rate").
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trained, frozen = partition(state.model, trainable)
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_of(trained: Any) -> tuple[jax.Array, Metrics]:
            return objective(combine(trained, frozen), batch, key)

        (loss, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
        norm = optax.tree.norm(gradients)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def update(model: Any, opt_state: Any) -> tuple[Any, Any]:
            trained, frozen = partition(model, trainable)
            updates, opt_state = optimizer.update(gradients, opt_state, trained, norm=norm)
            model = combine(optax.apply_updates(trained, updates), frozen)
            return model if after_update is None else after_update(model, metrics), opt_state

        following = _advance(state, update, is_finite)
        metrics = {"loss": loss, **metrics, "gradient_norm": norm}
        metrics |= {name: getattr(following, name) for name in ("skipped", "skipped_in_a_row")}
        if schedule is not None:
            rate = schedule(state.step - state.skipped)
            metrics["learning_rate"] = jnp.asarray(rate, jnp.float32)
        return following, metrics

    return jax.jit(step, donate_argnums=0)


def _advance(
    state: TrainState, update: Callable[[Any, Any], tuple[Any, Any]], is_finite: jax.Array
) -> TrainState:
    """Update model and moments, or leave them and count the step as skipped."""
    given = state.model, state.opt_state
    with jax.named_scope("update"):
        model, opt_state = jax.lax.cond(is_finite, update, lambda *kept: kept, *given)
    return TrainState(
        step=state.step + 1,
        skipped=state.skipped + ~is_finite,
        skipped_in_a_row=jnp.where(is_finite, 0, state.skipped_in_a_row + 1),
        model=model,
        opt_state=opt_state,
    )


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
