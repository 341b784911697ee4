import contextlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas import combine, dispatch, expert_mlp, grouped_matmul

T, D, F, E, X, LAYERS = 19, 128, 256, 3, 2, 2
# float32: sums of 256 products. bfloat16: results and hidden features are rounded to 8 bits.
TOLERANCE = {"float32": 3e-5, "bfloat16": 6e-2}
BACKENDS = [("reference", "float32"), ("tpu", "float32"), ("gpu", "bfloat16")]


def simulated(backend):
    return contextlib.nullcontext() if backend == "reference" else kernels_pallas.interpreted()


def problem(dtype, features=(D, F)):
    """x, matrices of all layers and gates; choices. From token 13 on no expert, and NaN."""
    rng, (D, F) = np.random.default_rng(0), features
    x = rng.normal(size=(T, D))
    w_gate, w_up = (rng.normal(size=(LAYERS * E, D, F)) * D**-0.5 for _ in range(2))
    w_down = rng.normal(size=(LAYERS * E, F, D)) * F**-0.5
    expert = np.int32(rng.integers(-1, E + 1, size=(T, X)))
    expert[13:] = E + np.arange(X)
    gate = rng.uniform(0.1, 1, size=(T, X))
    x[13:], gate[13:] = np.nan, np.nan
    return tuple(jnp.asarray(a, dtype) for a in (x, w_gate, w_up, w_down, gate)), expert


def composed(x, w_gate, w_up, w_down, gate, expert, first, backend):
    to = dispatch(expert, E)
    is_routed_R = jnp.arange(T * X) < to.group_sizes_E.sum()
    x_RD = x[to.order_R // X]
    g = jnp.where(is_routed_R, gate.reshape(-1)[to.order_R], 0)[:, None].astype(jnp.float32)
    a, b = (
        grouped_matmul(x_RD, w, to.group_sizes_E, first, backend=backend).astype(jnp.float32)
        for w in (w_gate, w_up)
    )
    hidden = (jax.nn.silu(g * a) * (g * b)).astype(x.dtype)
    hidden = jnp.where(is_routed_R[:, None], hidden, jnp.nan)  # of no expert: may be anything
    return combine(grouped_matmul(hidden, w_down, to.group_sizes_E, first, backend=backend), to, X)


def with_gradient(function, dy):
    def run(*arguments):
        y, pull = jax.vjp(function, *arguments)
        return y, *pull(jnp.asarray(dy, y.dtype))

    return jax.jit(run)


def check_composed(backend, dtype, features):
    arguments, expert = problem(dtype, features)
    first = jnp.int32((LAYERS - 1) * E)
    dy = np.random.default_rng(1).normal(size=(T, features[0]))
    dy[13:] = np.nan
    with simulated(backend):
        ours = with_gradient(lambda *a: composed(*a, expert, first, backend), dy)(*arguments)

    def mlp(x, *weights_and_gate):
        *weights, gate = weights_and_gate
        weights = (w[-E:] for w in weights)
        return expert_mlp(x, *weights, expert_TX=expert, gate_TX=gate, backend="reference")

    theirs = with_gradient(mlp, dy)(*(a.astype(jnp.float32) for a in arguments))
    for name, a, b in zip(("y", "dx", "dgate", "dup", "ddown", "dg"), ours, theirs, strict=True):
        assert np.isfinite(np.float32(a)).all(), name
        np.testing.assert_allclose(
            np.float32(a), b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], err_msg=name
        )


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_the_pieces_make_up_expert_mlp_and_its_gradient(backend, dtype):
    check_composed(backend, dtype, (128, 64) if backend == "gpu" else (D, F))


def test_tpu_kernels_copy_no_stacked_matrices_to_fill_lanes():
    (x, w_gate, *_), _ = problem("float32", features=(24, 40))
    with kernels_pallas.interpreted(), pytest.raises(NotImplementedError, match="stacked"):
        grouped_matmul(x, w_gate, np.int32([T, 0, 0]), backend="tpu")


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS[:2])
def test_rows_of_no_expert_are_zero_and_leak_nowhere(backend, dtype):
    D, F = 24, 40  # which fill no lanes
    rng, sizes, R = np.random.default_rng(2), np.int32([5, 0, 9]), 23
    x, dy = (rng.normal(size=(R, n)) for n in (D, F))
    w = rng.normal(size=(E, D, F)) * D**-0.5
    x, w, dy = (np.array(jnp.asarray(a, dtype)) for a in (x, w, dy))
    rows = [slice(0, 5), slice(5, 5), slice(5, 14)]
    x64, w64, dy64 = (np.float64(a) for a in (x, w, dy))
    y, dx = np.zeros((R, F)), np.zeros((R, D))
    for e, own in enumerate(rows):
        y[own], dx[own] = x64[own] @ w64[e], dy64[own] @ w64[e].T
    dw = np.stack([x64[own].T @ dy64[own] for own in rows])
    x[14:], dy[14:] = np.nan, np.nan
    with simulated(backend):
        got, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend=backend), x, w)
        gradients = pull(dy)
    for name, a, b in zip(("y", "dx", "dw"), (got, *gradients), (y, dx, dw), strict=True):
        np.testing.assert_allclose(
            np.float64(a), b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], err_msg=name
        )
    assert not np.asarray(got[14:]).any() and not np.asarray(gradients[0][14:]).any()


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS[:2])
def test_when_no_row_has_an_expert_everything_is_zero(backend, dtype):
    x, w = jnp.full((9, D), jnp.nan, dtype), jnp.ones((E, D, D), dtype)
    sizes = np.zeros(E, np.int32)
    with simulated(backend):
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend=backend), x, w)
        gradients = pull(jnp.full_like(y, jnp.nan))
    assert not any(np.asarray(a, np.float32).any() for a in (y, *gradients))


