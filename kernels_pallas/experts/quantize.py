"""Make the quantised matrices that `expert_mlp` reads, laid out as `inputs.WeightScales` says."""

import jax
import jax.numpy as jnp

from kernels_pallas.experts.inputs import INT4_GROUP

FP8_MAX = 448.0  # of float8_e4m3fn
ROW_MAX = 1200.0  # an activation's row maximum is taken for no more than this


def quantize_int8(w_EDF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Round to int8 with one scale for each output channel. Returns w_EDF int8, scale_EF."""
    w_EDF = w_EDF.astype(jnp.float32)
    scale_EF = jnp.maximum(jnp.abs(w_EDF).max(-2), 1e-12) / 127
    return jnp.round(w_EDF / scale_EF[..., None, :]).astype(jnp.int8), scale_EF


def quantize_fp8(w_EDF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Round to float8_e4m3fn with one scale for each output channel. Returns w_EDF, scale_EF."""
    w_EDF = w_EDF.astype(jnp.float32)
    scale_EF = jnp.maximum(jnp.abs(w_EDF).max(-2), 1e-12) / FP8_MAX
    return (w_EDF / scale_EF[..., None, :]).astype(jnp.float8_e4m3fn), scale_EF


def quantize_int4(w_EDF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Round to int4 in groups of 128 input channels, as Meta does.

    The scale is a group's largest magnitude over 8, so that +8 saturates at 7.

    Args:
        w_EDF: matrices whose D is a multiple of 128.

    Returns:
        packed int8 [E, D / 2, F], the even input channel in the low nibble; scales float32
        [E, D / 128, F].

    Raises:
        ValueError: D is not a multiple of 128.

    Source: llama_models, `int4_row_quantize` and its packing.
    """
    *E, D, F = w_EDF.shape
    if D % INT4_GROUP:
        raise ValueError(f"int4 takes groups of {INT4_GROUP} input channels; {D} is no multiple")
    grouped = w_EDF.astype(jnp.float32).reshape(*E, D // INT4_GROUP, INT4_GROUP, F)
    scale = jnp.maximum(jnp.abs(grouped).max(-2), 1e-6) / 8
    levels = jnp.clip(jnp.round(grouped / scale[..., None, :]), -8, 7).astype(jnp.int8)
    levels = levels.reshape(*E, D // 2, 2, F)
    low, high = levels[..., 0, :] & 15, jnp.left_shift(levels[..., 1, :], 4)
    return low | high, scale


def unpack_int4(packed_DF: jax.Array, scale_GF: jax.Array) -> jax.Array:
    """Return the float32 matrices [..., D, F] that packed int4 and its scales stand for."""
    low = jnp.right_shift(jnp.left_shift(packed_DF, 4), 4)
    levels = jnp.stack([low, jnp.right_shift(packed_DF, 4)], axis=-2)
    *E, half, _, F = levels.shape
    grouped = levels.reshape(*E, 2 * half // INT4_GROUP, INT4_GROUP, F).astype(jnp.float32)
    return (grouped * scale_GF[..., None, :]).reshape(*E, 2 * half, F)


def fp8_rows(x_RD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Round activations to float8_e4m3fn with one scale a row. Returns x_RD, scale_R1.

    Source: llama_models, dynamic row-wise FP8 with an upper bound on the scale.
    """
    x_RD = x_RD.astype(jnp.float32)
    largest = jnp.clip(jnp.abs(x_RD).max(-1, keepdims=True), 1e-12, ROW_MAX)
    scale_R1 = largest / FP8_MAX
    return jnp.clip(x_RD / scale_R1, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn), scale_R1
