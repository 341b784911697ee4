"""Parameters: declared once with shape, axes and initial scale; gathered where they are used."""

import jax
import jax.numpy as jnp
from flax import nnx

from llama4_jax.parallel.axes import Axes
from llama4_jax.parallel.shard import mesh_axes, shard, shard_weight

_GATHERED = ("weight_embed", "expert_embed")  # divided at rest, whole in use


def normal(
    key: jax.Array, shape: tuple[int, ...], axes: Axes, *, std: float, dtype: str
) -> nnx.Param:
    """Declare a parameter drawn from a normal distribution cut off at two standard deviations."""
    value = jax.random.truncated_normal(key, -2, 2, shape, jnp.float32) * std
    return nnx.Param(shard_weight(value.astype(dtype), axes), axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: Axes, *, dtype: str) -> nnx.Param:
    """Declare a parameter that starts at one value everywhere."""
    return nnx.Param(shard_weight(jnp.full(shape, value, dtype), axes), axes=axes)


class Untrained(nnx.Variable):
    """A parameter that no gradient trains: it has neither moments nor decay."""


def untrained(value: float, shape: tuple[int, ...], axes: Axes) -> Untrained:
    """Declare a float32 parameter that the training step sets by a rule of its own."""
    return Untrained(shard_weight(jnp.full(shape, value, jnp.float32), axes), axes=axes)


def weight(param: nnx.Param, dtype: jnp.dtype, *, is_stacked: bool = False) -> jax.Array:
    """Return a parameter ready to compute with: cast, and gathered along its embed dimension.

    The gather is what makes fsdp: at rest a weight is divided along its embed dimension, in use it
    is not, and its gradient flows back through the gather as a reduce-scatter. A stacked parameter
    has a leading axis of layer groups.
    """
    axes = tuple(None if a in _GATHERED else a for a in param.get_metadata("axes"))
    return shard(param[...].astype(dtype), (None, *axes) if is_stacked else axes)


def is_ready(param: nnx.Param, dtype: jnp.dtype) -> bool:
    """Is a parameter at rest what `weight` returns, so that using it costs nothing?"""
    is_whole = not any(mesh_axes(a) for a in _GATHERED if a in param.get_metadata("axes"))
    return is_whole and param[...].dtype == dtype
