"""FLOPs are two for a token and parameter, four for a pair of a token and one that it sees."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from llama4_jax.config import nano, scout
from llama4_jax.cost import count_parameters, forward_flops, train_flops
from llama4_jax.cost.flops import causal_pairs, tile_flops
from llama4_jax.model import Llama4
from tests.tiny import scout_like


def test_a_scout_token_costs_two_for_each_active_parameter_and_attention():
    # One token sees itself only, in 48 layers of 40 heads of 128.
    one = forward_flops(scout(), rows=1, row_length=1)
    assert one == 2 * count_parameters(scout()).multiplied + 48 * 4 * 40 * 128


@pytest.mark.parametrize(
    ("length", "chunk", "pairs"), [(10, 4, 10 + 10 + 3), (10, 10, 55), (3, 8, 6), (1, 1, 1)]
)
def test_pairs_are_those_that_a_causal_mask_leaves(length, chunk, pairs):
    assert causal_pairs(length, chunk) == pairs


def test_attention_counts_the_pairs_that_masks_leave():
    config = nano()
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, chunk_size=4))
    multiplied = 2 * count_parameters(config).multiplied
    # Six layers with chunks of 4, two NoPE layers; 4 heads of 32.
    attention = forward_flops(config, rows=1, row_length=10) - 10 * multiplied
    assert attention == 4 * 4 * 32 * (6 * 23 + 2 * 55)


def test_rows_and_images_add_up_and_training_is_three_forward_passes():
    config = nano()
    text = forward_flops(config, rows=2, row_length=64)
    assert text == 2 * forward_flops(config, rows=1, row_length=64)
    images = forward_flops(config, rows=2, row_length=64, tiles=3) - text
    assert images == 3 * tile_flops(config.vision, text_embed_dim=config.text.embed_dim) > 0
    assert train_flops(config, rows=2, row_length=64, tiles=3) == 3 * (text + images)


def products(jaxpr):
    """Count the FLOPs of the products in a program, but for those of attention."""
    total = 0
    for equation in jaxpr.eqns:
        inside = (getattr(value, "jaxpr", value) for value in equation.params.values())
        inner = sum(products(each) for each in inside if hasattr(each, "eqns"))
        total += inner * equation.params.get("length", 1)
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in summed)
            total += 2 * depth * equation.outvars[0].aval.size
    return total


def test_a_tile_costs_the_products_of_its_program_and_attention():
    config = scout_like()
    model = jax.eval_shape(lambda key: Llama4(config, key=key), jax.random.key(0))
    tile_NCHW = jax.ShapeDtypeStruct((1, 3, 16, 16), jnp.float32)
    program = jax.make_jaxpr(lambda model, tile: model.encode_images(tile))(model, tile_NCHW)
    attention = 2 * 4 * 32 * 17**2  # two layers of width 32, 16 patches and a class token
    cost = tile_flops(config.vision, text_embed_dim=config.text.embed_dim)
    assert products(program.jaxpr) + attention == cost
