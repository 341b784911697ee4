"""Expert parallelism: every shard applies its own experts to all tokens that chose them."""

import jax
import jax.numpy as jnp

from kernels_pallas.experts.api import expert_mlp
from llama4_jax.parallel.shard import mesh_axes, per_shard


def _apply_own(
    divided: dict[str, tuple[str, ...]],
    x_BTD: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    expert_BTX: jax.Array,
    gate_BTX: jax.Array,
    group: jax.Array | None = None,
) -> jax.Array:
    """Apply this shard's experts; the first argument says what is divided over which mesh axes."""
    B, T, D = x_BTD.shape
    X = expert_BTX.shape[-1]
    x_TD, expert_TX, gate_TX = (a.reshape(B * T, -1) for a in (x_BTD, expert_BTX, gate_BTX))
    expert_axes = divided["experts"]
    tokens_over = tuple(a for a in expert_axes if a in divided["batch"] or a in divided["seq"])
    if tokens_over:
        x_TD, expert_TX, gate_TX = (
            jax.lax.all_gather(a, tokens_over, tiled=True) for a in (x_TD, expert_TX, gate_TX)
        )
    if expert_axes:
        expert_TX -= jax.lax.axis_index(expert_axes) * w_gate_EDF.shape[-3]
    y_TD = expert_mlp(
        x_TD,
        w_gate_EDF,
        w_up_EDF,
        w_down_EFD,
        expert_TX=expert_TX.reshape(-1, X),
        gate_TX=gate_TX.reshape(-1, X),
        group=group,
    )
    summed_over = divided["expert_mlp"] + tuple(a for a in expert_axes if a not in tokens_over)
    if summed_over:
        y_TD = jax.lax.psum(y_TD, summed_over)
    if tokens_over:
        y_TD = jax.lax.psum_scatter(y_TD, tokens_over, tiled=True)
    return y_TD.reshape(B, T, D)


def sharded_expert_mlp(
    x_BTD: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    *,
    expert_BTX: jax.Array,
    gate_BTX: jax.Array,
    group: jax.Array | None = None,
) -> jax.Array:
    """Apply the routed experts to a batch whose rows, experts and hidden features may be divided.

    Where tokens and experts are divided over the same mesh axis, each shard gathers the tokens of
    its peers, applies its own experts to those that chose them, and the partial results are summed
    back to the owners (reduce-scatter). Where tokens are whole along the expert axis, only the sum
    remains. There is no capacity, so nothing is dropped; the arithmetic of a shard is in proportion
    to the tokens that chose its experts.

    Args:
        x_BTD: tokens; D whole.
        w_gate_EDF, w_up_EDF, w_down_EFD: expert matrices with D whole.
        expert_BTX: int32 chosen experts.
        gate_BTX: their gates, which scale the experts' inputs.
        group: int32 scalar; with it the matrices have a leading axis of layer groups, of which
            this one is used. See `expert_mlp`.

    Returns:
        y_BTD in the dtype and layout of x.
    """
    E = w_gate_EDF.shape[-3]
    if mesh_axes("experts", E) != mesh_axes("experts"):
        raise ValueError(f"num_experts ({E}) must be divisible by mesh axes {mesh_axes('experts')}")
    tokens, stack = ("batch", "seq", None), () if group is None else (None,)
    w_in, w_out = (*stack, "experts", None, "expert_mlp"), (*stack, "experts", "expert_mlp", None)
    arrays = (x_BTD, w_gate_EDF, w_up_EDF, w_down_EFD, expert_BTX.astype(jnp.int32), gate_BTX)
    axes = (tokens, w_in, w_in, w_out, tokens, tokens)
    if group is not None:
        arrays, axes = (*arrays, group), (*axes, ())
    with jax.named_scope("sharded_expert_mlp"):
        return per_shard(_apply_own, *arrays, axes=axes, out=tokens)
