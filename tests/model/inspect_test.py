"""The hidden states of all layers are those of the forward pass."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.cache import Cache
from llama4_jax.model.inspect import hidden_states
from tests import tiny


def test_the_last_hidden_state_makes_the_models_logits():
    config = tiny.scout_like()
    model = tiny.build(config)
    tokens_BT = jnp.arange(2 * 20).reshape(2, 20) % 60 + 4
    states = hidden_states(model, tokens_BT)
    assert [x.shape for x in states] == [(2, 20, 32)] * (config.text.num_layers + 1)
    last = model.unembed(model.final_norm(states[-1]))
    np.testing.assert_allclose(last, model(tokens_BT).logits_BTV, atol=1e-4)
    assert float(jnp.abs(states[0] - model.embed(tokens_BT, dtype=jnp.float32)).max()) == 0
    jumps = [float(jnp.abs(b - a).max()) for a, b in itertools.pairwise(states)]
    assert min(jumps) > 1e-3


def test_images_are_in_them():
    model = tiny.build(tiny.scout_like())
    tokens_BT = jnp.asarray([[0, *[3] * 4, 9, 10]])
    tiles = jax.random.uniform(jax.random.key(1), (1, 3, 16, 16), minval=-1, maxval=1)
    last = model.final_norm(hidden_states(model, tokens_BT, tiles)[-1])
    np.testing.assert_allclose(last, model.encode(tokens_BT, tiles).x_BTD, atol=1e-4)


def test_a_model_and_a_cache_show_themselves_in_a_line():
    config = tiny.scout_like()
    model = tiny.build(config)
    size = sum(x.size for x in jax.tree.leaves(model))
    assert repr(model) == f"Llama4(scout_like: {size:,} parameters)"
    cache = Cache.create(config.text, batch_size=2, max_length=16)
    assert repr(cache) == f"Cache(2 rows, {cache.num_bytes:,} bytes in {len(cache.slots)} slots)"
