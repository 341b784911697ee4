import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas.experts import quantize, reference
from kernels_pallas.experts.api import expert_mlp
from kernels_pallas.experts.inputs import WeightScales

D, F = 128, 256
# float32: sums of 256 products beside values of about 2. bfloat16: results and hidden features are
# rounded to 8 bits, and gradients of matrices add up hundreds of such.
TOLERANCE = {"float32": 3e-5, "bfloat16": 6e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One problem.

    Attributes:
      name: what it shows.
      tokens, experts, choices: sizes.
      how: tokens choose at "random"; all the last expert ("hot"); only odd experts ("odd"); also
        experts of other devices ("foreign"), which counts for nothing; "padding" has no expert
        and holds NaN, gates included.
      layers: stacked layers, of which the last is meant; 0 for none.
      shared: whether something is added.
      features: of tokens and of hidden rows.
    """

    name: str
    tokens: int
    experts: int = 4
    choices: int = 1
    how: str = "random"
    layers: int = 0
    shared: bool = False
    features: tuple[int, int] = (D, F)

    def build(self, dtype):
        """x, matrices, gate, shared, dy in the dtype, and the choices."""
        rng = np.random.default_rng(0)
        (T, E, X), (D, F) = (self.tokens, self.experts, self.choices), self.features
        stack = (self.layers,) if self.layers else ()
        x = rng.normal(size=(T, D))
        w_gate, w_up = (rng.normal(size=(*stack, E, D, F)) * D**-0.5 for _ in range(2))
        w_down = rng.normal(size=(*stack, E, F, D)) * F**-0.5
        expert = np.stack([rng.permutation(E)[:X] for _ in range(T)])
        if self.how == "hot":
            expert = np.full((T, X), E - 1)
        if self.how == "odd":
            expert = expert // 2 * 2 + 1
        if self.how == "foreign":
            expert = rng.integers(-E, 2 * E, size=(T, X))
        if self.how == "padding":
            expert[T // 3 :] = E
            x[T // 3 :] = np.nan
        gate = rng.uniform(0.1, 1, size=(T, X))
        gate[np.isnan(x).all(1)] = np.nan
        shared, dy = rng.normal(size=(2, T, D))
        arrays = (x, w_gate, w_up, w_down, gate, shared, dy)
        return [jnp.asarray(a, dtype) for a in arrays], np.int32(expert)


CASES = [
    Case(name="one_token", tokens=1),
    Case(name="odd_number_of_tokens", tokens=37, shared=True),
    Case(name="one_hot_expert", tokens=50, how="hot"),
    Case(name="empty_experts", tokens=20, experts=16, how="odd"),
    Case(name="two_choices", tokens=33, choices=2, shared=True),
    Case(name="many_experts", tokens=64, experts=128),
    Case(name="several_blocks", tokens=300, experts=2),
    Case(name="experts_of_other_devices", tokens=40, how="foreign"),
    Case(name="padding_that_is_not_a_number", tokens=40, how="padding"),
    Case(name="one_of_stacked_layers", tokens=21, layers=3),
]


def silu(a):
    return a / (1 + np.exp(-a))


def definition(arrays, expert, layers):
    """y, and the gradients of sum(y * dy), in float64 and expert by expert."""
    x, *weights, gate, shared, dy = (np.asarray(a, np.float64) for a in arrays)
    w_gate, w_up, w_down = (w[-1] for w in weights) if layers else weights
    x, gate = np.nan_to_num(x), np.nan_to_num(gate)
    y, dx, dgate = shared.copy(), np.zeros_like(x), np.zeros_like(gate)
    d_weights = [np.zeros_like(w) for w in (w_gate, w_up, w_down)]
    for e in range(len(w_gate)):
        t, k = np.nonzero(expert == e)
        g, a, b = gate[t, k][:, None], x[t] @ w_gate[e], x[t] @ w_up[e]
        h, dh = silu(g * a) * (g * b), dy[t] @ w_down[e].T
        np.add.at(y, t, h @ w_down[e])
        sigma = 1 / (1 + np.exp(-g * a))
        da, db = dh * g * b * (sigma + g * a * sigma * (1 - sigma)), dh * silu(g * a)
        dgate[t, k] = (a * da + b * db).sum(1)
        np.add.at(dx, t, g * (da @ w_gate[e].T + db @ w_up[e].T))
        for total, left, right in zip(
            d_weights, (x[t], x[t], h), (g * da, g * db, dy[t]), strict=True
        ):
            total[e] = left.T @ right
    if layers:
        d_weights = [np.concatenate([np.zeros((layers - 1, *w.shape)), w[None]]) for w in d_weights]
    return y, dx, *d_weights, dgate, dy


def run(case, arrays, expert, backend):
    *arguments, dy = arrays

    def apply(x, w_gate, w_up, w_down, gate, shared):
        return expert_mlp(
            x,
            w_gate,
            w_up,
            w_down,
            expert_TX=expert,
            gate_TX=gate,
            shared_TD=shared if case.shared else None,
            group=jnp.int32(case.layers - 1) if case.layers else None,
            backend=backend,
        )

    y, pull = jax.vjp(apply, *arguments)
    return y, *pull(dy)


def simulated(backend):
    return contextlib.nullcontext() if backend == "reference" else kernels_pallas.interpreted()


def check(case, backend, dtype):
    arrays, expert = case.build(dtype)
    if not case.shared:
        arrays[5] = jnp.zeros_like(arrays[5])
    want = definition(arrays, expert, case.layers)
    with simulated(backend):
        got = jax.jit(lambda arrays: run(case, arrays, expert, backend))(arrays)
    names = ("y", "dx", "dw_gate", "dw_up", "dw_down", "dgate", "dshared")
    if not case.shared:
        got, want = got[:-1], want[:-1]
    for name, a, b in zip(names, got, want, strict=False):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], err_msg=name
        )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_equals_the_definition(case):
    check(case, "reference", "float32")


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_reference_takes_bfloat16(case):
    check(case, "reference", "bfloat16")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tpu_kernels_equal_the_definition_in_the_interpreter(case):
    check(case, "tpu", "float32")


@pytest.mark.parametrize("case", [CASES[4], CASES[7]], ids=lambda case: case.name)
def test_tpu_kernels_take_bfloat16_in_the_interpreter(case):
    check(case, "tpu", "bfloat16")  # a tile of memory has 16 rows, and 8 of float32


def test_tpu_kernels_take_features_that_fill_no_lanes():
    narrow = Case(name="narrow", tokens=9, choices=2, shared=True, features=(72, 160))
    check(narrow, "tpu", "float32")
    with pytest.raises(NotImplementedError, match="stacked"):  # which it would copy for one layer
        check(dataclasses.replace(narrow, layers=2), "tpu", "float32")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.experts > 64 else [])
        for case in CASES
    ],
)
def test_gpu_kernels_equal_the_definition_in_the_interpreter(case):
    check(case, "gpu", "bfloat16")


QUANTIZE = {
    "int8": quantize.quantize_int8,
    "fp8": quantize.quantize_fp8,
    "int4": quantize.quantize_int4,
}


def real_matrices(kind, stored, scales):
    if kind == "int4":
        return quantize.unpack_int4(stored, scales)
    return stored.astype(jnp.float32) * scales[..., None, :]


def check_quantized(backend, kind, tokens, layers, dtype):
    case = Case(name=kind, tokens=tokens, choices=2, layers=layers, how="foreign")
    (x, *weights, gate, _, _), expert = case.build(dtype)
    stored, scales = zip(*(QUANTIZE[kind](w) for w in weights), strict=True)
    group = jnp.int32(layers - 1) if layers else None

    def apply(matrices, scales, backend, x):
        return expert_mlp(
            x,
            *matrices,
            expert_TX=expert,
            gate_TX=gate.astype(x.dtype),
            weight_scales=scales,
            group=group,
            backend=backend,
        )

    with simulated(backend):
        ours = jax.jit(lambda m, s: apply(m, s, backend, x))(stored, WeightScales(*scales))
    real = [real_matrices(kind, w, s) for w, s in zip(stored, scales, strict=True)]
    theirs = apply(real, None, "reference", x.astype(jnp.float32))
    # float8 rounds activations to 3 bits of fraction: a relative 2^-4 each, of which a sum of 128
    # keeps a quarter or so beside values of about 1.
    tolerance = 0.25 if kind == "fp8" else TOLERANCE[dtype]
    np.testing.assert_allclose(np.float32(ours), theirs, atol=tolerance)


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("tokens", [1, 45])
@pytest.mark.parametrize("kind", QUANTIZE)
def test_reference_reads_quantised_matrices(kind, tokens, layers):
    check_quantized("reference", kind, tokens, layers, "float32")


@pytest.mark.parametrize(
    ("kind", "backend", "dtype"),
    [
        *((kind, "tpu", "float32") for kind in QUANTIZE),
        ("int4", "tpu", "bfloat16"),
        *((kind, "gpu", "bfloat16") for kind in QUANTIZE),
    ],
)
def test_kernels_read_quantised_matrices_in_the_interpreter(kind, backend, dtype):
    check_quantized(backend, kind, 45, 2, dtype)


def forward(arrays, expert, backend="reference"):
    x, w_gate, w_up, w_down, gate, *_ = arrays
    return expert_mlp(x, w_gate, w_up, w_down, expert_TX=expert, gate_TX=gate, backend=backend)


@pytest.fixture
def products(monkeypatch):
    """Let products of matrices add up their terms in one order, wherever a row stands.

    The order in which a processor's own products do is not the kernels' to say. Terms of bfloat16
    are exact in float32, so whether a processor fuses them into sums changes nothing either.
    """
    seen = []

    def product(x_KM, y_KN):
        seen.append(x_KM.shape)
        return (x_KM[:, :, None] * y_KN[:, None]).sum(0)

    def dot_general(x, y, dimensions, **_):
        ((of_x,), (of_y,)), _ = dimensions
        return product(*(jnp.moveaxis(jnp.float32(a), k, 0) for a, k in ((x, of_x), (y, of_y))))

    def dot_f32(equation, x, y):
        of_x, of_y = equation.split("->")[0].split(",")
        (k,) = set(of_x) & set(of_y)
        return dot_general(x, y, (((of_x.index(k),), (of_y.index(k),)), ((), ())))

    def matmul(x, y, dtype):
        return product(x.T.astype(dtype), y.astype(dtype))

    monkeypatch.setattr(reference, "dot_f32", dot_f32)
    monkeypatch.setattr(jax.lax, "dot_general", dot_general)  # of the kernels for TPUs
    monkeypatch.setattr(np, "matmul", matmul)  # of the interpreter of GPUs
    return seen


@pytest.mark.parametrize("backend", ["reference", "tpu", "gpu"])
def test_the_order_of_tokens_changes_no_bit_of_the_result_nor_of_dx(backend, products):
    # Three choices of a token, added to what is shared: two alone could change places.
    case = Case(name="", tokens=75, choices=3)
    (x, *weights, gate, shared, dy), expert = case.build("bfloat16")
    order = np.random.default_rng(1).permutation(len(x))

    @jax.jit  # leaves out the gradients that nobody asks for
    def result_and_dx(x, gate, shared, expert, dy):
        def apply(x):
            how = {"expert_TX": expert, "gate_TX": gate, "shared_TD": shared}
            return expert_mlp(x, *weights, **how, backend=backend)

        y, pull = jax.vjp(apply, x)
        return y, *pull(dy)

    arrays = (x, gate, shared, expert, dy)
    with simulated(backend):
        plain, other = result_and_dx(*arrays), result_and_dx(*(a[order] for a in arrays))
    assert products
    for a, b in zip(plain, other, strict=True):
        np.testing.assert_array_equal(np.float32(a)[order], np.float32(b))


def test_gate_scales_the_input_and_not_the_output():
    arrays, expert = Case(name="", tokens=9).build("float32")
    x, w_gate, w_up, w_down, gate, *_ = arrays
    ungated = forward((x, w_gate, w_up, w_down, jnp.ones_like(gate)), expert)
    assert jnp.abs(forward(arrays, expert) - gate * ungated).max() > 0.1


def test_permuting_experts_changes_nothing():
    (x, *weights, gate, _, _), expert = Case(name="", tokens=37).build("float32")
    order = np.array([2, 0, 3, 1])
    a = forward((x, *weights, gate), expert)
    b = forward((x, *(w[order] for w in weights), gate), np.argsort(order)[expert])
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_no_product_grows_with_experts_times_tokens(direction):
    T, E = 64, 16
    arrays, expert = Case(name="", tokens=T, experts=E).build("float32")
    loss = lambda x: forward((x, *arrays[1:]), expert).sum()  # noqa: E731
    text = str(jax.make_jaxpr(loss if direction == "forward" else jax.grad(loss))(arrays[0]))
    products = re.findall(r"f32\[([\d,]+)\] = dot_general", text)
    assert products
    largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in products)
    assert largest <= max(T // E * F, D * F)  # one block of rows, or one expert's gradient


def test_blocks_are_about_an_experts_mean_share_and_bounded():
    assert reference.block_rows(1, 16) == 1
    assert reference.block_rows(1024, 16) == 64
    assert reference.block_rows(1 << 20, 16) == reference.MAX_BLOCK


def test_int4_is_packed_and_saturates_as_meta_has_it():
    w = np.zeros((1, 128, 1), np.float32)
    w[0, :4, 0] = [8, -8, 3, -1]
    packed, scale = quantize.quantize_int4(jnp.asarray(w))
    assert scale.shape == (1, 1, 1) and float(scale[0, 0, 0]) == 1
    assert [int(b) & 0xFF for b in packed[0, :2, 0]] == [0x87, 0xF3]  # 7 and -8; 3 and -1
    np.testing.assert_array_equal(quantize.unpack_int4(packed, scale)[0, :4, 0], [7, -8, 3, -1])


def test_arguments_that_disagree_are_refused():
    (x, w_gate, w_up, w_down, gate, shared, _), expert = Case(name="", tokens=9).build("float32")
    with pytest.raises(ValueError, match="gate_TX has shape"):
        forward((x, w_gate, w_up, w_down, gate[:5]), expert)
    with pytest.raises(ValueError, match="int8 needs weight_scales"):
        forward((x, *(w.astype(jnp.int8) for w in (w_gate, w_up, w_down)), gate), expert)
    with pytest.raises(ValueError, match="x_TD is bfloat16 and the matrices float32"):
        forward((x.astype(jnp.bfloat16), w_gate, w_up, w_down, gate), expert)
    with pytest.raises(ValueError, match="give them one dtype"):
        forward((x, w_gate, w_up, w_down.astype(jnp.bfloat16), gate), expert)
    stored, scales = zip(*map(quantize.quantize_int8, (w_gate, w_up, w_down)), strict=True)
    how = {"expert_TX": expert, "gate_TX": gate, "weight_scales": WeightScales(*scales)}
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda x: expert_mlp(x, *stored, **how).sum())(x)
    with pytest.raises(ValueError, match="multiple"):
        quantize.quantize_int4(w_gate[:, :100])
