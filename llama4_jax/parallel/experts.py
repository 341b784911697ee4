"""Expert parallelism: tokens travel to their experts, or every shard applies its own to all."""

import jax
import jax.numpy as jnp

from kernels_pallas.experts.api import expert_mlp
from kernels_pallas.experts.parallel import expert_mlp_parallel
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
    x_TD, expert_TX, gate_TX = (a.reshape(B * T, -1) for a in (x_BTD, expert_BTX, gate_BTX))
    expert_axes = divided["experts"]
    tokens_over = {*divided["batch"], *divided["seq"]}
    summed_over = divided["expert_mlp"]
    if expert_axes and tokens_over.issuperset(expert_axes):
        y_TD = expert_mlp_parallel(
            x_TD,
            w_gate_EDF,
            w_up_EDF,
            w_down_EFD,
            expert_TX=expert_TX,
            gate_TX=gate_TX,
            group=group,
            axes=expert_axes,
        )
    else:
        if expert_axes:  # every shard sees all tokens; those of others' experts count for nothing
            expert_TX -= jax.lax.axis_index(expert_axes) * w_gate_EDF.shape[-3]
            summed_over += expert_axes
        y_TD = expert_mlp(
            x_TD,
            w_gate_EDF,
            w_up_EDF,
            w_down_EFD,
            expert_TX=expert_TX,
            gate_TX=gate_TX,
            group=group,
        )
    if summed_over:
        y_TD = jax.lax.psum(y_TD, summed_over)
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

    Where tokens and experts are divided over the same mesh axes, tokens travel to their experts and
    back (all-to-all, in as many rounds as the load asks for). Where tokens are whole along the
    expert axes, every shard applies its own experts and the results are summed. Nothing is dropped,
    and the arithmetic of a shard is in proportion to the tokens that chose its experts.

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
    batch_axes = {*mesh_axes("batch", x_BTD.shape[0]), *mesh_axes("seq", x_BTD.shape[1])}
    if batch_axes & {*mesh_axes("experts")} not in (set(), {*mesh_axes("experts")}):
        raise ValueError(
            f"tokens are divided over {sorted(batch_axes)}, a part of the axes of the experts "
            f"{mesh_axes('experts')}; divide tokens over all of them or none"
        )
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
