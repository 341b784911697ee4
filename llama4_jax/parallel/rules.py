"""Which mesh axes divide which logical axes: the only place that names mesh axes.

Mesh axes: `data` (replicas), `fsdp` (replicas that keep a shard of every weight), `expert` (shards
of the experts), `tensor` (shards of heads and hidden features), `context` (shards of a sequence).
A rule that names an axis the mesh does not have is ignored, so one preset serves many meshes.
"""

import dataclasses
from collections.abc import Mapping

from llama4_jax.parallel.axes import check

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")


@dataclasses.dataclass(frozen=True)
class Rules:
    """An immutable, hashable map from logical axis to the mesh axes that divide it."""

    table: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self) -> None:
        check(tuple(logical for logical, _ in self.table))
        for logical, mesh_axes in self.table:
            for axis in mesh_axes:
                if axis not in MESH_AXES:
                    raise ValueError(
                        f"rule for {logical!r} names mesh axis {axis!r}; "
                        f"choose from {', '.join(MESH_AXES)}"
                    )

    def mesh_axes(self, logical: str | None) -> tuple[str, ...]:
        """Return the mesh axes that divide `logical`, outermost first."""
        return dict(self.table).get(logical, ()) if logical else ()


def make_rules(table: Mapping[str, tuple[str, ...]]) -> Rules:
    """Make rules from a map of logical axis to mesh axes."""
    return Rules(tuple(sorted(table.items())))


SINGLE = make_rules({})
"""Everything on every device: one device, or replicas of it."""

FSDP = make_rules(
    {
        "batch": ("data", "fsdp"),
        "tiles": ("data", "fsdp"),
        "weight_embed": ("fsdp",),
        "expert_embed": ("fsdp",),
    }
)
"""Training: rows and weights over the same devices; each weight is gathered where it is used."""

FSDP_EXPERT = make_rules(
    {
        "batch": ("data", "fsdp", "expert"),
        "tiles": ("data", "fsdp", "expert"),
        "seq": ("context",),
        "weight_embed": ("fsdp", "expert"),
        "expert_embed": ("fsdp",),
        "q_heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("tensor",),
        "experts": ("expert",),
        "expert_mlp": ("tensor",),
        "vocab": ("tensor",),
    }
)
"""Training of mixtures: as FSDP, and tokens are dispatched to experts on `expert` shards."""

TENSOR = make_rules(
    {
        "batch": ("data", "fsdp"),
        "tiles": ("data", "fsdp"),
        "q_heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("expert", "tensor"),
        "experts": ("expert",),
        "expert_mlp": ("tensor",),
        "vocab": ("expert", "tensor"),
    }
)
"""Serving: weights never move; activations, which are small, are summed over their shards."""

EXPERT = make_rules(
    {
        **dict(TENSOR.table),
        "q_heads": ("expert", "tensor"),
        "kv_heads": ("expert", "tensor"),
    }
)
"""Serving mixtures: as TENSOR, with heads and caches sharded over `expert` as well. A device then
reads its part of attention's weights and not all; there must be as many kv heads as devices."""

LONG_CONTEXT = make_rules(
    {
        **dict(TENSOR.table),
        "seq": ("context",),
        "kv_seq": ("context",),
    }
)
"""Long contexts: as TENSOR, with the sequence and the NoPE caches sharded over `context`."""

PRESETS = {
    "single": SINGLE,
    "fsdp": FSDP,
    "fsdp_expert": FSDP_EXPERT,
    "tensor": TENSOR,
    "expert": EXPERT,
    "long_context": LONG_CONTEXT,
}


def serving_rules(sizes: Mapping[str, int], *, num_kv_heads: int) -> Rules:
    """Choose the preset that serves a model on a mesh.

    LONG_CONTEXT where the mesh has a `context` axis, EXPERT where `expert` and `tensor` together
    divide the kv heads, TENSOR elsewhere.

    Args:
        sizes: devices along each mesh axis.
        num_kv_heads: of the model.
    """
    if sizes.get("context", 1) > 1:
        return LONG_CONTEXT
    shards = sizes.get("expert", 1) * sizes.get("tensor", 1)
    return EXPERT if num_kv_heads % shards == 0 else TENSOR
