"""What must hold for any weights: who sees whom, and what must not matter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.config import scout
from llama4_jax.model import Cache, Llama4
from tests.tiny import CHUNK, build, maverick_like, scout_like

LENGTH = 4 * CHUNK + 5
SHORT = {"num_layers": 2, "moe_layers": (0, 1), "nope_layers": (1,)}  # one layer of each kind


@pytest.fixture(scope="module")
def model():
    return build(scout_like())


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (3, LENGTH), 4, 64)


@jax.jit
def logits(model, tokens, positions=None, segments=None):
    return model(tokens, positions_BT=positions, segments_BT=segments).logits_BTV


@jax.jit
def step(model, tokens, cache, positions=None):
    return model(tokens, positions_BT=positions, cache=cache)


@jax.jit
def see(model, tokens, tiles, cache=None):
    return model(tokens, tiles, cache=cache)


def influence(config):
    """Return |d logits[t] / d embedding[s]| > 0 as a [T, S] table of booleans."""
    model = build(config)
    tokens = jnp.arange(4, 4 + LENGTH)[None]  # every token once, so a table row is a position

    @jax.jit
    def jacobian(table):
        def run(table):
            old = model.embed.table_VD[...]
            leaves = [table if leaf is old else leaf for leaf in jax.tree.leaves(model)]
            changed = jax.tree.unflatten(jax.tree.structure(model), leaves)
            return changed(tokens).logits_BTV[0].std(-1)

        return jax.jacrev(run)(table)

    slope_TVD = jacobian(model.embed.table_VD[...])
    return np.abs(slope_TVD[:, tokens[0]]).max(-1) > 0


def test_no_token_sees_the_future_and_nope_layers_see_all_of_the_past():
    seen_TS = influence(scout_like())
    np.testing.assert_array_equal(seen_TS, np.tri(LENGTH, dtype=bool))


def test_tokens_cannot_see_across_chunks_without_nope_layers():
    seen_TS = influence(scout_like(num_layers=2, moe_layers=(0, 1), nope_layers=()))
    t, s = np.indices(seen_TS.shape)
    np.testing.assert_array_equal(seen_TS, (s <= t) & (s // CHUNK == t // CHUNK))


@pytest.mark.parametrize("before", [0, 1, CHUNK])
def test_padding_on_either_side_changes_nothing_with_temperature_on(model, tokens, before):
    after = CHUNK - before
    padded = jnp.pad(tokens, ((0, 0), (before, after)), constant_values=2)
    positions = jnp.pad(
        jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape),
        ((0, 0), (before, after)),
        constant_values=-1,
    )
    out = logits(model, padded, positions)[:, before : before + LENGTH]
    np.testing.assert_allclose(out, logits(model, tokens), atol=2e-5)


def test_packed_segments_equal_rows_of_their_own(model, tokens):
    a, b = tokens[0, :13], tokens[1, : LENGTH - 13]
    packed = jnp.concatenate([a, b])[None]
    positions = jnp.concatenate([jnp.arange(13), jnp.arange(LENGTH - 13)])[None]
    segments = jnp.concatenate([jnp.ones(13, int), jnp.full(LENGTH - 13, 2)])[None]
    out = logits(model, packed, positions, segments)[0]
    alone = logits(model, tokens)
    np.testing.assert_allclose(out[:13], alone[0, :13], atol=2e-5)
    np.testing.assert_allclose(out[13:], alone[1, : LENGTH - 13], atol=2e-5)


def test_a_row_does_not_depend_on_its_companions(model, tokens):
    together = logits(model, tokens)
    for row in range(len(tokens)):
        alone = logits(model, tokens[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], atol=2e-5)


@pytest.mark.parametrize(
    ("config", "pieces"),
    [
        pytest.param(scout_like(), (1,) * LENGTH, id="token_by_token"),
        pytest.param(scout_like(), (1, 12, 1, 1, 12, 8, 1, 1), id="across_boundaries"),
        pytest.param(scout_like(), (8, 8, 8, 8, *(1,) * 5), id="on_boundaries"),
        pytest.param(maverick_like(), (18, 1, 18), id="maverick_like"),
    ],
)
def test_decoding_in_pieces_equals_the_full_forward_pass(config, pieces, tokens):
    model = build(config)
    cache = Cache.create(config.text, batch_size=3, max_length=LENGTH, dtype="float32")
    outs, start = [], 0
    for size in pieces:
        out = step(model, tokens[:, start : start + size], cache)
        outs, cache, start = [*outs, out.logits_BTV], out.cache, start + size
    np.testing.assert_allclose(jnp.concatenate(outs, 1), logits(model, tokens), atol=2e-5)
    np.testing.assert_array_equal(cache.lengths_B, LENGTH)


def test_rows_of_different_lengths_share_a_cache(model, tokens):
    lengths = np.array([3, LENGTH - 6, 17])
    longest = lengths.max()
    index = np.broadcast_to(np.arange(longest), (3, longest))
    positions = jnp.asarray(np.where(index < lengths[:, None], index, -1))
    cache = Cache.create(scout_like().text, batch_size=3, max_length=LENGTH, dtype="float32")
    cache = step(model, tokens[:, :longest], cache, positions).cache
    np.testing.assert_array_equal(cache.lengths_B, lengths)
    want = logits(model, tokens)
    for extra in range(6):
        at = lengths + extra
        out = step(model, tokens[np.arange(3), at][:, None], cache)
        cache = out.cache
        np.testing.assert_allclose(out.logits_BTV[:, 0], want[np.arange(3), at], atol=2e-5)


def test_a_chunk_layer_keeps_one_chunk_and_a_nope_layer_keeps_everything():
    cache = Cache.create(scout_like().text, batch_size=2, max_length=100)
    assert [layer.keys_GBKSH.shape[3] for layer in cache.slots] == [CHUNK, 100]
    assert [layer.keys_GBKSH.shape[3] for layer in cache.tail] == [CHUNK]


def test_scouts_cache_at_a_million_tokens_is_a_quarter_of_a_full_one():
    text = scout().text
    unchunked = dataclasses.replace(text, chunk_size=None)

    def size(config):
        cache = jax.eval_shape(lambda: Cache.create(config, batch_size=1, max_length=1 << 20))
        return cache.num_bytes

    assert 0.25 <= size(text) / size(unchunked) < 0.26
    assert size(text) == 2 * 2 * 8 * 128 * (12 * (1 << 20) + 36 * 8192)


def test_a_cache_longer_than_the_models_positions_is_refused():
    with pytest.raises(ValueError, match=r"max_length \(2000\) must lie in 1..max_positions"):
        Cache.create(scout_like().text, batch_size=1, max_length=2000)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(scout_like(), dtype="bfloat16"),
        maverick_like(num_layers=2, moe_layers=(1,), nope_layers=(1,)),
    ],
    ids=lambda c: c.name,
)
def test_every_parameter_learns_the_router_included(config):
    model = build(config)
    tokens = jax.random.randint(jax.random.key(5), (2, 24), 4, 64).at[:, 2:6].set(config.patch_id)
    tiles = jax.random.normal(jax.random.key(6), (2, 3, 16, 16))

    @jax.jit
    @jax.grad
    def slope(model):
        log_probs = jax.nn.log_softmax(model(tokens, tiles).logits_BTV[:, :-1])
        return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1).mean()

    for path, gradient in jax.tree_util.tree_leaves_with_path(slope(model)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert np.isfinite(gradient).all(), name
        assert np.abs(gradient).max() > 0, name


def test_recomputing_activations_changes_no_gradient(tokens):
    model = build(scout_like(**SHORT))

    def slope(remat):
        def loss(model):
            return (model.encode(tokens, remat=remat).x_BTD ** 2).mean()

        return jax.jit(jax.grad(loss))(model)

    for a, b in zip(jax.tree.leaves(slope(False)), jax.tree.leaves(slope(True)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_router_logits_come_in_layer_order(model, tokens):
    hidden = jax.eval_shape(lambda m, t: m.encode(t), model, tokens)
    assert hidden.router_logits_LBTE.shape == (5, 3, LENGTH, 4)
    text = dataclasses.replace(scout_like().text, num_layers=1, moe_layers=(0,), nope_layers=())
    first = dataclasses.replace(scout_like(), text=text)
    shallow = jax.eval_shape(lambda: Llama4(first, key=jax.random.key(0)).encode(tokens))
    assert shallow.router_logits_LBTE.shape[0] == 1


def test_images_take_the_patch_places_in_order_and_text_stays(model):
    config = model.config
    tiles = jax.random.normal(jax.random.key(7), (6, 3, 16, 16))
    row = jnp.arange(10, 10 + 24)
    two_each = jnp.stack(
        [row.at[i : i + 4].set(3).at[j : j + 4].set(3) for i, j in ((2, 8), (10, 14), (4, 20))]
    )
    one_row_has_three = jnp.stack([two_each[0].at[14:18].set(3), row.at[4:8].set(3), two_each[2]])
    apart = see(model, two_each, tiles).logits_BTV
    for i in range(3):
        alone = see(model, two_each[i : i + 1], tiles[2 * i : 2 * i + 2]).logits_BTV
        np.testing.assert_allclose(apart[i], alone[0], atol=2e-5)
    uneven = see(model, one_row_has_three, tiles).logits_BTV
    swapped = see(model, one_row_has_three, tiles[np.array([1, 0, 2, 3, 4, 5])]).logits_BTV
    np.testing.assert_allclose(uneven[0, :2], swapped[0, :2], atol=1e-6)
    assert np.abs(uneven[0, 2:] - swapped[0, 2:]).max() > 1e-2
    np.testing.assert_allclose(uneven[1:], swapped[1:], atol=1e-6)
    assert config.vision.tokens_per_tile == 4


def test_images_survive_prefill_in_pieces(model):
    tiles = jax.random.normal(jax.random.key(8), (2, 3, 16, 16))
    tokens = jnp.arange(10, 34).at[2:6].set(3).at[14:18].set(3)[None]
    cache = Cache.create(model.config.text, batch_size=1, max_length=32, dtype="float32")
    first = see(model, tokens[:, :12], tiles[:1], cache)
    second = see(model, tokens[:, 12:], tiles[1:], first.cache)
    pieces = jnp.concatenate([first.logits_BTV, second.logits_BTV], 1)
    whole = see(model, tokens, tiles).logits_BTV
    np.testing.assert_allclose(pieces, whole, atol=2e-5)


def test_absolute_rope_is_the_same_function_until_rounding(tokens):
    chunked = build(scout_like())
    absolute = build(scout_like(rope_positions="absolute"))
    a, b = logits(chunked, tokens), logits(absolute, tokens)
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert np.abs(a[:, CHUNK:] - b[:, CHUNK:]).max() > 0


def test_wrong_shapes_are_refused_with_both(model, tokens):
    with pytest.raises(ValueError, match="positions_BT has shape"):
        model(tokens, positions_BT=jnp.zeros((3, 4), jnp.int32))
    with pytest.raises(ValueError, match="tiles must be"):
        model(tokens, jnp.zeros((1, 3, 8, 8)))
    cache = Cache.create(model.config.text, batch_size=3, max_length=32)
    with pytest.raises(ValueError, match="leave segments_BT out"):
        model(tokens, segments_BT=jnp.zeros_like(tokens), cache=cache)
    blind = build(dataclasses.replace(scout_like(), vision=None))
    with pytest.raises(ValueError, match="no vision encoder"):
        blind(tokens, jnp.zeros((1, 3, 16, 16)))


@pytest.mark.parametrize("batch", [1, 2])
def test_bfloat16_decodes_token_by_token_at_any_batch_size(batch):
    config = dataclasses.replace(scout_like(**SHORT), dtype="bfloat16")
    model = build(config)
    both = jax.random.randint(jax.random.key(9), (2, 12), 4, 64)
    tokens = both[:batch]
    cache = Cache.create(config.text, batch_size=batch, max_length=16)
    outs = []
    for t in range(12):
        out = step(model, tokens[:, t : t + 1], cache)
        outs, cache = [*outs, out.logits_BTV], out.cache
    decoded, whole = jnp.concatenate(outs, 1), logits(model, both)[:batch]
    # Routers may turn on a rounding, so rows are compared on the whole.
    assert np.median(np.abs(decoded - whole)) < 0.05
