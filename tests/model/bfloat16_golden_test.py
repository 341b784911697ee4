"""bfloat16 against transformers and Meta, which agree with each other to the last bit.

A sum that XLA takes in another order may round the other way, and a rounding moves all that
follows. So every layer is first held on its own to what transformers computes from the same bits,
and then whole models, whose logits may be as far from the references as those are from float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax.layers.attention import Positions
from llama4_jax.model import Llama4
from tests.golden import closed_form
from tests.golden.closed_form import BFLOAT16_ROWS, TEXT_CASES
from tests.golden.filled import QUICK_COMPILE, build
from tests.golden.stored import from_bits, golden

quick_jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)


@quick_jit
def run_block(block: nnx.Module, x_BTD: jax.Array) -> jax.Array:
    B, T, _ = x_BTD.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    return block(x_BTD, Positions(positions_BT, None, True), None)[0]


@quick_jit
def run_head(model: Llama4, x_BTD: jax.Array) -> jax.Array:
    return model.unembed(model.final_norm(x_BTD))


@quick_jit
def forward(model: Llama4, ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden = model.encode(ids_BT)
    return model.unembed(hidden.x_BTD), hidden.router_logits_LBTE


@quick_jit
def features(model: Llama4, tiles_NCHW: jax.Array) -> jax.Array:
    return model.vision(tiles_NCHW, dtype="bfloat16")


def blocks(model: Llama4) -> list[nnx.Module]:
    groups, apart = model.decoder.groups, []
    for g in range(model.decoder.num_groups):
        apart += jax.tree.map(lambda leaf, g=g: leaf[g], groups).slots
    return apart + list(model.decoder.tail)


def spacing(values: np.ndarray) -> np.ndarray:
    """Return the distance of neighbouring bfloat16 values at each row's largest magnitude."""
    largest = np.abs(values).max(axis=-1, keepdims=True)
    return 2.0 ** (np.floor(np.log2(largest)) - 7)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt((np.asarray(values, np.float64) ** 2).mean()))


def margins(scores: np.ndarray) -> np.ndarray:
    """Return how far the best score is from the next."""
    ordered = np.sort(scores.astype(np.float32), axis=-1)
    return ordered[..., -1] - ordered[..., -2]


@pytest.mark.parametrize("name", ["scout", "maverick", "scout_two_experts"])
def test_a_layer_given_the_same_bits_is_within_four_units_in_the_last_place(name):
    hidden_LTD = from_bits(golden("hf_bfloat16")[name + ".hidden"])
    model = build(TEXT_CASES[name], "bfloat16")
    for n, block in enumerate(blocks(model)):
        ours = run_block(block, jnp.asarray(hidden_LTD[n][None], jnp.bfloat16))[0]
        assert ours.dtype == jnp.bfloat16
        units = (np.asarray(ours, np.float32) - hidden_LTD[n + 1]) / spacing(hidden_LTD[n + 1])
        assert np.abs(units).max() <= 4
        assert rms(units) < 1


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_the_output_head_given_the_same_bits_gives_the_same_bits(name):
    last_TD = from_bits(golden("hf_bfloat16")[name + ".hidden"])[-1]
    model = build(TEXT_CASES[name], "bfloat16")
    logits_TV = run_head(model, jnp.asarray(last_TD[None], jnp.bfloat16))[0]
    assert logits_TV.dtype == jnp.float32
    stored = from_bits(golden("hf_bfloat16")[name])
    # All but a few sums round alike; those that do not are neighbours.
    assert (logits_TV == stored).mean() > 0.99
    assert (np.abs(logits_TV - stored) / spacing(stored)).max() <= 1


def test_both_references_agree_to_the_last_bit_without_temperature():
    for name in ("scout_no_temperature", "maverick_no_temperature"):
        meta = golden("meta_text")[name + ".bfloat16"]
        np.testing.assert_array_equal(meta, golden("hf_bfloat16")[name][:, ::4])


# Their two routers are far from a tie at every token; Scout's five are not at any choice of tokens.
@pytest.mark.parametrize("name", ["maverick", "maverick_no_temperature"])
def test_the_best_token_is_the_same_wherever_it_is_clear(name):
    ids_BT = closed_form.tokens(37, BFLOAT16_ROWS[name])[None].astype(np.int32)
    logits_BTV, router_LBTE = forward(build(TEXT_CASES[name], "bfloat16"), ids_BT)
    assert margins(np.asarray(router_LBTE)).min() > 0.06
    ours, stored = np.asarray(logits_BTV[0]), from_bits(golden("hf_bfloat16")[name])
    # The reference itself is 0.035 from float32.
    assert rms(ours - stored) < 0.04
    clear = margins(stored) > 0.2
    assert clear.sum() > 15
    np.testing.assert_array_equal(ours.argmax(-1)[clear], stored.argmax(-1)[clear])


def test_vision_features_are_as_close_to_transformers_as_those_are_to_float32():
    ours = features(build(TEXT_CASES["scout"], "bfloat16"), closed_form.tiles(3))
    stored = from_bits(golden("hf_bfloat16")["scout.features"])
    exact = golden("hf_vision")["scout.features"]
    assert rms(np.asarray(ours, np.float32) - stored) < 1.25 * rms(stored - exact)
