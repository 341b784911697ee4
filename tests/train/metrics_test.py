import jax
import numpy as np
import pytest

from llama4_jax.config import nano
from llama4_jax.cost import train_flops
from llama4_jax.train.metrics import SpeedMeter, name_metrics, peak_flops


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU7x", 1153.5e12),  # half a chip
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_peaks_are_known_by_device_kind(kind, peak):
    assert peak_flops(kind) == peak


def test_an_unknown_device_has_speed_but_no_utilisation():
    meter = SpeedMeter(nano(), num_devices=1, device_kind=jax.devices()[0].device_kind)
    meter.count(rows=4, row_length=64, tiles=0)  # not started: the first step compiles
    meter.start()
    meter.count(rows=2, row_length=64, tiles=0)
    speed = meter.take()
    assert set(speed) == {"speed/tokens_per_second", "speed/flops_per_second"}
    np.testing.assert_allclose(
        speed["speed/flops_per_second"] / speed["speed/tokens_per_second"],
        train_flops(nano(), rows=2, row_length=64) / 128,
    )
    assert meter.take() == {}


def test_utilisation_is_the_share_of_all_devices_peak():
    meter = SpeedMeter(nano(), num_devices=4, device_kind="TPU v4")
    meter.start()
    meter.count(rows=2, row_length=64, tiles=0)
    speed = meter.take()
    np.testing.assert_allclose(speed["speed/mfu"], speed["speed/flops_per_second"] / (4 * 275e12))


def test_rows_of_a_metric_are_named_after_their_layers():
    metrics = {
        "loss": np.float32(2.5),
        "router/entropy": np.asarray([0.5, 0.25], np.float32),
        "router/tokens": np.asarray([[3, 1], [0, 4]], np.int32),
    }
    assert name_metrics(metrics, moe_layers=(1, 3)) == {
        "train/loss": 2.5,
        "router/entropy/layer_01": 0.5,
        "router/entropy/layer_03": 0.25,
        "router/tokens/layer_01": [3, 1],
        "router/tokens/layer_03": [0, 4],
    }
