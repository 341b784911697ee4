"""Tests of checkpoint/weight_map.py and layout.py: the table against the published counts."""

import collections
import dataclasses
import math

import pytest

from llama4_jax.checkpoint.layout import layout_tensors
from llama4_jax.checkpoint.parameters import parameters
from llama4_jax.checkpoint.weight_map import TABLE
from llama4_jax.config import maverick, scout
from tests.checkpoint.tiny import BALANCED, DENSE_TIED, TINY


@pytest.mark.parametrize(
    ("family", "size"), [(scout, 108_641_793_536), (maverick, 401_583_781_376)]
)
def test_parameters_add_up_to_the_published_size(family, size):
    assert sum(p.size for p in parameters(family()).values()) == size
    assert sum(s.size for s in layout_tensors(family(), "hf").values()) == size


def test_scout_has_the_1133_tensors_of_the_released_index():
    stored = layout_tensors(scout(), "hf")
    assert len(stored) == 1133
    experts = "language_model.model.layers.47.feed_forward.experts."
    assert stored[experts + "gate_up_proj"].shape == (16, 5120, 16384)
    assert stored[experts + "down_proj"].shape == (16, 8192, 5120)
    assert stored["vision_model.patch_embedding.linear.weight"].shape == (1408, 588)
    assert stored["vision_model.vision_adapter.mlp.fc1.weight"].shape == (4096, 5632)
    assert stored["multi_modal_projector.linear_1.weight"].shape == (5120, 4096)


def test_maverick_rank_files_have_the_size_of_the_released_ones():
    stored = layout_tensors(maverick(), "meta", ranks=8)
    assert 2 * sum(s.size for s in stored.values()) == 100_426_276_288  # + 0.4 MB of pickle
    assert stored["layers.0.attention.wqkv.weight"].shape == ((40 + 2 * 8) * 128 // 8, 5120)
    assert stored["layers.0.feed_forward.mlp.fc1_weight"].shape == (2 * 16384 // 8, 5120)
    moe = "layers.1.feed_forward."
    assert stored[moe + "experts.moe_w_in_eD_F"].shape == (128 * 5120, 1024)
    assert stored[moe + "experts.moe_w_out_eF_D"].shape == (128 * 1024, 5120)
    assert stored[moe + "router_DE"].shape == (5120, 128)


@pytest.mark.parametrize("weight", TABLE, ids=lambda w: f"{w.name}-{w.is_moe}")
def test_a_layout_stores_each_dimension_of_a_weight_once(weight):
    letters = weight.name.rpartition("_")[2]
    for place in (weight.hf, *weight.meta):
        assert sorted("".join(place.axes)) == sorted(letters)
    assert weight.shard is None or weight.shard in letters


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_rows_that_share_a_key_are_fused_along_an_axis_of_one_shard_letter_each(layout):
    for tensor in layout_tensors(TINY, layout).values():
        axes = {part.fused_axis for part in tensor.parts}
        assert len(axes) == 1
        assert len(tensor.parts) == 1 or all(part.shard for part in tensor.parts)


@pytest.mark.parametrize("config", [TINY, DENSE_TIED])
@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_every_parameter_is_stored_exactly_once(config, layout):
    parts = collections.Counter(
        part.parameter.name
        for tensor in layout_tensors(config, layout).values()
        for part in tensor.parts
    )
    assert parts == collections.Counter([*parameters(config)])


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_only_balance_biases_have_no_place_in_a_foreign_layout(layout):
    more = parameters(BALANCED).keys() - parameters(TINY).keys()
    assert more == {"layers.1.ffn.bias_E", "layers.3.ffn.bias_E"}
    with pytest.raises(ValueError, match=rf"the {layout} layout has no place for .*bias_E"):
        layout_tensors(BALANCED, layout)


def test_parts_fill_a_fused_tensor_without_overlap():
    for layout, ranks in (("hf", 1), ("meta", 8)):
        for stored in layout_tensors(TINY, layout, ranks=ranks).values():
            assert sum(math.prod(p.shape) for p in stored.parts) == stored.size


def test_a_dimension_that_does_not_divide_over_the_ranks_is_named():
    text = dataclasses.replace(TINY.text, num_kv_heads=4)
    with pytest.raises(ValueError, match=r"w_k_DKH: K \(4\) must be divisible .* \(8\)"):
        layout_tensors(dataclasses.replace(TINY, text=text), "meta", ranks=8)
