"""The mixture-of-experts operation: what it computes, and the checks that every backend shares."""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.backend import Backend, choose, vary_alike
from kernels_pallas.experts.inputs import INT4_GROUP, Inputs, WeightScales


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
        shared_TD: what to add to the result, such as the shared expert's.
        weight_scales: scales of quantised matrices (int8, int4 or float8_e4m3fn), whose layout is
            that of `WeightScales`. With float8 matrices activations are rounded to float8 too, with
            a scale for each row.
        group: int32 scalar; with it the matrices and scales are those of several layers, stacked
            along a leading axis, and this picks the layer. The matrices of experts that nobody
            chose are then not even read, whereas slicing the stack outside would copy all of the
            layer's.
        backend: "tpu", "gpu" or "reference"; None is the best that takes these shapes here.

    Returns:
        y_TD in the dtype of x.

    Raises:
        ValueError: shapes or dtypes disagree.
        NotImplementedError: the named backend cannot compute this here, or a gradient is asked
            of quantised matrices.
    """
    (T, D), E, X = x_TD.shape, w_gate_EDF.shape[-3], expert_TX.shape[-1]
    is_int4 = weight_scales is not None and weight_scales.gate.ndim == w_gate_EDF.ndim
    F = w_gate_EDF.shape[-1]
    stack = () if group is None else w_gate_EDF.shape[:1]
    halves = 2 if is_int4 else 1
    expected: dict[str, tuple[jax.Array, tuple]] = {
        "w_gate_EDF": (w_gate_EDF, (*stack, E, D // halves, F)),
        "w_up_EDF": (w_up_EDF, (*stack, E, D // halves, F)),
        "w_down_EFD": (w_down_EFD, (*stack, E, F // halves, D)),
        "expert_TX": (expert_TX, (T, X)),
        "gate_TX": (gate_TX, (T, X)),
    }
    if shared_TD is not None:
        expected["shared_TD"] = (shared_TD, (T, D))
    if weight_scales is not None:
        ins, out = ((D // INT4_GROUP,), (F // INT4_GROUP,)) if is_int4 else ((), ())
        expected["weight_scales.gate"] = (weight_scales.gate, (*stack, E, *ins, F))
        expected["weight_scales.up"] = (weight_scales.up, (*stack, E, *ins, F))
        expected["weight_scales.down"] = (weight_scales.down, (*stack, E, *out, D))
    for name, (array, wanted) in expected.items():
        if array.shape != wanted:
            raise ValueError(f"{name} has shape {array.shape}; x_TD {x_TD.shape} asks for {wanted}")
    _check_dtypes(x_TD, (w_gate_EDF, w_up_EDF, w_down_EFD), weight_scales)

    def flat(w: jax.Array) -> jax.Array:
        return w.reshape(-1, *w.shape[1 + len(stack) :])

    x = Inputs(
        x_TD,
        flat(w_gate_EDF),
        flat(w_up_EDF),
        flat(w_down_EFD),
        jnp.asarray(expert_TX, jnp.int32),
        gate_TX,
        jnp.int32(0) if group is None else jnp.asarray(group, jnp.int32) * E,
        shared_TD,
        None if weight_scales is None else WeightScales(*map(flat, weight_scales)),
    )
    x = vary_alike(x)
    return _apply(choose(backend, "experts", x, E), E, x)


def _check_dtypes(
    x_TD: jax.Array, weights: tuple[jax.Array, ...], scales: WeightScales | None
) -> None:
    dtypes = {w.dtype for w in weights}
    if len(dtypes) > 1:
        raise ValueError(f"the matrices are of {sorted(map(str, dtypes))}; give them one dtype")
    (dtype,) = dtypes
    is_quantized = dtype in (jnp.int8, jnp.float8_e4m3fn)
    if is_quantized != (scales is not None):
        remedy = "needs weight_scales" if is_quantized else "takes no weight_scales"
        raise ValueError(f"a matrix of {dtype} {remedy}")
    if not is_quantized and dtype != x_TD.dtype:
        raise ValueError(f"x_TD is {x_TD.dtype} and the matrices {dtype}; cast one of them")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apply(chosen: ModuleType, num_experts: int, x: Inputs) -> jax.Array:
    return chosen.forward(x, num_experts, saves=False)[0]


def _apply_fwd(chosen: ModuleType, num_experts: int, x: Inputs):
    if x.scales is not None:
        raise NotImplementedError("quantised matrices have no gradient; train float ones")
    y_TD, saved = chosen.forward(x, num_experts, saves=True)
    has_shared = None if x.shared_TD is None else ()  # the structure tells, not a value
    return y_TD, (x._replace(shared_TD=None), saved, has_shared)


def _apply_bwd(
    chosen: ModuleType, num_experts: int, residuals: tuple[Inputs, Any, Any], dy_TD: jax.Array
) -> tuple[Inputs]:
    x, saved, has_shared = residuals
    dx, d_gate, d_up, d_down, dgate = chosen.backward(x, num_experts, saved, dy_TD)
    shared = None if has_shared is None else dy_TD
    return (Inputs(dx, d_gate, d_up, d_down, None, dgate, None, shared, None),)  # type: ignore[arg-type]


_apply.defvjp(_apply_fwd, _apply_bwd)
