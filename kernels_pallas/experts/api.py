"""The mixture-of-experts operation: what it computes, and its gradient."""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.backend import Backend, choose, vary_alike
from kernels_pallas.experts.inputs import (
    Arguments,
    Inputs,
    WeightScales,
    cost_hint,
    occupancy_hint,
)


def expert_mlp(
    x_TD: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    *,
    expert_TX: jax.Array,
    gate_TX: jax.Array,
    shared_TD: jax.Array | None = None,
    weight_scales: WeightScales | None = None,
    group: jax.Array | None = None,
    backend: Backend | None = None,
) -> jax.Array:
    """Apply to each token the experts it chose: y = shared + sum over choices of Expert_e(g * x).

    The gate g scales the expert's input, not its output. Expert_e(z) = (silu(z W_gate) * (z W_up))
    W_down. No token is dropped, whatever the imbalance. Reverse-mode differentiable in x, the
    gates, the shared result and float matrices.

    Args:
        x_TD: tokens.
        w_gate_EDF: gate matrices, in the dtype of x or quantised.
        w_up_EDF: up matrices.
        w_down_EFD: down matrices.
        expert_TX: int32 expert of each choice; an id outside 0..E-1 contributes nothing.
        gate_TX: gate of each choice.
        shared_TD: what to add to the result, such as the shared expert's; in the dtype of x.
        weight_scales: scales of quantised matrices (int8, int4 or float8_e4m3fn), whose layout is
            that of `WeightScales`. With float8 matrices activations are rounded to float8 too, with
            a scale for each row.
        group: int32 scalar; with it the matrices and scales are those of several layers, stacked
            along a leading axis, and this picks the layer; it must be one that there is. The
            matrices of experts that no token chose are then not even read, whereas slicing the
            stack outside would copy all of the layer's.
        backend: "tpu", "gpu" or "reference"; None is the best that takes these shapes here.

    Returns:
        y_TD in the dtype of x.

    Raises:
        ValueError: shapes or dtypes disagree.
        NotImplementedError: the named backend cannot compute this here, or a gradient is asked
            of quantised matrices.
    """
    given = Arguments.checked(
        x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, expert_TX, gate_TX, shared_TD, weight_scales, group
    )
    E, group = given.w_gate.shape[-3], given.group
    if not given.x_TD.size:
        return given.x_TD

    def flat(w: jax.Array) -> jax.Array:
        return w if group is None else w.reshape(-1, *w.shape[2:])

    x = Inputs(
        given.x_TD,
        flat(given.w_gate),
        flat(given.w_up),
        flat(given.w_down),
        given.expert_TX,
        given.gate_TX,
        jnp.int32(0) if group is None else group * E,
        given.shared_TD,
        jax.tree.map(flat, given.scales),
    )
    x = vary_alike(x)
    return _apply(_Static(choose(backend, "experts", x, E), E, occupancy_hint()), x)


class _Static(NamedTuple):
    """The static arguments of a call; see `inputs.cost_hint` for the occupancy."""

    backend: ModuleType
    num_experts: int
    occupancy: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(plan: _Static, x: Inputs) -> jax.Array:
    with cost_hint(occupancy=plan.occupancy):
        return plan.backend.forward(x, plan.num_experts, saves=False)[0]


def _apply_fwd(plan: _Static, x: Inputs) -> tuple[jax.Array, tuple[Inputs, Any, Any]]:
    if x.scales is not None:
        raise NotImplementedError("quantised matrices have no gradient; train float ones")
    with cost_hint(occupancy=plan.occupancy):
        y_TD, saved = plan.backend.forward(x, plan.num_experts, saves=True)
    has_shared = None if x.shared_TD is None else ()  # the structure tells, not a value
    return y_TD, (x._replace(shared_TD=None), saved, has_shared)


def _apply_bwd(
    plan: _Static, residuals: tuple[Inputs, Any, Any], dy_TD: jax.Array
) -> tuple[Inputs]:
    x, saved, has_shared = residuals
    with cost_hint(occupancy=plan.occupancy):  # the caller's has ended when gradients are traced
        dx, d_gate, d_up, d_down, dgate = plan.backend.backward(x, plan.num_experts, saved, dy_TD)
    shared = None if has_shared is None else dy_TD
    return (Inputs(dx, d_gate, d_up, d_down, None, dgate, None, shared, None),)  # type: ignore[arg-type]


_apply.defvjp(_apply_fwd, _apply_bwd)
