"""Describe one training run: what is trained, on what, for how long and how it is saved."""

from dataclasses import dataclass, field
from typing import Literal

from llama4_jax.config.model import ModelConfig

Schedule = Literal["cosine", "wsd"]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a warmed-up schedule.

    Attributes:
        peak_learning_rate: Learning rate after the warm-up, in (0, 1].
        warmup_steps: Steps of linear warm-up from zero.
        schedule: "cosine" falls from the end of the warm-up to the last step; "wsd" stays at the
            peak and falls linearly over the last `decay_fraction` of the steps.
        decay_fraction: Share of all steps in which "wsd" falls, in (0, 1].
        final_learning_rate_ratio: Learning rate of the last step over the peak, in [0, 1].
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        epsilon: Added to the square root of the second moment.
        weight_decay: Decoupled decay of matrices (never of norms, biases or embeddings).
        clip_norm: Largest global gradient norm; larger gradients are scaled down to it.
        balance_bias_rate: By how much a step raises the balance bias of experts with less than the
            mean load, and lowers that of the others, in [0, 1); 0 leaves biases as they are.
    """

    peak_learning_rate: float
    warmup_steps: int
    schedule: Schedule = "cosine"
    decay_fraction: float = 0.2
    final_learning_rate_ratio: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    balance_bias_rate: float = 0.0

    def __post_init__(self) -> None:
        lr = self.peak_learning_rate
        _require(0 < lr <= 1, f"peak_learning_rate ({lr}) must be in (0, 1]; try 1e-3.")
        _require(
            self.schedule in ("cosine", "wsd"),
            f"schedule ({self.schedule!r}) is unknown; choose 'cosine' or 'wsd'.",
        )
        _require(
            self.warmup_steps >= 0,
            f"warmup_steps ({self.warmup_steps}) must not be negative; 0 means no warm-up.",
        )
        _require(
            0 < self.decay_fraction <= 1,
            f"decay_fraction ({self.decay_fraction}) must be in (0, 1]; try 0.2.",
        )
        _require(
            0 <= self.final_learning_rate_ratio <= 1,
            f"final_learning_rate_ratio ({self.final_learning_rate_ratio}) must be in [0, 1].",
        )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name} ({value}) must be in [0, 1).")
        _require(self.epsilon > 0, f"epsilon ({self.epsilon}) must be positive; try 1e-8.")
        _require(
            self.weight_decay >= 0,
            f"weight_decay ({self.weight_decay}) must not be negative; 0 means none.",
        )
        _require(self.clip_norm > 0, f"clip_norm ({self.clip_norm}) must be positive; try 1.0.")
        rate = self.balance_bias_rate
        _require(0 <= rate < 1, f"balance_bias_rate ({rate}) must be in [0, 1); try 1e-3.")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Terms of the training loss and how it is computed.

    Attributes:
        chunks: Pieces into which the positions of a row are cut, so that the float32 logits of
            one piece only are alive at a time; must divide the row length.
        z_loss: Weight of the mean squared log-partition, which keeps logits near zero.
        balance: Weight of the router load-balancing loss (1.0 times weight when experts are
            equally used).
    """

    chunks: int = 1
    z_loss: float = 0.0
    balance: float = 0.0

    def __post_init__(self) -> None:
        _require(self.chunks >= 1, f"chunks ({self.chunks}) must be at least 1.")
        for name in ("z_loss", "balance"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} ({value}) must not be negative; 0 switches it off.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run, complete: the same value gives the same weights on the same machine.

    Attributes:
        name: Name of the recipe.
        model: The architecture.
        optimizer: Optimizer and schedule.
        loss: Loss terms.
        mixture: (source name, share) pairs; shares of tokens, need not sum to one.
        steps: Optimizer steps.
        batch_size: Rows of a batch, over all devices.
        row_length: Tokens of a row.
        seed: Decides the initial weights and the order of the data.
        mesh: Mesh axes as "fsdp:4,expert:2"; empty is one device.
        preset: Name of the sharding rules that lay the model out over the mesh.
        remat: Recompute activations in the backward pass, to save memory.
        log_interval: Steps between two lines of training metrics.
        eval_interval: Steps between two evaluations on held-out data; 0 evaluates only at the
            last step.
        eval_batches: Batches of one evaluation of each held-out set.
        checkpoint_interval: Steps between two checkpoints; the last step is always saved.
        keep_checkpoints: Newest checkpoints kept on disk.
        max_skipped_in_a_row: Steps in a row with a loss or gradient that is not finite, each of
            which changes nothing, after which the run gives up.
    """

    name: str
    model: ModelConfig
    optimizer: OptimizerConfig
    loss: LossConfig = field(default_factory=LossConfig)
    mixture: tuple[tuple[str, float], ...]
    steps: int
    batch_size: int
    row_length: int
    seed: int = 0
    mesh: str = ""
    preset: str = "fsdp_expert"
    remat: bool = False
    log_interval: int = 10
    eval_interval: int = 0
    eval_batches: int = 1
    checkpoint_interval: int = 1000
    keep_checkpoints: int = 2
    max_skipped_in_a_row: int = 10

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "row_length",
            "log_interval",
            "eval_batches",
            "checkpoint_interval",
            "keep_checkpoints",
            "max_skipped_in_a_row",
        ):
            value = getattr(self, name)
            _require(value >= 1, f"{name} ({value}) must be at least 1.")
        for name in ("seed", "eval_interval"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} ({value}) must not be negative.")
        _require(
            self.row_length % self.loss.chunks == 0,
            f"row_length ({self.row_length}) must be divisible by loss.chunks "
            f"({self.loss.chunks}); choose a divisor of the row length.",
        )
        _require(
            self.row_length <= self.model.text.max_positions,
            f"row_length ({self.row_length}) exceeds the model's max_positions "
            f"({self.model.text.max_positions}); shorten the rows.",
        )
        _require(
            self.optimizer.warmup_steps < self.steps,
            f"warmup_steps ({self.optimizer.warmup_steps}) must be less than steps "
            f"({self.steps}); shorten the warm-up or train longer.",
        )
        _require(
            self.model.text.balance_bias or not self.optimizer.balance_bias_rate,
            f"balance_bias_rate ({self.optimizer.balance_bias_rate}) moves what model "
            f"{self.model.name!r} does not have; set balance_bias of its text config, or the rate "
            "to 0.",
        )
        self._check_mixture()

    def _check_mixture(self) -> None:
        names = [name for name, _ in self.mixture]
        _require(bool(names), "mixture is empty; name at least one source, as (('code', 1.0),).")
        _require(
            len(set(names)) == len(names),
            f"mixture names a source twice ({', '.join(names)}); add the shares up.",
        )
        for name, share in self.mixture:
            _require(share > 0, f"mixture share of {name!r} ({share}) must be positive.")
