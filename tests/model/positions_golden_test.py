"""Rotation and temperature of the released sizes, against transformers and known values."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention.reference import attention_temperature
from llama4_jax.config.model import RopeScaling
from llama4_jax.layers.rope import image_angles, rope_angles, rope_frequencies
from tests.golden import closed_form
from tests.golden.stored import golden

RELATIVE = 1e-6  # the published values have seven digits


@pytest.mark.parametrize("name", closed_form.ROPE_TABLES)
def test_frequencies_match_transformers(name):
    head_dim, scaled = closed_form.ROPE_TABLES[name]
    ours = rope_frequencies(head_dim, 500000.0, RopeScaling() if scaled else None)
    np.testing.assert_array_equal(ours, golden("hf_positions")[f"{name}.frequencies"])


def test_scout_divides_by_16_from_pair_35_on():
    scout = rope_frequencies(128, 500000.0, RopeScaling())
    plain = rope_frequencies(128, 500000.0, None)
    np.testing.assert_array_equal(scout[:35], plain[:35])
    np.testing.assert_allclose(scout[35:], plain[35:] / 16, rtol=RELATIVE)
    known = {0: 1.0, 1: 8.146172e-01, 34: 9.384738514e-04, 35: 4.778106086e-05, 63: 1.534462939e-07}
    for pair, value in known.items():
        assert scout[pair] == pytest.approx(value, rel=RELATIVE)


def test_the_first_scaling_that_shipped_for_scout_is_a_different_one():
    first = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    old, new = (rope_frequencies(128, 500000.0, s) for s in (first, RopeScaling()))
    np.testing.assert_array_equal(np.flatnonzero(old != new), np.arange(29, 64))


def test_vision_rotation_matches_transformers():
    angles = image_angles(24, 88, 10000.0)[closed_form.VISION_ROTATION_PATCHES]
    ours = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    np.testing.assert_allclose(ours, golden("hf_positions")["vision_rotation"], atol=2e-6)


def test_vision_rotation_counts_from_one_column_first():
    angles = image_angles(24, 88, 10000.0)
    assert angles.shape == (577, 44)
    assert np.cos(angles[0, 0]) == pytest.approx(0.5403, abs=5e-5)
    assert np.cos(angles[0, 22]) == pytest.approx(0.5403, abs=5e-5)
    # The second patch of a row moves by a column, the first of the second row by a row.
    assert (angles[1, 0], angles[1, 22]) == (2, 1)
    assert (angles[24, 0], angles[24, 22]) == (1, 2)
    np.testing.assert_array_equal(angles[576], 0)


def test_angles_within_a_chunk_stay_exact_at_ten_million_tokens():
    frequencies = rope_frequencies(128, 500000.0, RopeScaling())
    chunk_start = 10_000_000 // 8192 * 8192
    positions = np.array([[chunk_start, chunk_start + 1, chunk_start + 8191]], np.int32)
    exact = np.array([0.0, 1.0, 8191.0])[:, None] * frequencies.astype(np.float64)
    chunked = np.asarray(rope_angles(positions, frequencies, period=8192))[0]
    np.testing.assert_allclose(chunked, exact, rtol=1e-6)
    absolute = np.asarray(rope_angles(positions, frequencies))[0].astype(np.float64)
    drift = absolute - (chunk_start * frequencies.astype(np.float64) + exact)
    assert 0.1 < np.abs(drift).max() < 1


def test_temperature_matches_transformers_and_rises_one_position_before_8192():
    positions = closed_form.TEMPERATURE_POSITIONS
    ours = np.asarray(attention_temperature(jnp.asarray(positions, jnp.int32), (8192, 0.1)))
    np.testing.assert_allclose(ours, golden("hf_positions")["temperature"], rtol=RELATIVE)
    known = {8190: 1.0, 8191: 1.069315, 16382: 1.069315, 16383: 1.109861, 131071: 1.283321,
             1048575: 1.485981, 10485759: 1.715540}  # fmt: skip
    for position, scale in known.items():
        assert ours[positions == position] == pytest.approx(scale, abs=1e-6)
