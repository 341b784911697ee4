"""A quantised weight and one with an adapter multiply like their dense selves, in every product."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax import parallel
from llama4_jax.layers.linear import (
    LowRank,
    Quantized,
    add_adapter,
    dense,
    look_up_rows,
    project,
    quantize,
    replace_weights,
)
from llama4_jax.layers.param import constant, is_parameter, leaf_name, normal, role_of
from llama4_jax.model import Cache, Llama4
from llama4_jax.train import adapters
from llama4_jax.train.trainable import combine, partition
from tests.tiny import scout_like

# Every product of the model: equation, sizes of the weight, axes, contracted, axes of the result.
PRODUCTS = {
    "queries": ("BTD,DNH->BTNH", (256, 2, 8), ("weight_embed", "q_heads", "head_dim"), (-3,)),
    "output": ("BTNH,NHD->BTD", (2, 128, 24), ("q_heads", "head_dim", "weight_embed"), (-3, -2)),
    "hidden": ("BTD,DF->BTF", (128, 24), ("weight_embed", "mlp"), (-2,)),
    "head": ("BTD,DV->BTV", (128, 24), ("weight_embed", "vocab"), (-2,)),
    "table": ("BTD,VD->BTV", (24, 128), ("vocab", "weight_embed"), (-1,)),
}
OUT = {"B": "batch", "T": "seq", "N": "q_heads", "F": "mlp", "V": "vocab"}


def make(name):
    """Return the equation, activations, a plain weight and the axes of the result."""
    equation, shape, axes, contracted = PRODUCTS[name]
    of_x, _, rest = equation.partition(",")
    of_w, result = rest.split("->")
    sizes = {"B": 2, "T": 3, **dict(zip(of_w, shape, strict=True))}
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], [sizes[letter] for letter in of_x])
    w = normal(keys[1], shape, axes, std=1.0, dtype="float32", contracted=contracted)
    return equation, x, w, tuple(OUT.get(letter) for letter in result)


def trained(w):
    """Give an adapter's B numbers, as training does."""
    b = w.b.replace(jax.random.normal(jax.random.key(2), w.b.shape) * 0.1)
    return LowRank(w.base, w.a, b, scale=w.scale)


def of_kind(w, kind):
    storage, _, adapter = kind.partition("+")
    w = quantize(w, storage) if storage in ("int8", "int4", "fp8") else w
    return trained(add_adapter(w, rank=3, alpha=6, key=jax.random.key(1))) if adapter else w


@pytest.mark.parametrize("kind", ["plain", "int8", "int4", "fp8", "plain+adapter", "int4+adapter"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_that_of_the_dense_matrix(name, kind):
    equation, x, w, out = make(name)
    used = of_kind(w, kind)
    found = project(equation, x, used, out=out)
    expected = jnp.einsum(equation, x, dense(used, jnp.dtype("float32")))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)  # another order of sums


@pytest.mark.parametrize(("storage", "most"), [("int8", 0.01), ("fp8", 0.04), ("int4", 0.12)])
@pytest.mark.parametrize("name", PRODUCTS)
def test_rounding_to_fewer_bits_costs_what_those_bits_cost(name, storage, most):
    _, _, w, _ = make(name)
    error = dense(quantize(w, storage), jnp.dtype("float32")) - w[...]
    assert 0 < jnp.linalg.norm(error) / jnp.linalg.norm(w[...]) < most


def test_an_adapter_changes_nothing_at_first_and_scale_a_b_later():
    _, _, w, _ = make("output")
    fresh = add_adapter(w, rank=3, alpha=6, key=jax.random.key(1))
    np.testing.assert_array_equal(dense(fresh, jnp.dtype("float32")), w[...])
    later = trained(fresh)
    expected = w[...] + 2.0 * jnp.einsum("NHr,rD->NHD", later.a[...], later.b[...])
    np.testing.assert_allclose(dense(later, jnp.dtype("float32")), expected, rtol=1e-6, atol=1e-6)


def test_rows_of_a_quantised_table_are_those_of_the_dense_one():
    _, _, w, _ = make("table")
    used, tokens_BT = quantize(w, "int8"), jnp.array([[3, 0, 23]])
    found = look_up_rows(used, tokens_BT, jnp.dtype("float32"))
    np.testing.assert_allclose(found, dense(used, jnp.dtype("float32"))[tokens_BT], rtol=1e-6)


@pytest.mark.parametrize("make_other", [lambda w: quantize(w, "int8"), lambda w: add_adapter(
    w, rank=1, alpha=1, key=jax.random.key(0))])  # fmt: skip
def test_what_no_product_takes_is_refused(make_other):
    scale_D = constant(1.0, (4,), ("weight_embed",), dtype="float32", role="norm")
    with pytest.raises(ValueError, match="role 'norm' is no matrix"):
        make_other(scale_D)


def test_int4_says_where_its_groups_do_not_fit():
    w = normal(jax.random.key(0), (96, 8), (None, "mlp"), std=1.0, dtype="float32")
    with pytest.raises(ValueError, match=r"128 input channels, and this matrix has 96 along None"):
        quantize(w, "int4")


# ---------------------------------------------------------------------------- in the whole model


def small_model():
    """Return a model whose hidden sizes are groups of int4."""
    config = scout_like(num_layers=2, moe_layers=(0, 1), nope_layers=(1,))
    text = dataclasses.replace(config.text, embed_dim=128, expert_dim=128, mlp_dim=128)
    config = dataclasses.replace(config, text=text, vision=None, dtype="float32")
    return Llama4(config, key=jax.random.key(0))


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def tokens_BT(model):
    return jax.random.randint(jax.random.key(3), (2, 12), 0, model.config.text.vocab_size)


def is_matrix(parameter):
    return role_of(parameter) in ("matrix", "router", "embedding")


def store(name, parameter):
    """Store experts in int4 and every other matrix in int8."""
    if not is_matrix(parameter):
        return parameter
    return quantize(parameter, "int4" if ".experts." in name else "int8")


def adapt(name, parameter):
    if role_of(parameter) != "matrix":
        return parameter
    key = jax.random.fold_in(jax.random.key(4), len(name))
    return trained(add_adapter(parameter, rank=2, alpha=2, key=key))


def stored_model(model):
    return replace_weights(model, store)


def adapted_model(model):
    return replace_weights(model, adapt)


def dense_model(model):
    """Return a model of plain parameters with the matrices that another's weights stand for."""

    def is_weight(node):
        return isinstance(node, nnx.Variable | Quantized | LowRank)

    def make_dense(node):
        if is_parameter(node):
            return node
        base = node.base if isinstance(node, LowRank) else node
        if isinstance(base, Quantized):
            array, axes, contracted = base.values, base.axes, base.contracted
        else:
            axes, contracted = base.get_metadata("axes"), base.get_metadata("contracted")
            array = base
        one = lambda w: dense(w, jnp.dtype("float32"))  # noqa: E731
        value = jax.vmap(one)(node) if array.ndim > len(axes) else one(node)
        return nnx.Param(value, axes=axes, role="matrix", contracted=contracted)

    return jax.tree.map(make_dense, model, is_leaf=is_weight)


@jax.jit
def logits(model, tokens_BT):
    return model(tokens_BT).logits_BTV


@jax.jit
def step(model, token_B1, cache):
    output = model(token_B1, cache=cache)
    return output.logits_BTV[:, 0], output.cache


def decoded(model, tokens_BT):
    """Return logits token after token, where stacked experts are read in place."""
    cache = Cache.create(model.config.text, batch_size=2, max_length=12, dtype="float32")
    found = []
    for t in range(4):
        logits_BV, cache = step(model, tokens_BT[:, t : t + 1], cache)
        found.append(logits_BV)
    return jnp.stack(found, 1)


@pytest.mark.parametrize("other", [stored_model, adapted_model])
@pytest.mark.parametrize("run", [logits, decoded])
def test_a_model_of_other_weights_equals_its_dense_self(model, tokens_BT, other, run):
    changed = other(model)
    found, expected = run(changed, tokens_BT), run(dense_model(changed), tokens_BT)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-4)  # other orders of sums
    assert jnp.abs(found - run(model, tokens_BT)).max() > 1e-2


