"""Count what a training step costs and relate it to the clock and to the device's peak."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from llama4_jax.config.model import ModelConfig, TextConfig, VisionConfig

# Dense bfloat16 peak of one device in FLOP/s, by the start of jax.Device.device_kind; from the
# makers' data sheets. The first match counts, so the longer names come first.
_PEAK_FLOPS = (
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA A100", 312e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Return the dense bfloat16 peak of a device in FLOP/s, or None where it is not known.

    Args:
        device_kind: `jax.devices()[0].device_kind`.
    """
    for prefix, peak in _PEAK_FLOPS:
        if device_kind.startswith(prefix):
            return peak
    return None


def text_flops_per_row(config: TextConfig, *, row_length: int) -> float:
    """Count the model FLOPs of a forward and backward pass over one row of text.

    6 per token and active matrix parameter (2 forward, 4 backward; the selected experts only,
    the embedding lookup none) plus attention: 12 * num_heads * head_dim for each pair of a
    token and a token it sees. Tokens are taken to see all earlier ones of their chunk (of the
    row in NoPE layers), as if the row were one document. Recomputation is not counted.

    Source: arXiv 2204.02311, appendix B, with causal instead of full attention.
    """
    d, h = config.embed_dim, config.head_dim
    attention = d * h * (2 * config.num_heads + 2 * config.num_kv_heads)
    moe = 3 * d * config.expert_dim * (config.experts_per_token + 1) + d * config.num_experts
    num_moe = len(config.moe_layers)
    num_nope = len(config.nope_layers)
    matrices = (
        config.num_layers * attention
        + num_moe * moe
        + (config.num_layers - num_moe) * 3 * d * config.mlp_dim
        + d * config.vocab_size
    )
    pairs = num_nope * _causal_pairs(row_length, None) + (
        config.num_layers - num_nope
    ) * _causal_pairs(row_length, config.chunk_size)
    return 6.0 * matrices * row_length + 12.0 * config.num_heads * h * pairs


def vision_flops_per_tile(config: VisionConfig, *, text_embed_dim: int) -> float:
    """Count the model FLOPs of a forward and backward pass over one image tile."""
    d = config.embed_dim
    patches = config.num_patches + 1
    layer = 4 * d * d + 2 * d * config.mlp_dim
    attention = 12.0 * d * patches**2
    shuffled_dim = d * config.shuffle**2
    adapter = (
        shuffled_dim * config.adapter_dim
        + config.adapter_dim**2
        + config.adapter_dim * text_embed_dim
    )
    return (
        6.0 * config.num_patches * config.patch_dim * d
        + config.num_layers * (6.0 * patches * layer + attention)
        + 6.0 * config.tokens_per_tile * adapter
    )


def batch_flops(config: ModelConfig, *, rows: int, row_length: int, tiles: int = 0) -> float:
    """Count the model FLOPs of one training step on a batch.

    Args:
        config: The model.
        rows: Rows of the batch, over all devices.
        row_length: Tokens of a row.
        tiles: Image tiles of the batch; 0 for text only.
    """
    flops = rows * text_flops_per_row(config.text, row_length=row_length)
    if config.vision is not None and tiles:
        flops += tiles * vision_flops_per_tile(config.vision, text_embed_dim=config.text.embed_dim)
    return flops


def name_metrics(
    metrics: Mapping[str, jax.Array], *, moe_layers: Sequence[int]
) -> dict[str, float | list[float]]:
    """Bring a step's metrics to the host under the names that writers record.

    Args:
        metrics: scalars, and arrays with a row for every mixture layer.
        moe_layers: those layers.

    Returns:
        A scalar "loss" as "train/loss"; the rows of "router/entropy" as "router/entropy/layer_03",
        a number or a list of numbers.
    """
    named: dict[str, float | list[float]] = {}
    for name, value in jax.device_get(dict(metrics)).items():
        rows: Any = value.tolist()
        if value.ndim == 0:
            named[f"train/{name}"] = float(rows)
        else:
            layers = (f"{name}/layer_{layer:02d}" for layer in moe_layers)
            named |= zip(layers, rows, strict=True)
    return named


class SpeedMeter:
    """Relate the work of training steps to the time they took.

    Steps count only between `start` and `pause`, so that compiling, evaluating and saving stay
    outside. The caller waits for the devices before it calls `start`, `pause` or `take`.

    Args:
        config: The model.
        num_devices: Devices that share the work.
        device_kind: `jax.Device.device_kind` of one of them.
    """

    def __init__(self, config: ModelConfig, *, num_devices: int, device_kind: str) -> None:
        self._config = config
        peak = peak_flops(device_kind)
        self._peak = None if peak is None else peak * num_devices
        self._tokens = 0
        self._flops = 0.0
        self._seconds = 0.0
        self._started: float | None = None

    @property
    def is_running(self) -> bool:
        """Whether steps are being counted."""
        return self._started is not None

    def start(self) -> None:
        """Count the steps from now on."""
        self._started = time.perf_counter()

    def pause(self) -> None:
        """Stop counting until `start`."""
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
        self._started = None

    def count(self, *, rows: int, row_length: int, tiles: int) -> None:
        """Add a step on a batch of this size; ignored while paused."""
        if self.is_running:
            self._tokens += rows * row_length
            self._flops += batch_flops(self._config, rows=rows, row_length=row_length, tiles=tiles)

    def take(self) -> dict[str, float]:
        """Return the speed since the last call, and begin anew.

        Returns:
            "speed/tokens_per_second" (padding included), "speed/flops_per_second" (model FLOPs)
            and "speed/mfu", the share of the devices' dense bfloat16 peak, where it is known.
            Empty when no step was counted.
        """
        was_running = self.is_running
        self.pause()
        tokens, flops, seconds = self._tokens, self._flops, self._seconds
        self._tokens, self._flops, self._seconds = 0, 0.0, 0.0
        if was_running:
            self.start()
        if not tokens:
            return {}
        speed = {
            "speed/tokens_per_second": tokens / seconds,
            "speed/flops_per_second": flops / seconds,
        }
        if self._peak is not None:
            speed["speed/mfu"] = flops / seconds / self._peak
        return speed


def _causal_pairs(length: int, chunk_size: int | None) -> int:
    """Count (token, visible token) pairs of a row cut into chunks."""
    chunk = length if chunk_size is None else min(chunk_size, length)
    whole, rest = divmod(length, chunk)
    return whole * chunk * (chunk + 1) // 2 + rest * (rest + 1) // 2
