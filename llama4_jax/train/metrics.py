"""Name what a training step measures, and relate its cost to the clock and to the device's peak."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from kernels_pallas import chips
from llama4_jax.config.model import ModelConfig
from llama4_jax.cost import train_flops


def peak_flops(device_kind: str) -> float | None:
    """Return the dense bfloat16 peak of a device in FLOP/s, or None where it is not known.

    Args:
        device_kind: `jax.devices()[0].device_kind`.
    """
    chip = chips.find(device_kind)
    return None if chip is None else chip.bf16


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
            self._flops += train_flops(self._config, rows=rows, row_length=row_length, tiles=tiles)

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
