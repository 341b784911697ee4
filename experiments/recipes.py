"""Training runs by name: each recipe is a function that returns the stages of a training."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from llama4_jax.config import ModelConfig, families
from llama4_jax.config.runs import LossConfig, OptimizerConfig, RunConfig

Recipe = tuple[RunConfig, ...]
"""Stages in order; each begins with the model that the one before it left."""


def _nano_model() -> ModelConfig:
    """Return nano as it is trained, in float32."""
    return dataclasses.replace(families.nano(), dtype="float32")


def nano() -> Recipe:
    """The member that ships: 3.6M parameters, 256-token rows of four chunks, code and digits.

    The first stage is mostly pictures: while nothing in the decoder depends on them, the few
    answers among much code would teach the vision encoder next to nothing. Batches are small,
    because steps and not tokens are scarce in 25 minutes on two cores.
    """
    pictures = RunConfig(
        name="pictures",
        model=_nano_model(),
        optimizer=OptimizerConfig(
            peak_learning_rate=1.5e-3,
            warmup_steps=50,
            schedule="wsd",
            decay_fraction=0.2,
            final_learning_rate_ratio=0.3,
        ),
        loss=LossConfig(balance=0.01),
        mixture=(("code", 0.1), ("digits", 0.9)),
        steps=450,
        batch_size=8,
        row_length=256,
        log_interval=10,
        eval_interval=150,
        eval_batches=8,
        checkpoint_interval=50,
    )
    code = dataclasses.replace(
        pictures,
        name="code",
        optimizer=OptimizerConfig(
            peak_learning_rate=2.5e-3,
            warmup_steps=100,
            schedule="wsd",
            decay_fraction=0.3,
            final_learning_rate_ratio=0.05,
        ),
        mixture=(("code", 0.8), ("digits", 0.2)),
        steps=1500,
        eval_interval=250,
    )
    return (pictures, code)


def smoke() -> Recipe:
    """Two stages of seconds that pass through everything: two layers, both sources, few steps."""
    model = _nano_model()
    text = dataclasses.replace(
        model.text,
        embed_dim=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        expert_dim=32,
        num_experts=2,
        moe_layers=(0, 1),
        nope_layers=(1,),
    )
    assert model.vision is not None
    vision = dataclasses.replace(
        model.vision, embed_dim=32, num_layers=1, num_heads=2, mlp_dim=128, adapter_dim=32
    )

    def shorten(stage: RunConfig) -> RunConfig:
        return dataclasses.replace(
            stage,
            model=dataclasses.replace(model, name="smoke", text=text, vision=vision),
            optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=1),
            steps=2,
            batch_size=4,
            log_interval=1,
            eval_interval=0,
            eval_batches=1,
        )

    return tuple(shorten(stage) for stage in nano())


def change(
    recipe: Recipe,
    *,
    steps: int | None = None,
    seed: int | None = None,
    mesh: str | None = None,
    balance_bias_rate: float | None = None,
) -> Recipe:
    """Return the recipe with other values in every stage, where they are given.

    Args:
      recipe: its stages.
      steps: of each; a warm-up that does not fit shrinks with them.
      seed: of weights and data.
      mesh: devices, as axis:size pairs.
      balance_bias_rate: by how much a step moves the balance biases; 0 is none.

    Raises:
      ValueError: a stage cannot have such a value.
    """
    given: dict[str, Any] = {n: v for n, v in (("seed", seed), ("mesh", mesh)) if v is not None}
    stages = (dataclasses.replace(stage, **given) for stage in recipe)
    if steps is not None:
        stages = (_with_steps(stage, steps) for stage in stages)
    if balance_bias_rate is not None:
        stages = (_with_balance_bias(stage, balance_bias_rate) for stage in stages)
    return tuple(stages)


def _with_steps(stage: RunConfig, steps: int) -> RunConfig:
    warmup = stage.optimizer.warmup_steps
    if warmup >= steps:
        warmup = min(steps - 1, max(1, warmup * steps // stage.steps))
    optimizer = dataclasses.replace(stage.optimizer, warmup_steps=warmup)
    return dataclasses.replace(stage, steps=steps, optimizer=optimizer)


def _with_balance_bias(stage: RunConfig, rate: float) -> RunConfig:
    text = dataclasses.replace(stage.model.text, balance_bias=rate > 0)
    return dataclasses.replace(
        stage,
        model=dataclasses.replace(stage.model, text=text),
        optimizer=dataclasses.replace(stage.optimizer, balance_bias_rate=rate),
    )


RECIPES: Mapping[str, Callable[[], Recipe]] = {"nano": nano, "smoke": smoke}
"""Every recipe that --recipe may name."""
