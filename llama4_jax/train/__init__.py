"""Loss, optimizer, training state and the loop that ties them together.

The names below are imported when first used: steps need neither the data pipelines nor the writers
that the loop needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama4_jax.train.checkpoints import is_complete
    from llama4_jax.train.loop import FitResult, HeldOut, fit, measure
    from llama4_jax.train.loss import TokenSums, sum_over_tokens
    from llama4_jax.train.objective import Batch, Objective, batch_loss, pretraining
    from llama4_jax.train.optimizer import make_optimizer, make_schedule
    from llama4_jax.train.state import TrainState, initial_state, start_state
    from llama4_jax.train.step import make_eval_step, make_train_step, pretraining_step
    from llama4_jax.train.trainable import Trainable, adapters, all_parameters
    from llama4_jax.train.workdir import lock_workdir

_NAMES = {
    "checkpoints": ("is_complete",),
    "loop": ("FitResult", "HeldOut", "fit", "measure"),
    "loss": ("TokenSums", "sum_over_tokens"),
    "objective": ("Batch", "Objective", "batch_loss", "pretraining"),
    "optimizer": ("make_optimizer", "make_schedule"),
    "state": ("TrainState", "initial_state", "start_state"),
    "step": ("make_eval_step", "make_train_step", "pretraining_step"),
    "trainable": ("Trainable", "adapters", "all_parameters"),
    "workdir": ("lock_workdir",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}

__all__ = [
    "Batch",
    "FitResult",
    "HeldOut",
    "Objective",
    "TokenSums",
    "TrainState",
    "Trainable",
    "adapters",
    "all_parameters",
    "batch_loss",
    "fit",
    "initial_state",
    "is_complete",
    "lock_workdir",
    "make_eval_step",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "measure",
    "pretraining",
    "pretraining_step",
    "start_state",
    "sum_over_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
