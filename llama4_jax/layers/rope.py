"""Rotary embedding on interleaved pairs, in one dimension for text and two for images."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.config.model import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Compute the rotation per position of each pair of features j: theta^(-2j / head_dim).

    Args:
        head_dim: features of a head.
        theta: base.
        scaling: piecewise scaling by wavelength, or None. With equal low and high factors, as in
            Scout, the blended band is empty and the scaling is a step.

    Returns:
        float32 [head_dim / 2], radians per position.
    """
    # Exponent and power are rounded to float32 as in the reference implementations: a table that
    # differs in the last bit turns by 5e-4 radians more or less at position 8000.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    power = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / power
    if scaling is None:
        return frequencies
    turns = scaling.original_max_positions * frequencies.astype(np.float64) / (2 * math.pi)
    band = scaling.high_freq_factor - scaling.low_freq_factor
    beyond = turns - scaling.low_freq_factor
    kept = np.clip(beyond / band, 0, 1) if band else beyond > 0
    slowed = frequencies / np.float32(scaling.factor)
    return (kept * frequencies + (1 - kept) * slowed).astype(np.float32)


def rope_angles(
    positions_BT: jax.Array, frequencies: np.ndarray, *, period: int | None = None
) -> jax.Array:
    """Compute float32 angles [B, T, H/2] = position * frequency.

    With a `period`, positions are taken modulo it first. Attention inside fixed chunks depends on
    differences of positions within one chunk only, so the chunk size as period changes nothing but
    the rounding, and keeps angles exact at any position, where float32 products drift: by 0.4
    radians at 10M tokens.
    """
    positions_BT = jnp.maximum(positions_BT, 0)
    if period is not None:
        positions_BT = positions_BT % period
    return positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequencies)


def image_angles(grid: int, head_dim: int, theta: float) -> np.ndarray:
    """Compute the angles of a tile's patches, and of the class token after them.

    The first half of the pairs rotates by the column, the second by the row, both counted from 1;
    the class token does not rotate.

    Returns:
        float32 [grid * grid + 1, head_dim / 2].
    """
    frequencies = theta ** (-np.arange(0, head_dim // 2, 2, dtype=np.float64) / (head_dim // 2))
    row, column = np.divmod(np.arange(grid * grid), grid)
    angles = np.concatenate(
        [(column[:, None] + 1) * frequencies, (row[:, None] + 1) * frequencies], axis=1
    )
    return np.concatenate([angles, np.zeros((1, head_dim // 2))]).astype(np.float32)


def apply_rope(x_BTNH: jax.Array, angles_BTh: jax.Array) -> jax.Array:
    """Rotate each pair of features (2j, 2j + 1) by its angle, in float32; keep the dtype of x."""
    with jax.named_scope("rope"):
        pairs = x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], -1, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        cos, sin = jnp.cos(angles_BTh)[..., None, :], jnp.sin(angles_BTh)[..., None, :]
        rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
        return rotated.reshape(x_BTNH.shape).astype(x_BTNH.dtype)
