import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.experts import reference
from kernels_pallas.experts.api import expert_mlp

D, F = 12, 20
# (tokens, experts, experts per token, how tokens choose)
CASES = {
    "one_token": (1, 4, 1, "random"),
    "odd": (37, 4, 1, "random"),
    "one_hot_expert": (50, 4, 1, "hot"),
    "empty_experts": (5, 16, 1, "random"),
    "two_choices": (33, 4, 2, "random"),
    "many_experts": (64, 128, 1, "random"),
    "several_blocks": (700, 2, 1, "random"),
    "not_ours": (40, 4, 1, "foreign"),
}


def make(case):
    T, E, X, how = CASES[case]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(T, D))
    w_gate, w_up = rng.normal(size=(2, E, D, F)) * D**-0.5
    w_down = rng.normal(size=(E, F, D)) * F**-0.5
    expert = np.stack([rng.permutation(E)[:X] for _ in range(T)])
    if how == "hot":
        expert = np.full((T, X), E - 1)
    if how == "foreign":
        expert = rng.integers(-E, 2 * E, size=(T, X))
    gate = rng.uniform(0.1, 1, size=(T, X))
    return (x, w_gate, w_up, w_down), expert, gate


def dense(x, w_gate, w_up, w_down, expert, gate):
    """Every expert on every token, in float64: the definition."""
    out = np.zeros_like(x)
    for t, k in np.ndindex(expert.shape):
        if 0 <= (e := expert[t, k]) < len(w_gate):
            z = gate[t, k] * x[t]
            a = z @ w_gate[e]
            out[t] += (a / (1 + np.exp(-a)) * (z @ w_up[e])) @ w_down[e]
    return out


def run(arrays, expert, gate):
    return expert_mlp(*arrays, expert_TX=expert, gate_TX=gate)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition_in_float64(case):
    arrays, expert, gate = make(case)
    ours = jax.jit(run)([jnp.float32(a) for a in arrays], jnp.int32(expert), jnp.float32(gate))
    np.testing.assert_allclose(ours, dense(*arrays, expert, gate), atol=1e-5)  # float32 sums of 20


@pytest.mark.parametrize("case", ["odd", "two_choices", "one_hot_expert", "not_ours"])
def test_gradients_equal_those_of_a_dense_mixture(case):
    arrays, expert, gate = make(case)
    arrays = [jnp.float32(a) for a in arrays]
    gate, expert = jnp.float32(gate), jnp.int32(expert)

    def dense_jax(arrays, gate):
        x, w_gate, w_up, w_down = arrays
        z_TXD = gate[..., None] * x[:, None]
        chosen = jax.nn.one_hot(expert, len(w_gate))
        h = jax.nn.silu(jnp.einsum("TXD,EDF->TXEF", z_TXD, w_gate))
        h = h * jnp.einsum("TXD,EDF->TXEF", z_TXD, w_up)
        return jnp.einsum("TXEF,EFD,TXE->TD", h, w_down, chosen)

    probe = jnp.cos(jnp.arange(arrays[0].size, dtype=jnp.float32)).reshape(arrays[0].shape)
    ours = jax.jit(jax.grad(lambda a, g: (run(a, expert, g) * probe).sum(), (0, 1)))(arrays, gate)
    theirs = jax.jit(jax.grad(lambda a, g: (dense_jax(a, g) * probe).sum(), (0, 1)))(arrays, gate)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_gate_scales_the_input_and_not_the_output():
    arrays, expert, gate = make("odd")
    ours = run([jnp.float32(a) for a in arrays], jnp.int32(expert), jnp.float32(gate))
    on_output = gate * dense(*arrays, expert, np.ones_like(gate))
    assert np.abs(ours - on_output).max() > 0.1


def test_permuting_experts_changes_nothing():
    arrays, expert, gate = make("odd")
    x, *weights = [jnp.float32(a) for a in arrays]
    order = np.array([2, 0, 3, 1])
    moved = [x, *(w[order] for w in weights)]
    renamed = np.argsort(order)[expert]
    a = run([x, *weights], jnp.int32(expert), jnp.float32(gate))
    b = run(moved, jnp.int32(renamed), jnp.float32(gate))
    np.testing.assert_array_equal(a, b)


def test_order_of_tokens_changes_nothing():
    (x, *weights), expert, gate = make("odd")
    x, expert, gate = jnp.float32(x), jnp.int32(expert), jnp.float32(gate)
    weights = [jnp.float32(w) for w in weights]
    order = np.random.default_rng(1).permutation(len(x))
    a = run([x, *weights], expert, gate)[order]
    b = run([x[order], *weights], expert[order], gate[order])
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_no_product_grows_with_experts_times_tokens(direction):
    T, E = 64, 16
    shapes = [(T, D), (E, D, F), (E, D, F), (E, F, D)]
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    expert = jax.ShapeDtypeStruct((T, 1), jnp.int32)
    gate = jax.ShapeDtypeStruct((T, 1), jnp.float32)

    def loss(arrays, expert, gate):
        return run(arrays, expert, gate).sum()

    function = loss if direction == "forward" else jax.grad(loss)
    text = str(jax.make_jaxpr(function)(arrays, expert, gate))
    products = re.findall(r"f32\[([\d,]+)\] = dot_general", text)
    assert products
    largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in products)
    assert largest <= max(T // E * F, D * F)  # one block of rows, or one expert's gradient


def test_blocks_are_about_an_experts_mean_share_and_bounded():
    assert reference._block_rows(1, 16) == 1
    assert reference._block_rows(1024, 16) == 64
    assert reference._block_rows(1 << 20, 16) == reference.MAX_BLOCK


def test_shapes_that_disagree_are_refused():
    arrays, expert, gate = make("odd")
    arrays = [jnp.float32(a) for a in arrays]
    with pytest.raises(ValueError, match="gate_TX has shape"):
        run(arrays, jnp.int32(expert), jnp.float32(gate)[:5])
