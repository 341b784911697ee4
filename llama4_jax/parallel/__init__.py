"""Meshes, logical axes and the collectives of a sharded model."""

from llama4_jax.parallel.mesh import make_mesh, parse_mesh
from llama4_jax.parallel.rules import PRESETS, Rules, make_rules, serving_rules
from llama4_jax.parallel.shard import (
    abstract,
    einsum,
    has_mesh,
    look_up,
    mesh_axes,
    per_shard,
    shard,
    shard_weight,
    take,
    unsharded_shapes,
    use_mesh,
)

__all__ = [
    "PRESETS",
    "Rules",
    "abstract",
    "einsum",
    "has_mesh",
    "look_up",
    "make_mesh",
    "make_rules",
    "mesh_axes",
    "parse_mesh",
    "per_shard",
    "serving_rules",
    "shard",
    "shard_weight",
    "take",
    "unsharded_shapes",
    "use_mesh",
]
