"""Hold what a training step changes: the model, the optimizer's moments and the step number."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama4_jax.train.trainable import Trainable, all_parameters, partition


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """An immutable training state, a pytree.

    Attributes:
        step: int32 scalar, steps taken: batches seen.
        skipped: int32 scalar, steps among them that changed nothing, as a number was not finite.
        skipped_in_a_row: int32 scalar, how many of the last steps did so.
        model: The model, an immutable pytree of parameters.
        opt_state: State of the optimizer; its moments are shaped and sharded like the parameters
            that are trained.
    """

    step: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    model: Any
    opt_state: Any


def start_state(
    model: Any,
    *,
    optimizer: optax.GradientTransformationExtraArgs,
    trainable: Trainable = all_parameters,
) -> TrainState:
    """Return the state at step 0 of a model, fresh or trained before.

    If the model is committed to one device, so is all of the state, as a step returns it: else the
    second step would compile once more.

    Args:
        model: The model.
        optimizer: Decides the shape of the optimizer state.
        trainable: Which parameters are trained, and so have moments.
    """
    trained, _ = partition(model, trainable)
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    state = TrainState(
        step=step,
        skipped=skipped,
        skipped_in_a_row=in_a_row,
        model=model,
        opt_state=optimizer.init(trained),
    )
    leaf = jax.tree.leaves(model)[0]
    if isinstance(leaf, jax.core.Tracer) or not leaf.committed or len(leaf.devices()) > 1:
        return state
    return jax.device_put(state, leaf.sharding)


def initial_state(
    build: Callable[[], Any], optimizer: optax.GradientTransformationExtraArgs
) -> Callable[[], TrainState]:
    """Return the function that makes the state at step 0.

    Under `jax.jit` every array is made in its own shards, so that no device holds more than its
    part; under `jax.eval_shape` it costs nothing and tells shapes, dtypes and shardings.

    Args:
        build: Returns a freshly initialised model.
        optimizer: Decides the shape of the optimizer state.
    """
    return lambda: start_state(build(), optimizer=optimizer)


def name_leaves(tree: Any) -> dict[str, Any]:
    """List the leaves of a tree under dotted names, as "model.embed.table_VD.value"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def replace_leaves(tree: Any, named: dict[str, Any]) -> Any:
    """Return `tree` with the leaves that `name_leaves` lists replaced by those of `named`.

    Raises:
        ValueError: The names differ.
    """
    expected = list(name_leaves(tree))
    if set(expected) != set(named):
        missing = sorted(set(expected) - set(named))[:3]
        surplus = sorted(set(named) - set(expected))[:3]
        raise ValueError(
            f"the saved state does not fit this model: missing {missing}, surplus {surplus}; "
            "train in a new workdir."
        )
    return jax.tree.unflatten(jax.tree.structure(tree), [named[name] for name in expected])
