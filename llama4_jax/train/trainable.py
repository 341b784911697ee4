"""Which parameters a run trains: filters, and a model taken apart by one and put together again."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llama4_jax.layers.param import Buffer, is_parameter, leaf_name, role_of

Trainable = Callable[[str, nnx.Variable], bool]
"""(name, parameter) -> whether to train it; the parameter tells its role."""


def all_parameters(name: str, parameter: nnx.Variable) -> bool:
    """Train everything but buffers and what is stored in whole numbers."""
    del name
    is_float = jnp.issubdtype(parameter[...].dtype, jnp.floating)
    return is_float and not isinstance(parameter, Buffer)


def adapters(name: str, parameter: nnx.Variable) -> bool:
    """Train low-rank adapters alone."""
    return all_parameters(name, parameter) and role_of(parameter) == "adapter"


def partition(model: Any, trainable: Trainable) -> tuple[Any, Any]:
    """Take a model apart.

    Returns:
        (trained, frozen): trees like the model, with None where a parameter is in the other.
    """

    def keep(path: tuple[Any, ...], node: Any, *, trained: bool) -> Any:
        is_trained = is_parameter(node) and trainable(leaf_name(path), node)
        return node if is_trained == trained else None

    def part(trained: bool) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, node: keep(path, node, trained=trained), model, is_leaf=is_parameter
        )

    return part(True), part(False)


def combine(trained: Any, frozen: Any) -> Any:
    """Put the parts of a model together again."""
    return jax.tree.map(
        lambda mine, other: other if mine is None else mine,
        trained,
        frozen,
        is_leaf=lambda node: node is None or is_parameter(node),
    )