def test_stored_experts_are_read_as_they_are_stored_when_decoding(model, monkeypatch):
    from llama4_jax.parallel import experts

    seen = []
    plain = experts.expert_mlp
    monkeypatch.setattr(
        experts, "expert_mlp",
        lambda *a, **how: seen.append((a[1].dtype, how["weight_scales"])) or plain(*a, **how),
    )  # fmt: skip
    cache = Cache.create(model.config.text, batch_size=2, max_length=12, dtype="float32")
    arguments = stored_model(model), jnp.zeros((2, 1), jnp.int32), cache
    jax.eval_shape(lambda *a: step.__wrapped__(*a), *arguments)  # traced anew
    assert seen and all(dtype == jnp.int8 and scales is not None for dtype, scales in seen)


def test_gradients_of_adapters_are_those_of_the_merged_model(model, tokens_BT):
    changed = adapted_model(model)
    trained_part, frozen = partition(changed, adapters)

    def loss(trained_part, merge):
        whole = combine(trained_part, frozen)
        return jnp.mean(jnp.square((dense_model(whole) if merge else whole)(tokens_BT).logits_BTV))

    found = jax.jit(jax.grad(lambda p: loss(p, False)))(trained_part)
    expected = jax.jit(jax.grad(lambda p: loss(p, True)))(trained_part)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for mine, other in pairs:
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-5)
    assert len(jax.tree.leaves(found)) == 2 * sum(
        role_of(p) == "matrix" for p in jax.tree.leaves(model, is_leaf=is_parameter)
    )


def test_an_adapter_on_a_stored_matrix_gets_its_gradient_and_the_matrix_none():
    equation, x, w, out = make("hidden")
    used = of_kind(w, "int8+adapter")
    trained_part, frozen = partition({"w": used}, adapters)
    assert len(jax.tree.leaves(trained_part)) == 2 and len(jax.tree.leaves(frozen)) == 2

    def loss(part, merge):
        whole = combine(part, frozen)["w"]
        if merge:
            return jnp.square(jnp.einsum(equation, x, dense(whole, jnp.dtype("float32")))).mean()
        return jnp.square(project(equation, x, whole, out=out)).mean()

    found, expected = (jax.grad(loss)(trained_part, merge) for merge in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected)


def test_a_mesh_changes_neither_stored_nor_adapted_weights(model, tokens_BT):
    def change(model):
        return replace_weights(
            model, lambda name, p: adapt(name, p) if ".attention." in name else store(name, p)
        )

    expected = logits(change(model), tokens_BT)
    with parallel.use_mesh(parallel.make_mesh("expert:2,tensor:2"), parallel.PRESETS["tensor"]):
        found = logits(jax.jit(lambda: change(small_model()))(), tokens_BT)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-4)


def test_every_parameter_says_its_role_and_its_axes(model):
    for path, node in jax.tree_util.tree_leaves_with_path(model, is_leaf=is_parameter):
        assert role_of(node) is not None, leaf_name(path)
        stack = node.ndim - len(node.get_metadata("axes"))
        assert stack in (0, 1), leaf_name(path)
