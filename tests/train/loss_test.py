import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama4_jax import parallel
from llama4_jax.model.likelihood import logprobs_of_logits, token_logprobs
from llama4_jax.train.loss import sum_over_tokens

B, T, D, V = 4, 12, 8, 32


def make_inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    x_BTD = jax.random.normal(keys[0], (B, T, D))
    w_DV = jax.random.normal(keys[1], (D, V))
    targets_BT = jax.random.randint(keys[2], (B, T), 0, V)
    weights_BT = (jax.random.uniform(keys[3], (B, T)) > 0.3).astype(jnp.float32)
    return x_BTD, w_DV, targets_BT, weights_BT


def mean_nll(x_BTD, w_DV, targets_BT, weights_BT, *, chunks):
    found = token_logprobs(x_BTD, targets_BT, unembed=lambda x: x @ w_DV, chunks=chunks)
    sums = sum_over_tokens(found, weights_BT)
    return sums.mean(sums.nll)


def test_the_loss_is_the_mean_cross_entropy_of_the_counted_tokens():
    x_BTD, w_DV, targets_BT, weights_BT = make_inputs()
    each_BT = optax.softmax_cross_entropy_with_integer_labels(x_BTD @ w_DV, targets_BT)
    expected = jnp.sum(each_BT * weights_BT) / jnp.sum(weights_BT)
    found = mean_nll(x_BTD, w_DV, targets_BT, weights_BT, chunks=1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("chunks", [2, 3, 12])
def test_chunks_change_neither_loss_nor_gradient(chunks):
    inputs = make_inputs()
    whole = jax.value_and_grad(mean_nll, argnums=(0, 1))(*inputs, chunks=1)
    cut = jax.value_and_grad(mean_nll, argnums=(0, 1))(*inputs, chunks=chunks)
    # Sums in another order differ in the last bits of float32.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), whole, cut)


def test_chunks_keep_whole_logits_out_of_memory():
    def peak(chunks):
        step = jax.jit(jax.grad(lambda x, w, t, m: mean_nll(x, w, t, m, chunks=chunks), (0, 1)))
        shapes = [
            jax.ShapeDtypeStruct(s, d)
            for s, d in [((8, 256, 16), "float32"), ((16, 4096), "float32"), ((8, 256), "int32"),
                         ((8, 256), "float32")]
        ]  # fmt: skip
        return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    logits = 8 * 256 * 4096 * 4
    assert peak(1) > logits
    assert peak(16) < logits / 4


def test_uncounted_tokens_change_nothing():
    x_BTD, w_DV, targets_BT, _ = make_inputs()
    weights_BT = jnp.zeros((B, T)).at[:, :5].set(1.0)
    changed_BT = targets_BT.at[:, 5:].set(0)
    expected = mean_nll(x_BTD, w_DV, targets_BT, weights_BT, chunks=3)
    assert mean_nll(x_BTD, w_DV, changed_BT, weights_BT, chunks=3) == expected


def test_a_batch_without_counted_tokens_has_loss_and_gradient_zero():
    x_BTD, w_DV, targets_BT, _ = make_inputs()
    nothing_BT = jnp.zeros((B, T))
    loss, gradient = jax.value_and_grad(mean_nll)(x_BTD, w_DV, targets_BT, nothing_BT, chunks=2)
    assert loss == 0
    assert not jnp.any(gradient)


def test_bfloat16_logits_are_summed_in_float32():
    x_BTD, w_DV, targets_BT, weights_BT = make_inputs()
    logits_BTV = (x_BTD @ w_DV).astype(jnp.bfloat16)
    found = logprobs_of_logits(logits_BTV, targets_BT)
    sums = sum_over_tokens(found, weights_BT)
    exact = logprobs_of_logits(logits_BTV.astype(jnp.float32), targets_BT)
    expected = sum_over_tokens(exact, weights_BT)
    assert sums.nll.dtype == jnp.float32
    assert sums.nll == expected.nll


def test_accuracy_counts_targets_with_the_largest_logit():
    logits_BTV = jnp.asarray([[[0.0, 2.0], [3.0, 1.0], [0.0, 1.0]]])
    found = logprobs_of_logits(logits_BTV, jnp.asarray([[1, 0, 0]]))
    sums = sum_over_tokens(found, jnp.ones((1, 3)))
    assert sums.correct == 2
    assert sums.weight == 3


def test_chunks_must_divide_the_row():
    x_BTD, w_DV, targets_BT, weights_BT = make_inputs()
    with pytest.raises(ValueError, match=r"row length \(12\) must be divisible by chunks \(5\)"):
        mean_nll(x_BTD, w_DV, targets_BT, weights_BT, chunks=5)


def test_rows_and_vocabulary_sharded_over_a_mesh_give_the_same_loss_and_gradient():
    x_BTD, w_DV, targets_BT, weights_BT = make_inputs()

    def loss(x_BTD, w_DV, targets_BT, weights_BT):
        def unembed(x):
            return parallel.einsum("BTD,DV->BTV", x, w_DV, out=("batch", "seq", "vocab"))

        found = token_logprobs(x_BTD, targets_BT, unembed=unembed, chunks=3)
        sums = sum_over_tokens(found, weights_BT)
        return sums.mean(sums.nll)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    expected = step(x_BTD, w_DV, targets_BT, weights_BT)
    mesh = parallel.make_mesh("data:2,tensor:2,context:2")
    with parallel.use_mesh(mesh, parallel.PRESETS["fsdp_expert"]):
        found = step(
            parallel.shard(x_BTD, ("batch", "seq", "embed")),
            parallel.shard(w_DV, ("embed", "vocab")),
            parallel.shard(targets_BT, ("batch", "seq")),
            parallel.shard(weights_BT, ("batch", "seq")),
        )
        assert str(found[1][1].sharding.spec) == str(
            parallel.shard(w_DV, ("embed", "vocab")).sharding.spec
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), expected, found
    )
