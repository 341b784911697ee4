import dataclasses

import jax
import numpy as np
import pytest

from llama4_jax.config import nano, scout
from llama4_jax.train.metrics import (
    SpeedMeter,
    batch_flops,
    name_metrics,
    peak_flops,
    text_flops_per_row,
)


def test_flops_of_a_scout_token_are_six_per_active_parameter_and_attention():
    text = scout().text
    # 17.17e9 active text parameters without the embedding table, whose lookup costs nothing.
    layer = 5120 * 128 * (40 + 8 + 8 + 40) + 2 * 3 * 5120 * 8192 + 5120 * 16
    matrices = 48 * layer + 5120 * 202_048
    # One token sees itself only.
    one = text_flops_per_row(text, row_length=1)
    assert one == 6 * matrices + 48 * 12 * 40 * 128


def test_attention_flops_count_the_pairs_that_masks_leave():
    text = dataclasses.replace(nano().text, chunk_size=4)
    width = 12 * text.num_heads * text.head_dim

    def attention(length):
        return text_flops_per_row(text, row_length=length) - length * (
            text_flops_per_row(text, row_length=1) - text.num_layers * width
        )

    # 10 tokens in chunks of 4: 10 + 10 + 3 pairs in each of 6 layers; 55 in each of 2 NoPE layers.
    assert attention(10) == width * (6 * 23 + 2 * 55)


def test_images_and_rows_add_up():
    config = nano()
    text = batch_flops(config, rows=2, row_length=64)
    assert text == 2 * batch_flops(config, rows=1, row_length=64)
    images = batch_flops(config, rows=2, row_length=64, tiles=3) - text
    assert images == 3 * (batch_flops(config, rows=2, row_length=64, tiles=1) - text) > 0


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("NVIDIA H100 80GB HBM3", 989e12), ("cpu", None)],
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
        batch_flops(nano(), rows=2, row_length=64) / 128,
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
