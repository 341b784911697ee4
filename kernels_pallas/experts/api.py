"""The mixture-of-experts operation: what it computes, and the checks that every backend shares."""

import jax

from kernels_pallas.experts import reference


def expert_mlp(
    x_TD: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    *,
    expert_TX: jax.Array,
    gate_TX: jax.Array,
    group: jax.Array | None = None,
) -> jax.Array:
    """Apply to each token the experts it chose: y = sum over choices of Expert_e(g * x).

    The gate g scales the expert's input, not its output. Expert_e(z) = (silu(z W_gate) * (z W_up))
    W_down. No token is dropped, whatever the imbalance.

    Args:
        x_TD: tokens.
        w_gate_EDF: gate matrices.
        w_up_EDF: up matrices.
        w_down_EFD: down matrices.
        expert_TX: int32 expert of each choice; an id outside 0..E-1 contributes nothing.
        gate_TX: gate of each choice.
        group: int32 scalar; with it the matrices are those of several layers, stacked along a
            leading axis, and this picks the layer. The matrices of experts that nobody chose are
            then not even read, whereas slicing the stack outside would copy all of the layer's.

    Returns:
        y_TD in the dtype of x.

    Raises:
        ValueError: shapes disagree.
    """
    (T, D), (E, _, F), X = x_TD.shape, w_gate_EDF.shape[-3:], expert_TX.shape[-1]
    stack = () if group is None else w_gate_EDF.shape[:1]
    expected = {
        "w_gate_EDF": (w_gate_EDF.shape, (*stack, E, D, F)),
        "w_up_EDF": (w_up_EDF.shape, (*stack, E, D, F)),
        "w_down_EFD": (w_down_EFD.shape, (*stack, E, F, D)),
        "expert_TX": (expert_TX.shape, (T, X)),
        "gate_TX": (gate_TX.shape, (T, X)),
    }
    for name, (shape, wanted) in expected.items():
        if shape != wanted:
            raise ValueError(f"{name} has shape {shape} but x_TD {x_TD.shape} asks for {wanted}")
    return reference.expert_mlp(
        x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, expert_TX=expert_TX, gate_TX=gate_TX, group=group
    )
