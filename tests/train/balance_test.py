"""What routers report of their load, against counts by hand, and the loss that evens it."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax import parallel, train
from llama4_jax.config.runs import LossConfig, OptimizerConfig, RunConfig
from llama4_jax.layers.feed_forward import load_of, route
from llama4_jax.model import Llama4
from llama4_jax.train.balance import balance_of_routers, move_biases
from llama4_jax.train.state import name_leaves
from tests.tiny import build, scout_like

B, T = 4, 16
RATE = 0.01


def balance(logits_LBTE, is_token_BT, experts_per_token=1):
    def load(logits_BTE):
        is_token = parallel.shard(jnp.asarray(is_token_BT, bool), ("batch", "seq"))
        routing = route(logits_BTE, experts_per_token, is_token_BT=is_token)
        return load_of(logits_BTE, routing.expert_BTX)

    loads = [load(logits_BTE) for logits_BTE in logits_LBTE]
    together = jax.tree.map(lambda *layers: jnp.stack(layers), *loads)
    return balance_of_routers(together, experts_per_token=experts_per_token)


def definition(logits_LBTE, is_token_BT, experts_per_token=1):
    """E * sum of share * probability, written over all layers and tokens at once."""
    weight_BT1 = jnp.asarray(is_token_BT, jnp.float32)[..., None]
    _, chosen_LBTX = jax.lax.top_k(logits_LBTE, experts_per_token)
    num_experts = logits_LBTE.shape[-1]
    is_chosen_LBTE = jnp.any(chosen_LBTX[..., None] == jnp.arange(num_experts), axis=-2)
    share_LE = (is_chosen_LBTE * weight_BT1).sum((1, 2)) / (weight_BT1.sum() * experts_per_token)
    probability_LE = (jax.nn.softmax(logits_LBTE) * weight_BT1).sum((1, 2)) / weight_BT1.sum()
    return num_experts * (share_LE * probability_LE).sum(-1).mean()


def test_balance_is_one_when_experts_are_used_alike_and_their_number_when_one_is():
    even = 20.0 * jnp.eye(4)[None, None]  # four tokens, each sure of its own expert
    np.testing.assert_allclose(balance(even, jnp.ones((1, 4))).loss, 1.0, rtol=1e-5)
    np.testing.assert_allclose(balance(even, jnp.ones((1, 4))).largest_share_L, 0.25)
    single = jnp.broadcast_to(jnp.asarray([20.0, 0, 0, 0]), (2, 1, 4, 4))
    found = balance(single, jnp.ones((1, 4)))
    np.testing.assert_allclose(found.loss, 4.0, rtol=1e-5)
    np.testing.assert_array_equal(found.largest_share_L, [1, 1])
    np.testing.assert_array_equal(found.tokens_LE, [[4, 0, 0, 0]] * 2)


def test_entropy_is_that_of_a_uniform_choice_and_of_a_sure_one():
    logits_LBTE = jnp.stack([jnp.zeros((1, 6, 8)), 50.0 * jnp.eye(8)[None, :6]])
    entropy_L = balance(logits_LBTE, jnp.ones((1, 6))).entropy_L
    np.testing.assert_allclose(entropy_L, [np.log(8), 0], atol=1e-6)


def test_balance_leaves_padding_out():
    logits = jax.random.normal(jax.random.key(0), (2, 1, 6, 4))
    padded = balance(logits, jnp.asarray([[1, 1, 1, 1, 0, 0]]), experts_per_token=2)
    cut = balance(logits[:, :, :4], jnp.ones((1, 4)), experts_per_token=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), padded, cut)
    assert padded.tokens_LE.sum() == 2 * 4 * 2


def test_a_batch_of_padding_alone_has_balance_zero():
    found = balance(jnp.ones((2, 1, 4, 4)), jnp.zeros((1, 4)))
    assert not any(np.any(part) for part in jax.tree.leaves(found))


@pytest.mark.parametrize("experts_per_token", [1, 2])
def test_loss_and_gradient_are_those_of_the_definition(experts_per_token):
    logits_LBTE = jax.random.normal(jax.random.key(0), (3, 4, 8, 6))
    is_token_BT = jnp.arange(8)[None] < jnp.asarray([8, 5, 7, 0])[:, None]
    found = jax.value_and_grad(lambda x: balance(x, is_token_BT, experts_per_token).loss)
    expected = jax.value_and_grad(lambda x: definition(x, is_token_BT, experts_per_token))
    for a, b in zip(found(logits_LBTE), expected(logits_LBTE), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


def test_balance_pulls_the_router_away_from_its_busiest_expert():
    logits = jnp.broadcast_to(jnp.asarray([1.0, 0.5, 0.0]), (1, 1, 4, 3))
    gradient = jax.grad(lambda x: balance(x, jnp.ones((1, 4))).loss)(logits)
    assert jnp.all(gradient[..., 0] > 0)
    assert jnp.all(gradient[..., 1:] < 0)


def test_balance_over_a_mesh_is_the_same():
    logits_LBTE = jax.random.normal(jax.random.key(0), (2, 4, 8, 4))
    is_token_BT = jnp.arange(8)[None] < jnp.asarray([8, 5, 7, 0])[:, None]
    measure = jax.jit(functools.partial(balance, experts_per_token=2))
    expected = measure(logits_LBTE, is_token_BT)
    with parallel.use_mesh(parallel.make_mesh("data:2,context:2"), parallel.PRESETS["fsdp_expert"]):
        found = measure(
            parallel.shard(logits_LBTE, (None, "batch", "seq", None)),
            parallel.shard(is_token_BT, ("batch", "seq")),
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    np.testing.assert_array_equal(found.tokens_LE, expected.tokens_LE)


@functools.cache
def model_and_batch():
    """Return two mixture layers with random biases, and rows of which some end in padding."""
    config = scout_like(
        num_layers=2, moe_layers=(0, 1), nope_layers=(), experts_per_token=2, balance_bias=True
    )
    model = build(dataclasses.replace(config, vision=None))
    rng = np.random.default_rng(0)
    lengths = np.asarray([T, T - 5, T, T - 1])
    index = np.broadcast_to(np.arange(T), (B, T))
    is_token = index < lengths[:, None]
    return model, {
        "tokens_BT": rng.integers(4, 64, (B, T)).astype(np.int32),
        "targets_BT": rng.integers(4, 64, (B, T)).astype(np.int32),
        "positions_BT": np.where(is_token, index, -1).astype(np.int32),
        "segments_BT": np.zeros((B, T), np.int32),
        "loss_mask_BT": is_token.astype(np.float32),
    }


@functools.cache
def one_step(mesh, preset):
    """Take a training step; return its metrics, the biases before and after, and all names."""
    model, batch = model_and_batch()
    run = RunConfig(
        name="balance",
        model=model.config,
        optimizer=OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=0, balance_bias_rate=RATE),
        loss=LossConfig(balance=0.01),
        mixture=(("code", 1.0),),
        steps=1,
        batch_size=B,
        row_length=T,
    )
    optimizer = train.make_optimizer(run.optimizer, steps=1)
    mesh = parallel.make_mesh(mesh) if mesh else None
    with parallel.use_mesh(mesh, parallel.PRESETS[preset]):
        like = parallel.abstract(lambda: type(model)(model.config, key=jax.random.key(0)))
        place = functools.partial(jax.tree.map, lambda x, a: jax.device_put(x, a.sharding))
        # A copy: the step gives its state up.
        copy = jax.tree.map(np.asarray, model)
        placed = jax.tree.map(jnp.asarray, copy) if mesh is None else place(copy, like)
        state = jax.jit(functools.partial(train.state.start_state, optimizer=optimizer))(placed)
        rows = {n: parallel.shard(jnp.asarray(a), ("batch", "seq")) for n, a in batch.items()}
        state, metrics = train.pretraining_step(run, optimizer)(state, rows)
    return Step(jax.device_get(metrics), biases_of(model), biases_of(state.model), state)


class Step(NamedTuple):
    metrics: dict
    before_LE: np.ndarray
    after_LE: np.ndarray
    state: train.TrainState


def biases_of(model):
    """Return the biases of a model of one slot, by layer."""
    return np.asarray(model.decoder.groups.slots[0].ffn.bias_E[...])


def test_a_steps_metrics_count_the_choices_of_its_tokens():
    model, batch = model_and_batch()
    places = {name: batch[name] for name in ("positions_BT", "segments_BT")}
    hidden = jax.jit(lambda m: m.encode(batch["tokens_BT"], **places))(model)
    logits_LBTE = np.asarray(hidden.router_logits_LBTE)
    bias_LE = biases_of(model)
    tokens_LE = np.zeros((2, 4), int)
    entropy_L = np.zeros(2)
    for layer, row, t in np.ndindex(logits_LBTE.shape[:3]):
        if batch["positions_BT"][row, t] < 0:
            continue
        logits_E = logits_LBTE[layer, row, t].astype(np.float64)
        tokens_LE[layer, np.argsort(-logits_E - bias_LE[layer])[:2]] += 1
        p_E = np.exp(logits_E) / np.exp(logits_E).sum()
        entropy_L[layer] -= (p_E * np.log(p_E)).sum()
    num_tokens = batch["loss_mask_BT"].sum()
    found = one_step("", "single").metrics
    np.testing.assert_array_equal(found["router/tokens"], tokens_LE)
    share_L = tokens_LE.max(1) / (2 * num_tokens)
    np.testing.assert_allclose(found["router/largest_share"], share_L, rtol=1e-6)
    np.testing.assert_allclose(found["router/entropy"], entropy_L / num_tokens, rtol=1e-5)
    np.testing.assert_allclose(found["largest_expert_share"], share_L.mean(), rtol=1e-6)
    np.testing.assert_allclose(found["router_entropy"], entropy_L.mean() / num_tokens, rtol=1e-5)


def test_a_step_of_a_divided_model_reports_the_same_load():
    expected = one_step("", "single")
    found = one_step("fsdp:2,expert:2,tensor:2", "fsdp_expert")
    one, other = expected.metrics, found.metrics
    np.testing.assert_array_equal(other["router/tokens"], one["router/tokens"])
    for name in ("balance", "router/entropy", "router/largest_share", "loss"):
        np.testing.assert_allclose(other[name], one[name], rtol=1e-5)
    np.testing.assert_array_equal(found.after_LE, expected.after_LE)


def test_a_step_raises_the_bias_of_idle_experts_and_lowers_that_of_busy_ones():
    step = one_step("", "single")
    tokens_LE = step.metrics["router/tokens"]
    sign_LE = np.sign(tokens_LE.mean(1, keepdims=True) - tokens_LE)
    assert {-1, 1} <= {*sign_LE.flat}
    change_LE = np.float32(RATE) * sign_LE.astype(np.float32)
    np.testing.assert_array_equal(step.after_LE, step.before_LE + change_LE)


def test_no_optimizer_knows_a_bias():
    names = name_leaves(one_step("", "single").state)
    assert [n for n in names if "bias_E" in n] == ["model.decoder.groups.slots.0.ffn.bias_E.value"]
    assert "opt_state.1.0.mu.decoder.groups.slots.0.ffn.router_DE.value" in names


def test_every_layers_bias_moves_by_its_own_load():
    tokens_LE = np.random.default_rng(0).integers(0, 9, (5, 4))
    model = build(scout_like(balance_bias=True))  # two groups of two slots, and a tail
    moved = move_biases(model, jnp.asarray(tokens_LE), rate=0.5)
    for layer in range(5):
        before, after = (
            m.decoder.tail[0].ffn.bias_E[...]
            if layer == 4
            else m.decoder.groups.slots[layer % 2].ffn.bias_E[layer // 2]
            for m in (model, moved)
        )
        sign_E = np.sign(tokens_LE[layer].mean() - tokens_LE[layer])
        np.testing.assert_allclose(after - before, 0.5 * sign_E, atol=1e-6)
    with pytest.raises(ValueError, match=r"no decoder.groups.slots.0.ffn.bias_E; build it"):
        move_biases(build(scout_like()), jnp.asarray(tokens_LE), rate=0.5)


def test_without_biases_a_model_has_the_leaves_it_had():
    plain = {name: leaf.shape for name, leaf in name_leaves(build(scout_like())).items()}
    biased = {n: x.shape for n, x in name_leaves(build(scout_like(balance_bias=True))).items()}
    assert plain.items() < biased.items()
    assert {name.split(".")[-2] for name in biased.keys() - plain.keys()} == {"bias_E"}


@pytest.mark.parametrize("experts_per_token", [1, 2])
def test_a_bias_decides_who_is_chosen_and_not_the_gate(experts_per_token):
    logits_BTE = jax.random.normal(jax.random.key(3), (2, 5, 4))
    bias_E = jnp.asarray([0.0, 100.0, 0.0, -100.0])
    plain = route(logits_BTE, experts_per_token)
    none = route(logits_BTE, experts_per_token, bias_E=jnp.zeros(4))
    jax.tree.map(np.testing.assert_array_equal, plain, none)
    found = route(logits_BTE, experts_per_token, bias_E=bias_E)
    np.testing.assert_array_equal(found.expert_BTX[..., 0], 1)
    assert not np.any(found.expert_BTX == 3)
    raw_BTX = np.take_along_axis(np.asarray(logits_BTE), np.asarray(found.expert_BTX), -1)
    np.testing.assert_array_equal(found.gate_BTX, jax.nn.sigmoid(raw_BTX))

    def total(logits_BTE, bias_E):
        return route(logits_BTE, experts_per_token, bias_E=bias_E).gate_BTX.sum()

    by_logits, by_bias = jax.grad(total, (0, 1))(logits_BTE, bias_E)
    slope_BTX = np.take_along_axis(np.asarray(by_logits), np.asarray(found.expert_BTX), -1)
    gate_BTX = np.asarray(found.gate_BTX)
    np.testing.assert_allclose(slope_BTX, gate_BTX * (1 - gate_BTX), rtol=1e-5)
    assert np.count_nonzero(by_logits) == slope_BTX.size
    assert not np.any(by_bias)


def test_biases_even_out_a_router_that_starts_lopsided():
    """All tokens choose one of four experts at first, and in the end no expert has over 0.3."""
    config = scout_like(num_layers=1, moe_layers=(0,), nope_layers=(), balance_bias=True)
    model = Llama4(dataclasses.replace(config, vision=None), key=jax.random.key(0))
    logits_BTE = jax.random.normal(jax.random.key(1), (8, 64, 4)).at[..., 0].add(8)

    @jax.jit
    def step(model):
        bias_E = model.decoder.groups.slots[0].ffn.bias_E[0]
        load = load_of(logits_BTE, route(logits_BTE, 1, bias_E=bias_E).expert_BTX)
        tokens_E = load.tokens_BE.sum(0)
        return move_biases(model, tokens_E[None], rate=0.05), tokens_E.max() / tokens_E.sum()

    shares = []
    for _ in range(100):  # of which 80 close the gap: 0.05 down for one, 0.05 up for the others
        model, share = step(model)
        shares.append(float(share))
    assert shares[:40] == [1] * 40
    assert max(shares[-5:]) < 0.3
