"""Tests of checkpoint/weight_map.py and layout.py: the table against the published counts."""

import collections
import dataclasses
import math

import pytest

from llama4_jax.checkpoint.layout import stored_tensors
from llama4_jax.checkpoint.weight_map import TABLE, parameters
from llama4_jax.config import maverick, scout
from tests.checkpoint.tiny import BALANCED, DENSE_TIED, TINY


@pytest.mark.parametrize(
    ("family", "size"), [(scout, 108_641_793_536), (maverick, 401_583_781_376)]
)
def test_parameters_add_up_to_the_published_size(family, size):
    assert sum(p.size for p in parameters(family()).values()) == size
    assert sum(s.size for s in stored_tensors(family(), "hf").values()) == size


def test_scout_has_the_1133_tensors_of_the_released_index():
    stored = stored_tensors(scout(), "hf")
    assert len(stored) == 1133
    experts = "language_model.model.layers.47.feed_forward.experts."
    assert stored[experts + "gate_up_proj"].shape == (16, 5120, 16384)
    assert stored[experts + "down_proj"].shape == (16, 8192, 5120)
    assert stored["vision_model.patch_embedding.linear.weight"].shape == (1408, 588)
    assert stored["vision_model.vision_adapter.mlp.fc1.weight"].shape == (4096, 5632)
    assert stored["multi_modal_projector.linear_1.weight"].shape == (5120, 4096)


def test_maverick_rank_files_have_the_size_of_the_released_ones():
    stored = stored_tensors(maverick(), "meta", ranks=8)
    assert 2 * sum(s.size for s in stored.values()) == 100_426_276_288  # + 0.4 MB of pickle
    assert stored["layers.0.attention.wqkv.weight"].shape == ((40 + 2 * 8) * 128 // 8, 5120)
    assert stored["layers.0.feed_forward.mlp.fc1_weight"].shape == (2 * 16384 // 8, 5120)
    moe = "layers.1.feed_forward."
    assert stored[moe + "experts.moe_w_in_eD_F"].shape == (128 * 5120, 1024)
    assert stored[moe + "experts.moe_w_out_eF_D"].shape == (128 * 1024, 5120)
    assert stored[moe + "router_DE"].shape == (5120, 128)


@pytest.mark.parametrize("weight", TABLE, ids=lambda w: w.name)
def test_a_layout_stores_each_dimension_of_a_weight_once(weight):
    for place in filter(None, (weight.hf, weight.meta, *weight.others)):
        assert sorted("".join(place.axes)) == sorted(weight.letters)
        assert place.shard is None or place.shard in weight.letters


@pytest.mark.parametrize("config", [TINY, DENSE_TIED])
@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_every_parameter_is_stored_exactly_once(config, layout):
    members = collections.Counter(
        member.parameter.name
        for stored in stored_tensors(config, layout).values()
        for member in stored.members
    )
    copied = {"head.w_DV"} if config.text.tie_embeddings and layout == "meta" else set()
    assert members == collections.Counter([*parameters(config), *copied])


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_only_balance_biases_have_no_place_in_a_foreign_layout(layout):
    more = parameters(BALANCED).keys() - parameters(TINY).keys()
    assert more == {"layers.1.ffn.bias_E", "layers.3.ffn.bias_E"}
    assert [w.name for w in TABLE if not (w.hf and w.meta)] == ["layers.{}.ffn.bias_E"]
    with pytest.raises(ValueError, match=rf"the {layout} layout has no place for .*bias_E"):
        stored_tensors(BALANCED, layout)


def test_parts_fill_a_fused_tensor_without_overlap():
    for layout, ranks in (("hf", 1), ("meta", 8)):
        for stored in stored_tensors(TINY, layout, ranks=ranks).values():
            assert sum(math.prod(m.shape) for m in stored.members) == stored.size


def test_a_dimension_that_does_not_divide_over_the_ranks_is_named():
    text = dataclasses.replace(TINY.text, num_kv_heads=4)
    with pytest.raises(ValueError, match=r"w_k_DKH: K \(4\) must be divisible .* \(8\)"):
        stored_tensors(dataclasses.replace(TINY, text=text), "meta", ranks=8)
