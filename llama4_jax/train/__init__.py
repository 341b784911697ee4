"""Loss, optimizer, training state and the loop that ties them together."""

from llama4_jax.train.checkpoints import is_complete
from llama4_jax.train.loop import FitResult, HeldOut, fit, measure
from llama4_jax.train.loss import TokenSums, sum_in_chunks, sum_over_tokens
from llama4_jax.train.optimizer import make_optimizer, make_schedule
from llama4_jax.train.state import TrainState, initial_state
from llama4_jax.train.step import Batch, batch_loss, make_eval_step, make_train_step

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
