"""Tests of checkpoint/parameters.py: names, shapes and order come from the model itself."""

import dataclasses
import time

import jax
import pytest

from llama4_jax import parallel
from llama4_jax.checkpoint.parameters import model_leaves, overlap, parameters
from llama4_jax.config import FAMILIES, layer_pattern, nano, scout
from llama4_jax.layers.param import leaf_name
from llama4_jax.model import Llama4
from tests.checkpoint.tiny import BALANCED, DENSE_TIED, TINY


@pytest.mark.parametrize("config", [TINY, DENSE_TIED, BALANCED, nano()], ids=lambda c: c.name)
def test_leaves_are_the_arrays_of_the_model(config):
    model = jax.eval_shape(lambda: Llama4(config, key=jax.random.key(0)))
    arrays = jax.tree_util.tree_flatten_with_path(model)[0]
    expected = {leaf_name(path): array.shape for path, array in arrays}
    assert {name: leaf.shape for name, leaf in model_leaves(config).items()} == expected


@pytest.mark.parametrize("config", [TINY, DENSE_TIED, *(f() for f in FAMILIES.values())])
def test_each_layer_stands_where_the_decoder_has_it(config):
    pattern, leaves = layer_pattern(config.text), model_leaves(config)
    for layer in range(config.text.num_layers):
        place, group = pattern.name(layer)
        leaf = leaves[f"decoder.{place}.attention.w_q_DNH"]
        assert leaf.is_stacked == (group is not None)
        assert leaf.names[group or 0] == f"layers.{layer}.attention.w_q_DNH"


def test_letters_of_a_name_are_its_dimensions():
    for parameter in parameters(TINY).values():
        assert tuple(parameter.sizes.values()) == parameter.shape
    w_q = parameters(TINY)["layers.3.attention.w_q_DNH"]
    assert w_q.sizes == {"D": 32, "N": 16, "H": 2}
    assert (w_q.layer, w_q.template) == (3, "layers.{}.attention.w_q_DNH")


def test_parameters_come_layer_by_layer_with_vision_first_and_the_head_last():
    names = list(parameters(TINY))
    assert names[0] == "vision.patch_w_ID" and names[-1] == "head.w_DV"
    layers = [p.layer for p in parameters(TINY).values() if p.name.startswith("layers.")]
    assert layers == sorted(layers)


def test_only_balance_biases_keep_their_precision():
    kept = [p.name for p in parameters(BALANCED).values() if p.keeps_dtype]
    assert kept == ["layers.1.ffn.bias_E", "layers.3.ffn.bias_E"]


def test_a_mesh_that_does_not_divide_the_model_changes_nothing():
    text = dataclasses.replace(TINY.text, vocab_size=67)
    config = dataclasses.replace(TINY, text=text)
    with parallel.use_mesh(parallel.make_mesh("tensor:8"), parallel.PRESETS["tensor"]):
        assert parameters(config)["embed.table_VD"].shape == (67, 32)


def test_the_parameters_of_scout_are_found_quickly_and_once():
    model_leaves.cache_clear()
    start = time.perf_counter()
    model_leaves(scout())
    assert time.perf_counter() - start < 10  # 0.6 s on an idle core; a busy one may take longer
    assert model_leaves(scout()) is model_leaves(scout())


def test_overlap_is_what_a_slice_and_a_box_share():
    inside, target = overlap((slice(2, 6), slice(0, 3)), [4, 1], [10, 1])
    assert inside == (slice(0, 2), slice(0, 1))
    assert target == (slice(2, 4), slice(1, 2))
    assert overlap((slice(0, 4),), [4], [1]) is None
