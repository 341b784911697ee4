"""Normalisation: RMS norm of the text decoder, layer norm of the vision encoder, qk-norm."""

import jax
import jax.numpy as jnp
from flax import nnx

from llama4_jax.layers.param import constant, weight


def rms_normalize(x: jax.Array, eps: float) -> jax.Array:
    """Divide by the root mean square over the last axis, in float32, back in the dtype of x.

    With no learned weight this is qk-norm: over the features of each head, a mean and not a sum.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMS norm with a learned scale, which multiplies after the cast back: two roundings."""

    def __init__(self, dim: int, *, eps: float, dtype: str):
        self.scale_D = constant(1.0, (dim,), ("weight_embed",), dtype=dtype, role="norm")
        self.eps = eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        with jax.named_scope("rms_norm"):
            return rms_normalize(x_BTD, self.eps) * weight(self.scale_D, x_BTD.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias, in float32."""

    def __init__(self, dim: int, *, eps: float, dtype: str):
        self.scale_D = constant(1.0, (dim,), ("weight_embed",), dtype=dtype, role="norm")
        self.bias_D = constant(0.0, (dim,), ("weight_embed",), dtype=dtype, role="bias")
        self.eps = eps

    def __call__(self, x_PTD: jax.Array) -> jax.Array:
        x32 = x_PTD.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        unit = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + self.eps)
        scale, bias = weight(self.scale_D, x32.dtype), weight(self.bias_D, x32.dtype)
        return (unit * scale + bias).astype(x_PTD.dtype)
