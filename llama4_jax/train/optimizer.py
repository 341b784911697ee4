"""Build the optimizer and its learning-rate schedule from a configuration."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama4_jax.config.runs import OptimizerConfig
from llama4_jax.layers.param import Untrained

_MATRIX = re.compile(r"(?:^|_)(?:w|router)_[A-Za-z_]*$")


def make_schedule(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step.

    Linear from zero to the peak over the warm-up; then a half cosine to the final rate
    ("cosine"), or the peak until the last `decay_fraction` of the steps and a straight line to
    the final rate ("wsd": warm up, stay, decay).

    Args:
        config: Peak, warm-up and shape.
        steps: All steps of the run; the final rate is reached at this step.

    Source: cosine: arXiv 1608.03983; wsd: arXiv 2404.06395, section 4.
    """
    peak = config.peak_learning_rate
    final = peak * config.final_learning_rate_ratio
    warmup = optax.schedules.linear_schedule(0.0, peak, config.warmup_steps)
    if config.schedule == "cosine":
        fall = optax.schedules.cosine_decay_schedule(
            peak, steps - config.warmup_steps, alpha=config.final_learning_rate_ratio
        )
        return optax.schedules.join_schedules([warmup, fall], [config.warmup_steps])
    decay_steps = max(1, round(steps * config.decay_fraction))
    decay_start = max(config.warmup_steps, steps - decay_steps)
    return optax.schedules.join_schedules(
        [
            warmup,
            optax.schedules.constant_schedule(peak),
            optax.schedules.linear_schedule(peak, final, steps - decay_start),
        ],
        [config.warmup_steps, decay_start],
    )


def is_matrix(path: tuple[Any, ...]) -> bool:
    """Tell by its name whether a parameter is a weight matrix.

    Matrices are named `w_...`, `..._w_...` or `router_...`; norm scales, biases, embeddings and
    position tables are not. The number of axes cannot decide it: stacked layers give every
    parameter one more.

    Args:
        path: Key path of the parameter, as `jax.tree_util.tree_map_with_path` gives it.
    """
    names = (getattr(key, "name", getattr(key, "key", None)) for key in path)
    named = [name for name in names if isinstance(name, str) and name != "value"]
    return bool(named) and _MATRIX.search(named[-1]) is not None


def decay_mask(parameters: Any) -> Any:
    """Mark the parameters that weight decay applies to, as a tree of booleans."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), parameters)


def _trained(parameters: Any) -> Any:
    """Leave out what no gradient trains; a tree without such parameters stays as it is."""

    def keep(node: Any) -> Any:
        return optax.MaskedNode() if isinstance(node, Untrained) else node

    return jax.tree.map(keep, parameters, is_leaf=lambda node: isinstance(node, Untrained))


def _is_left_out(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _or_zeros(update: Any, gradient: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, gradient) if _is_left_out(update) else update


def make_optimizer(config: OptimizerConfig, *, steps: int) -> optax.GradientTransformationExtraArgs:
    """Chain clipping by global norm and AdamW with decay on matrices only.

    Parameters that no gradient trains have no moments and an update of zero.

    Args:
        config: Optimizer fields of a run.
        steps: All steps of the run, which the schedule needs.

    Source: arXiv 1711.05101.
    """
    inner = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, steps=steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )

    def init(params: Any) -> Any:
        return inner.init(_trained(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        known = None if params is None else _trained(params)
        found, state = inner.update(_trained(updates), state, known, **extra)
        return jax.tree.map(_or_zeros, found, updates, is_leaf=_is_left_out), state

    return optax.GradientTransformationExtraArgs(init, update)
