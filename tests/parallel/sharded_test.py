"""A divided model is the same function: forward, gradient and decode on eight virtual devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax import parallel
from llama4_jax.config.families import every
from llama4_jax.model import Cache, Llama4
from tests.tiny import CHUNK, build, maverick_like, scout_like

# All that is divided, in few programs: dense local layers and NoPE mixtures of eight experts, two
# groups and a tail. Scout's layers are all mixtures; here each shard has one of its experts.
MIXED = maverick_like(
    num_layers=5, moe_layers=every(2, 5), nope_layers=every(2, 5), use_qk_norm=True
)
# The model, the mesh and its preset; all axes divide the batch.
MESHES = [
    pytest.param(MIXED, "fsdp:8", "fsdp", id="fsdp"),
    pytest.param(MIXED, "fsdp:2,expert:4", "fsdp_expert", id="fsdp_x_expert"),
    pytest.param(scout_like(), "fsdp:2,expert:4", "fsdp_expert", id="one_expert_a_shard"),
    pytest.param(MIXED, "fsdp:2,expert:2,tensor:2", "fsdp_expert", id="fsdp_x_expert_x_tensor"),
    pytest.param(MIXED, "expert:4,tensor:2", "tensor", id="tensor_serving"),
    pytest.param(MIXED, "tensor:2,context:4", "long_context", id="long_context"),
]
BATCH, LENGTH = 8, 4 * CHUNK


@functools.cache
def inputs():
    tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 4, 64)
    tokens = tokens.at[:, 3:7].set(3)  # one image a row
    tiles = jax.random.normal(jax.random.key(2), (BATCH, 3, 16, 16))
    return np.asarray(tokens), np.asarray(tiles)


def loss(model, tokens, tiles):
    """Mean negative log-likelihood, written so that it needs no slice of a divided row."""
    logits = model(tokens, tiles).logits_BTV
    target = jax.nn.one_hot(jnp.roll(tokens, -1, 1), logits.shape[-1])
    target = parallel.shard(target, ("batch", "seq", "vocab"))
    return -(jax.nn.log_softmax(logits) * target).sum() / tokens.size, logits


value_and_slope = jax.jit(jax.value_and_grad(loss, has_aux=True))


@jax.jit
def step(model, tokens, cache):
    return model(tokens, cache=cache)


@functools.cache
def whole(config):
    """Return the undivided model, its loss, logits and gradient."""
    model = build(config)
    (value, logits), slope = value_and_slope(model, *inputs())
    return model, value, logits, slope


def divide(model):
    like = parallel.abstract(lambda key: Llama4(model.config, key=key), jax.random.key(0))
    return jax.tree.map(lambda x, a: jax.device_put(np.asarray(x), a.sharding), model, like)


@pytest.mark.parametrize(("config", "mesh", "preset"), MESHES)
def test_loss_logits_and_gradient_equal_the_undivided_model(config, mesh, preset):
    model, value, logits, slope = whole(config)
    tokens, tiles = inputs()
    with parallel.use_mesh(parallel.make_mesh(mesh), parallel.PRESETS[preset]):
        divided = divide(model)
        (value2, logits2), slope2 = value_and_slope(divided, tokens, tiles)
    np.testing.assert_allclose(value2, value, rtol=1e-6)
    np.testing.assert_allclose(logits2, logits, atol=3e-5)
    paths = jax.tree_util.tree_leaves_with_path(slope)
    for (path, a), b, parameter in zip(
        paths, jax.tree.leaves(slope2), jax.tree.leaves(divided), strict=True
    ):
        assert b.sharding == parameter.sharding, jax.tree_util.keystr(path)
        np.testing.assert_allclose(b, a, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("mesh", "preset", "pieces"),
    [
        pytest.param("expert:4,tensor:2", "tensor", (16, 1, 1), id="tensor_serving"),
        # 16 and 8 are divided over context, the others are whole.
        pytest.param("tensor:2,context:4", "long_context", (16, 5, 1, 1, 1, 8), id="long_context"),
        pytest.param("data:2,expert:4", "tensor", (16, 1, 1), id="data_x_expert"),
        pytest.param("data:2,expert:2", "expert", (16, 1, 1), id="heads_over_experts_too"),
    ],
)
def test_decoding_in_pieces_equals_the_undivided_full_forward(mesh, preset, pieces):
    model = build(MIXED)
    tokens = np.asarray(jax.random.randint(jax.random.key(3), (2, LENGTH), 4, 64))
    want = jax.jit(lambda m, t: m(t).logits_BTV)(model, tokens)
    with parallel.use_mesh(parallel.make_mesh(mesh), parallel.PRESETS[preset]):
        divided = divide(model)
        cache = Cache.create(model.config.text, batch_size=2, max_length=LENGTH, dtype="float32")
        outs, start = [], 0
        for size in pieces:
            out = step(divided, tokens[:, start : start + size], cache)
            outs.append(np.asarray(out.logits_BTV))
            cache, start = out.cache, start + size
    np.testing.assert_allclose(np.concatenate(outs, 1), want[:, :start], atol=3e-5)


def collectives(compiled):
    names = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    lines = compiled.as_text().splitlines()
    return [line.strip() for line in lines if any(f" {n}(" in line for n in names)]


@pytest.mark.parametrize(("length", "is_free"), [(4 * CHUNK, True), (2 * CHUNK, False)])
def test_chunk_layers_need_no_communication_when_shards_hold_whole_chunks(length, is_free):
    config = scout_like(num_layers=2, moe_layers=(), nope_layers=())
    mesh = parallel.make_mesh("context:4")
    with parallel.use_mesh(mesh, parallel.PRESETS["long_context"]):
        model = parallel.abstract(lambda key: Llama4(config, key=key), jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = jax.jit(lambda m, t: m.encode(t).x_BTD).lower(model, tokens).compile()
    assert (collectives(compiled) == []) == is_free


def test_adversarial_routing_drops_no_token():
    model = build(scout_like(num_layers=2, moe_layers=(0, 1), nope_layers=(1,)))
    # Every token likes the last expert best, which lives on the last shard.
    routers = {id(b.ffn.router_DE[...]) for b in model.decoder.groups.slots}
    leaves = [
        jnp.zeros_like(x).at[..., -1].set(9.0) if id(x) in routers else x
        for x in jax.tree.leaves(model)
    ]
    model = jax.tree.unflatten(jax.tree.structure(model), leaves)
    tokens, _ = inputs()
    run = jax.jit(lambda m, t: m(t).logits_BTV)
    want = run(model, tokens)
    with parallel.use_mesh(parallel.make_mesh("fsdp:2,expert:4"), parallel.PRESETS["fsdp_expert"]):
        np.testing.assert_allclose(run(divide(model), tokens), want, atol=3e-5)


def test_rules_are_part_of_the_jit_cache_key():
    @jax.jit
    def place(x):
        return parallel.shard(x, ("batch", "embed"))

    x = np.zeros((8, 4), np.float32)
    mesh = parallel.make_mesh("data:2,fsdp:4")
    seen = []
    for preset in ("fsdp", "single"):
        with parallel.use_mesh(mesh, parallel.PRESETS[preset]):
            seen.append(place(x).sharding.shard_shape(x.shape))
    assert seen == [(1, 4), (8, 4)]
