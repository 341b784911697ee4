"""Build the optimizer and its learning-rate schedule from a configuration."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama4_jax.config.runs import OptimizerConfig
from llama4_jax.layers.param import is_parameter, role_of


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


def decay_mask(parameters: Any) -> Any:
    """Mark what weight decay applies to, matrices and routers, as a tree of booleans."""

    def mark(node: Any) -> Any:
        decays = is_parameter(node) and role_of(node) in ("matrix", "router")
        return jax.tree.map(lambda _: decays, node)

    return jax.tree.map(mark, parameters, is_leaf=is_parameter)


def clip_by_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """Scale gradients of a larger global norm down to `limit`; the step has computed the norm.

    Source: arXiv 1211.5063, algorithm 1.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, norm: jax.Array | None = None, **_: Any
    ) -> tuple[Any, Any]:
        del params
        norm = optax.tree.norm(updates) if norm is None else norm
        scale = jnp.minimum(1.0, limit / norm)
        return jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def make_optimizer(config: OptimizerConfig, *, steps: int) -> optax.GradientTransformationExtraArgs:
    """Chain clipping by global norm and AdamW with decay on matrices only.

    Args:
        config: Optimizer fields of a run.
        steps: All steps of the run, which the schedule needs.

    Source: arXiv 1711.05101.
    """
    return optax.with_extra_args_support(
        optax.chain(
            clip_by_norm(config.clip_norm),
            optax.adamw(
                make_schedule(config, steps=steps),
                b1=config.beta1,
                b2=config.beta2,
                eps=config.epsilon,
                weight_decay=config.weight_decay,
                mask=decay_mask,
            ),
        )
    )
