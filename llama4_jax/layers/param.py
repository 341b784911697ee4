"""Parameters: declared once with shape, axes, role and initial scale; gathered where they are used.

What a parameter is for stands in its metadata, so that the optimizer, a quantiser or a planner asks
the parameter and not its name.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llama4_jax.parallel.axes import Axes
from llama4_jax.parallel.shard import mesh_axes, shard, shard_weight

Role = Literal["matrix", "router", "embedding", "norm", "bias", "adapter", "buffer"]

_GATHERED = ("weight_embed", "expert_embed")  # sharded at rest, whole in use


def leaf_name(path: tuple[Any, ...]) -> str:
    """Return the dotted name of an array of a module, as in "decoder.tail.0.attention.w_q_DNH".

    Args:
        path: key path of the array, as `jax.tree_util.tree_map_with_path` gives it. The key
            "value", by which a parameter holds its array, is left out.
    """
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def normal(
    key: jax.Array,
    shape: tuple[int, ...],
    axes: Axes,
    *,
    std: float,
    dtype: str,
    role: Role = "matrix",
    contracted: tuple[int, ...] | None = None,
) -> nnx.Param:
    """Declare a parameter drawn from a normal distribution cut off at two standard deviations.

    Args:
        key: of the draw.
        shape: sizes.
        axes: logical axis of each dimension.
        std: standard deviation before the cut.
        dtype: it is stored in.
        role: what it is for.
        contracted: the dimensions over which a product sums, counted from the last so that they
            hold for stacked layers too. By default the second to last of a matrix or router; no
            product takes anything else.
    """
    if contracted is None and role in ("matrix", "router"):
        contracted = (-2,)
    value = jax.random.truncated_normal(key, -2, 2, shape, jnp.float32) * std
    placed = shard_weight(value.astype(dtype), axes)
    return nnx.Param(placed, axes=axes, role=role, contracted=contracted)


def constant(
    value: float, shape: tuple[int, ...], axes: Axes, *, dtype: str, role: Role
) -> nnx.Param:
    """Declare a parameter that starts at one value everywhere."""
    return nnx.Param(shard_weight(jnp.full(shape, value, dtype), axes), axes=axes, role=role)


class Buffer(nnx.Variable):
    """An array that no gradient trains: it has neither moments nor decay."""


def buffer(value: jax.Array, axes: Axes) -> Buffer:
    """Declare an array that the model reads and the optimizer leaves alone."""
    return Buffer(shard_weight(value, axes), axes=axes, role="buffer")


def is_parameter(node: Any) -> bool:
    """Is this node of a model's tree a parameter or a buffer, with its metadata?"""
    return isinstance(node, nnx.Variable)


def role_of(parameter: nnx.Variable) -> Role:
    """Return what a parameter is for."""
    return parameter.get_metadata("role")


def in_use(axes: Axes) -> Axes:
    """Return the axes of a weight that is computed with: whole along its embed dimension."""
    return tuple(None if a in _GATHERED else a for a in axes)


def weight(param: nnx.Variable, dtype: jnp.dtype, *, is_stacked: bool = False) -> jax.Array:
    """Return a parameter ready to compute with: cast, and gathered along its embed dimension.

    The gather is what makes fsdp: at rest a weight is sharded along its embed dimension, in use it
    is not, and its gradient flows back through the gather as a reduce-scatter. A stacked parameter
    has a leading axis of layer groups.
    """
    axes = in_use(param.get_metadata("axes"))
    return shard(param[...].astype(dtype), (None, *axes) if is_stacked else axes)


def is_ready(param: nnx.Variable, dtype: jnp.dtype) -> bool:
    """Is a parameter at rest what `weight` returns, so that using it costs nothing?"""
    is_whole = not any(mesh_axes(a) for a in _GATHERED if a in param.get_metadata("axes"))
    return is_whole and param[...].dtype == dtype