def test_the_page_uses_every_operation_and_its_experts_compute_what_it_says():
    """That all of its blocks run is a test of the house."""
    page = pathlib.Path(kernels_pallas.__file__).parent / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    names, used = {"jax": jax, "jnp": jnp}, set()
    for block in blocks:
        assert sum(map(bool, block.splitlines())) <= 10
        used |= {name for name in kernels_pallas.__all__ if f"{name}(" in block}
        if "expert" in block:
            exec(compile(block, page.name, "exec"), names)
        if "expert_mlp_parallel" in block:  # sharded, and not
            choices = {name: names[name] for name in ("expert_TX", "gate_TX")}
            apart = expert_mlp(*names["arrays"][:4], **choices)
            np.testing.assert_allclose(names["y_TD"], apart, atol=1e-5)
    unused = {"WeightScales", "interpreted", "reference_only"}
    assert used == {*kernels_pallas.__all__} - unused
    x, gate, expert = (np.float64(names[name]) for name in ("x_TD", "gate_TX", "expert_TX"))
    up, down = (np.float64(names[name]) for name in ("w_up_EDF", "w_down_EFD"))
    y = np.zeros_like(x)
    for t, k in np.ndindex(*expert.shape):
        e = int(expert[t, k])
        y[t] += gate[t, k] * (np.float64(jax.nn.gelu(x[t] @ up[e])) @ down[e])
    np.testing.assert_allclose(names["y_TD"], y, atol=1e-4)


def test_no_rows_are_no_rows():
    y = grouped_matmul(np.zeros((0, D)), np.zeros((E, D, F)), np.zeros(E, np.int32))
    assert y.shape == (0, F)


def test_the_pieces_take_numpy_arrays_and_keep_the_order_of_tokens():
    to = dispatch(np.int64([[1, 7], [0, 1], [-1, 0]]), 2)
    np.testing.assert_array_equal(to.group_sizes_E, [2, 2])
    np.testing.assert_array_equal(to.order_R, [2, 5, 0, 3, 1, 4])
    rows = np.float32([[1], [2], [3], [4], [np.nan], [np.nan]])
    y = combine(rows, jax.tree.map(np.asarray, to), 2)
    np.testing.assert_array_equal(y, [[3], [5], [2]])


def test_a_backend_that_is_named_runs_or_refuses():
    x, w, sizes = np.ones((4, D)), np.ones((E, D, F)), np.int32([1, 1, 1])
    with pytest.raises(NotImplementedError, match="needs a TPU"):
        grouped_matmul(x, w, sizes, backend="tpu")
    with kernels_pallas.interpreted(), pytest.raises(NotImplementedError, match="float32: wgmma"):
        grouped_matmul(x, w, sizes, backend="gpu")
    with pytest.raises(ValueError, match="unknown"):
        grouped_matmul(x, w, sizes, backend="cuda")


X4, W3, SIZES = np.ones((4, D)), np.ones((E, D, F)), np.int32([1, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X4[0], W3, SIZES), r"x_RD has shape \(128,\); reshape it to 2"),
        ((X4, W3[0], SIZES), "w_NDF has shape"),
        ((X4, W3.swapaxes(1, 2), SIZES), "asks for D of 128: transpose"),
        ((X4, jnp.asarray(W3, jnp.bfloat16), SIZES), "float32 and w_NDF bfloat16; cast one"),
        ((np.int8(X4), np.int8(W3), SIZES), "x_RD is int8; give one of"),
        ((X4, W3, np.float32(SIZES)), "group_sizes_E is float32; cast it"),
        ((X4, W3[:2], SIZES), "of 3 experts and w_NDF of 2 matrices"),
        ((X4, W3, SIZES[:0]), "of 0 experts"),
        ((X4, W3, SIZES, 1), r"first is 1; take one of 0\.\.0"),
        ((X4, W3, SIZES, 0.0), "first is float32; cast it"),
    ],
)
def test_arguments_that_disagree_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(*arguments)


def test_dispatch_and_combine_refuse_what_they_cannot_sort():
    expert = np.zeros((4, X), np.int32)
    with pytest.raises(ValueError, match="expert_TX is float32; cast it"):
        dispatch(np.float32(expert), E)
    with pytest.raises(ValueError, match="reshape it to 2"):
        dispatch(expert[0], E)
    with pytest.raises(ValueError, match="num_experts is 0"):
        dispatch(expert, 0)
    to = dispatch(expert, E)
    with pytest.raises(ValueError, match="4 rows and dispatch sorted 8"):
        combine(np.ones((4, D)), to, X)
    with pytest.raises(ValueError, match="experts_per_token is 3"):
        combine(np.ones((8, D)), to, 3)
