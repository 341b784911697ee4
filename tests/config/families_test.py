import dataclasses
import re

import jax
import pytest

from llama4_jax.config import FAMILIES, behemoth_preview, layer_pattern, maverick, nano, scout
from llama4_jax.model import Llama4


def count(config, *, prefix=""):
    model = jax.eval_shape(lambda key: Llama4(config, key=key), jax.random.key(0))
    return sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(model)
        if jax.tree_util.keystr(path, simple=True, separator=".").startswith(prefix)
    )


@pytest.mark.parametrize(
    ("family", "parameters"), [(scout, 108_641_793_536), (maverick, 401_583_781_376)]
)
def test_parameter_counts_equal_the_released_checkpoints_to_the_last_digit(family, parameters):
    assert count(family()) == parameters


@pytest.mark.parametrize("family", [scout, maverick])
def test_vision_encoder_and_projector_have_the_released_sizes(family):
    assert count(family(), prefix="vision") == 850_960_896
    assert count(family(), prefix="projector") == 20_971_520


@pytest.mark.parametrize(
    ("family", "active"), [(scout, 17_172_894_720), (maverick, 17_184_691_200)]
)
def test_active_parameters_are_the_17_billion_of_the_names(family, active):
    config = family()
    text = config.text
    idle = text.num_experts - text.experts_per_token
    expert = 3 * text.embed_dim * text.expert_dim
    images = count(config, prefix="vision") + count(config, prefix="projector")
    assert count(config) - images - len(text.moe_layers) * idle * expert == active


def test_behemoth_is_near_two_trillion_and_says_that_it_is_a_guess():
    assert 1.95e12 < count(behemoth_preview()) < 2.05e12
    assert "guess" in (behemoth_preview.__doc__ or "")


def test_nano_ships_in_eight_megabytes_of_bfloat16():
    assert 2 * count(nano()) <= 8e6


def test_nope_layers_are_every_fourth_counting_from_three():
    assert scout().text.nope_layers == (3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47)


def test_scout_repeats_four_mixture_layers_and_maverick_alternates():
    for family, moe in [(scout, (True,) * 4), (maverick, (False, True, False, True))]:
        pattern = layer_pattern(family().text)
        assert pattern.num_groups == 12
        assert pattern.tail == ()
        assert tuple(kind.is_moe for kind in pattern.slots) == moe
        assert tuple(kind.has_rope for kind in pattern.slots) == (True, True, True, False)


def test_every_layer_has_one_place_in_the_pattern():
    text = dataclasses.replace(
        scout().text, num_layers=6, moe_layers=tuple(range(6)), nope_layers=(3,)
    )
    pattern = layer_pattern(text)
    assert [pattern.name(i) for i in range(6)] == [
        *((f"groups.slots.{i}", 0) for i in range(4)),
        ("tail.0", None),
        ("tail.1", None),
    ]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_kv_heads", 7, "num_heads (40) must be a multiple of num_kv_heads (7)"),
        ("embed_dim", 0, "embed_dim (0) must be positive"),
        ("chunk_size", -1, "chunk_size (-1) must be positive"),
        ("experts_per_token", 17, "experts_per_token (17) must lie in 1..num_experts (16)"),
        ("nope_layers", (3, 48), "must be increasing layer indices from 0 to 47"),
        ("rope_positions", "relative", "must be 'chunk' or 'absolute'"),
        ("balance_bias", 0.001, "balance_bias (0.001) must be True or False; how fast it moves"),
    ],
)
def test_bad_sizes_are_refused_with_the_value_and_the_limit(field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(scout().text, **{field: value})


def test_a_balance_bias_needs_routers_and_no_member_of_the_family_has_one():
    assert not any(family().text.balance_bias for family in FAMILIES.values())
    with pytest.raises(ValueError, match="balance_bias is for routers"):
        dataclasses.replace(scout().text, balance_bias=True, moe_layers=())


def test_token_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="patch_id"):
        dataclasses.replace(scout(), patch_id=202_048)
