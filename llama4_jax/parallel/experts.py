"""Expert parallelism: tokens are dispatched to experts, or every shard applies its own to all."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.experts.api import expert_mlp
from kernels_pallas.experts.inputs import WeightScales, cost_hint
from kernels_pallas.experts.parallel import expert_mlp_parallel
from llama4_jax.parallel.shard import mesh_axes, per_shard

_SCALES = ("gate_scale", "up_scale", "down_scale")


class _Axes(NamedTuple):
    """Over which mesh axes what happens.

    Attributes:
        dispatch_over: mesh axes over which tokens are dispatched to their experts (all-to-all).
        own_over: mesh axes along which tokens are whole, and every shard applies its own experts.
        summed_over: mesh axes over which results are summed.
        optional: names of the optional arrays that there are.
    """

    dispatch_over: tuple[str, ...]
    own_over: tuple[str, ...]
    summed_over: tuple[str, ...]
    optional: tuple[str, ...]


def _apply_own(
    over: _Axes,
    x_BTD: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    expert_BTX: jax.Array,
    gate_BTX: jax.Array,
    *more: jax.Array,
) -> jax.Array:
    """Apply this shard's experts."""
    B, T, D = x_BTD.shape
    x_TD, expert_TX, gate_TX = (a.reshape(B * T, -1) for a in (x_BTD, expert_BTX, gate_BTX))
    given = dict(zip(over.optional, more, strict=True))
    shared_TD = given["shared_BTD"].reshape(B * T, D) if "shared_BTD" in given else None
    scales = [given[name] for name in _SCALES if name in given]
    if over.own_over:  # those of others' experts count for nothing
        expert_TX -= jax.lax.axis_index(over.own_over) * w_gate_EDF.shape[-3]
    dispatched = functools.partial(expert_mlp_parallel, axes=over.dispatch_over)
    with cost_hint(occupancy=1 / jax.lax.axis_size(over.own_over)):
        y_TD = (dispatched if over.dispatch_over else expert_mlp)(
            x_TD,
            w_gate_EDF,
            w_up_EDF,
            w_down_EFD,
            expert_TX=expert_TX,
            gate_TX=gate_TX,
            shared_TD=shared_TD,
            weight_scales=WeightScales(*scales) if scales else None,
            group=given.get("group"),
        )
    if over.summed_over:
        y_TD = jax.lax.psum(y_TD, over.summed_over)
    return y_TD.reshape(B, T, D)


def _with_sizes(axes: Sequence[str]) -> str:
    """Write mesh axes as --mesh has them."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return ",".join(f"{axis}:{sizes[axis]}" for axis in axes)


def _dispatch_or_own(
    shape: tuple[int, ...], num_experts: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the experts' axes as `dispatch_over` or as `own_over`; the other is empty.

    Tokens, of shape [B, T, D], are dispatched where they are sharded over these axes too.

    Raises:
        ValueError: tokens are sharded over some axes of the experts, or experts do not divide.
    """
    (B, T, _), expert_axes = shape, mesh_axes("experts")
    batch_axes = {*mesh_axes("batch", B), *mesh_axes("seq", T)}
    if batch_axes & {*expert_axes} not in (set(), {*expert_axes}):
        raise ValueError(
            f"{B} rows of {T} tokens are sharded over mesh axes "
            f"({_with_sizes(sorted(batch_axes))}), some but not all of those of experts "
            f"({_with_sizes(expert_axes)}); take as many rows as all of these divide, or a preset "
            "that shards tokens over none of them"
        )
    if mesh_axes("experts", num_experts) != expert_axes:
        raise ValueError(
            f"num_experts ({num_experts}) must be divisible by mesh axes "
            f"({_with_sizes(expert_axes)}); make them smaller"
        )
    is_dispatched = batch_axes.issuperset(expert_axes)
    return (expert_axes, ()) if is_dispatched else ((), expert_axes)


def sharded_expert_mlp(
    x_BTD: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    *,
    expert_BTX: jax.Array,
    gate_BTX: jax.Array,
    shared_BTD: jax.Array | None = None,
    weight_scales: WeightScales | None = None,
    group: jax.Array | None = None,
) -> jax.Array:
    """Apply the routed experts to a batch whose rows, experts and hidden features may be sharded.

    Where tokens and experts are sharded over the same mesh axes, tokens are dispatched to their
    experts and returned (all-to-all, in as many rounds as the load asks for). Where tokens are
    whole along the expert axes, every shard applies its own experts and the results are summed.
    Nothing is dropped, and the arithmetic of a shard is in proportion to the tokens that chose its
    experts.

    Args:
        x_BTD: tokens; D whole.
        w_gate_EDF, w_up_EDF, w_down_EFD: expert matrices with D whole.
        expert_BTX: int32 chosen experts; another number than theirs contributes nothing.
        gate_BTX: their gates, which scale the experts' inputs.
        shared_BTD: what to add to the result, such as the shared expert's: in the operation, or,
            where results of several shards are summed, once after that.
        weight_scales: of quantised matrices; see `expert_mlp`.
        group: int32 scalar; with it the matrices and scales have a leading axis of layer groups, of
            which this one is used. See `expert_mlp`.

    Returns:
        y_BTD in the dtype and layout of x.

    Raises:
        ValueError: the mesh shards tokens over a part of the experts' axes, or experts unevenly.
    """
    dispatch_over, own_over = _dispatch_or_own(x_BTD.shape, w_gate_EDF.shape[-3])
    summed_over = (*mesh_axes("expert_mlp", w_gate_EDF.shape[-1]), *own_over)
    tokens, stack = ("batch", "seq", None), () if group is None else (None,)
    w_in, w_out = (*stack, "experts", None, "expert_mlp"), (*stack, "experts", "expert_mlp", None)
    arrays = (x_BTD, w_gate_EDF, w_up_EDF, w_down_EFD, expert_BTX.astype(jnp.int32), gate_BTX)
    axes, optional = (tokens, w_in, w_in, w_out, tokens, tokens), ()
    if group is not None:
        arrays, axes, optional = (*arrays, group), (*axes, ()), (*optional, "group")
    if weight_scales is not None:
        is_grouped = weight_scales.gate.ndim == w_gate_EDF.ndim
        ins, outs = ((None,), ("expert_mlp",)) if is_grouped else ((), ())
        of_in = (*stack, "experts", *ins, "expert_mlp")
        of_out = (*stack, "experts", *outs, None)
        arrays, axes = (*arrays, *weight_scales), (*axes, of_in, of_in, of_out)
        optional = (*optional, *_SCALES)
    if shared_BTD is not None and not summed_over:
        arrays, axes = (*arrays, shared_BTD), (*axes, tokens)
        optional = (*optional, "shared_BTD")
    over = _Axes(dispatch_over, own_over, summed_over, optional)
    with jax.named_scope("sharded_expert_mlp"):
        y_BTD = per_shard(
            lambda _, *local: _apply_own(over, *local), *arrays, axes=axes, out=tokens
        )
        return y_BTD if shared_BTD is None or "shared_BTD" in optional else y_BTD + shared_BTD
