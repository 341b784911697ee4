"""Loss, optimizer, training state and the loop that ties them together.

The names below are imported when first used: steps need neither the data pipelines nor the writers
that the loop needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama4_jax.train.checkpoints import is_complete
    from llama4_jax.train.loop import FitResult, HeldOut, fit, measure
    from llama4_jax.train.loss import TokenSums, sum_in_chunks, sum_over_tokens
    from llama4_jax.train.optimizer import make_optimizer, make_schedule
    from llama4_jax.train.state import TrainState, initial_state
    from llama4_jax.train.step import Batch, batch_loss, make_eval_step, make_train_step

_NAMES = {
    "checkpoints": ("is_complete",),
    "loop": ("FitResult", "HeldOut", "fit", "measure"),
    "loss": ("TokenSums", "sum_in_chunks", "sum_over_tokens"),
    "optimizer": ("make_optimizer", "make_schedule"),
    "state": ("TrainState", "initial_state"),
    "step": ("Batch", "batch_loss", "make_eval_step", "make_train_step"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}

__all__ = [
    "Batch",
    "FitResult",
    "HeldOut",
    "TokenSums",
    "TrainState",
    "batch_loss",
    "fit",
    "initial_state",
    "is_complete",
    "make_eval_step",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "measure",
    "sum_in_chunks",
    "sum_over_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
