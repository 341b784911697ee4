"""Tests of config/hf.py and config/meta.py: both files to ModelConfig and back."""

import dataclasses

import pytest

from llama4_jax.checkpoint.native import config_from_json, config_to_json
from llama4_jax.config import FAMILIES, RopeScaling, nano, scout
from llama4_jax.config.hf import from_hf, to_hf
from llama4_jax.config.meta import FFNRule, from_meta, to_meta
from tests.fuzz.mutate import STRANGE

# The released Maverick's config.json leaves out what transformers' defaults say.
MAVERICK = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "boi_token_index": 200080,
    "eoi_token_index": 200081,
    "image_token_index": 200092,
    "model_type": "llama4",
    "torch_dtype": "bfloat16",
    "text_config": {
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attention_dropout": 0.0,
        "bos_token_id": 200000,
        "eos_token_id": [200001, 200007, 200008],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "interleave_moe_layer_step": 2,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 1048576,
        "model_type": "llama4_text",
        "no_rope_layers": [],
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "output_router_logits": False,
        "pad_token_id": 200018,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "router_aux_loss_coef": 0.001,
        "use_qk_norm": False,
        "vocab_size": 202048,
    },
    "vision_config": {
        "hidden_act": "gelu",
        "hidden_size": 1408,
        "image_size": 336,
        "intermediate_size": 5632,
        "model_type": "llama4_vision_model",
        "norm_eps": 1e-05,
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 34,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
        "vision_feature_select_strategy": "default",
        "vision_output_dim": 4096,
    },
}

SCOUT_PARAMS = {
    "dim": 5120,
    "n_layers": 48,
    "n_heads": 40,
    "n_kv_heads": 8,
    "vocab_size": -1,
    "multiple_of": 2048,
    "ffn_dim_multiplier": 1.2,
    "ffn_exp": 4.0,
    "norm_eps": 1e-05,
    "attention_chunk_size": 8192,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "nope_layer_interval": 4,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "vision_args": {
        "image_size": {"height": 336, "width": 336},
        "patch_size": {"height": 14, "width": 14},
        "dim": 1408,
        "n_layers": 34,
        "n_heads": 16,
        "mlp_ratio": 4.0,
        "output_dim": 4096,
        "pixel_shuffle_ratio": 0.5,
    },
    "moe_args": {
        "num_experts": 16,
        "capacity_factor": 1.0,
        "auto_scale_F": True,
        "use_shared_expert": True,
        "top_k": 1,
        "interleave_moe_layer_step": 1,
        "use_token_choice": True,
    },
    "quantization_args": None,
    "a_key_from_the_future": 3,
}


def _text(values, **changes):
    return {**values, "text_config": {**values["text_config"], **changes}}


def _unnamed(config):
    return dataclasses.replace(config, name="llama4")


@pytest.mark.parametrize("family", list(FAMILIES.values()))
def test_every_family_survives_config_json_and_params_json(family):
    assert from_hf(to_hf(family())) == family()
    assert from_meta(to_meta(family())) == family()


def test_the_released_maverick_config_is_the_family_maverick():
    assert from_hf(MAVERICK) == _unnamed(FAMILIES["maverick"]())


@pytest.mark.parametrize("nested", [False, True])
def test_the_released_scout_params_are_the_family_scout(nested):
    params = {"model": SCOUT_PARAMS} if nested else SCOUT_PARAMS
    assert from_meta(params) == _unnamed(scout())


def test_temperature_is_off_in_params_json_and_on_in_config_json_unless_said():
    params = {k: v for k, v in SCOUT_PARAMS.items() if k != "attn_temperature_tuning"}
    assert from_meta(params).text.temperature is None
    assert from_hf(MAVERICK).text.temperature is not None
    assert from_hf(_text(MAVERICK, attn_temperature_tuning=4)).text.temperature is not None
    assert from_hf(_text(MAVERICK, attn_temperature_tuning=0)).text.temperature is None
    tuned = _text(MAVERICK, floor_scale=4096.0, attn_scale=0.2)
    assert from_hf(tuned).text.temperature.floor == 4096
    assert from_hf(tuned).text.temperature.coefficient == 0.2


def test_both_spellings_of_rope_scaling_are_read():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = RopeScaling(factor=8.0, high_freq_factor=4.0)
    for key in ("rope_type", "type"):
        old = _text(MAVERICK, rope_theta=1e4, rope_scaling={**scaling, key: "llama3"})
        assert from_hf(old).text.rope_scaling == expected
        assert from_hf(old).text.rope_theta == 1e4
    new = {**scaling, "rope_type": "llama3", "rope_theta": 1e6}
    assert from_hf(_text(MAVERICK, rope_parameters=new)).text.rope_scaling == expected
    assert from_hf(_text(MAVERICK, rope_parameters=new)).text.rope_theta == 1e6


def test_no_rope_layers_marks_rope_with_one_and_empty_means_every_fourth():
    every_third = [1, 1, 0] * 16
    assert from_hf(_text(MAVERICK, no_rope_layers=every_third)).text.nope_layers[:2] == (2, 5)
    assert from_hf(_text(MAVERICK, no_rope_layers=[1] * 48)).text.nope_layers == ()
    assert from_hf(_text(MAVERICK, no_rope_layers=None)).text.nope_layers[:2] == (3, 7)
    with pytest.raises(ValueError, match=r"no_rope_layers .* each of 48 layers"):
        from_hf(_text(MAVERICK, no_rope_layers=[1, 0]))


def test_moe_layers_list_wins_over_the_interval():
    assert from_hf(_text(MAVERICK, moe_layers=[5, 2])).text.moe_layers == (2, 5)
    assert from_hf(_text(MAVERICK, moe_layers=[])).text.moe_layers == ()
    dense = _text(MAVERICK, moe_layers=[], interleave_moe_layer_step=0)
    assert from_hf(dense).text.moe_layers == ()
    with pytest.raises(ValueError, match="interleave_moe_layer_step"):
        from_hf(_text(MAVERICK, interleave_moe_layer_step=0))


def test_a_guard_model_without_chunks_round_trips_through_both_files():
    guard = from_hf(_text(MAVERICK, attention_chunk_size=None, moe_layers=[]))
    assert guard.text.chunk_size is None
    assert to_hf(guard)["text_config"]["attention_chunk_size"] == 1_048_576
    assert set(to_hf(guard)["text_config"]["layer_types"]) == {"full_attention"}
    assert from_hf(to_hf(guard)) == guard
    assert from_meta(to_meta(guard)) == guard


def test_a_tied_text_only_model_is_flat_and_round_trips():
    flat = {
        **MAVERICK["text_config"],
        "tie_word_embeddings": True,
        "moe_layers": [],
        "no_rope_layers": [1] * 48,
        "attention_chunk_size": 32768,
        "eos_token_id": 200001,
        "dtype": "bfloat16",
    }
    config = from_hf(flat)
    assert config.text.tie_embeddings and config.vision is None and config.patch_id is None
    assert config.eos_ids == (200001,)
    assert to_hf(config)["model_type"] == "llama4_text"
    assert from_hf(to_hf(config)) == config
    assert from_meta(to_meta(config)) == config


def test_missing_pad_falls_back_to_the_end_token_and_float16_to_float32():
    values = _text(MAVERICK, pad_token_id=None, torch_dtype="float16")
    assert from_hf(values).pad_id == 200001
    assert from_hf(values).dtype == "float32"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "model_type .*'llama'"),
        ({"model_type": "llama4"}, "needs a text_config"),
        (_text(MAVERICK, attention_bias=True), "attention_bias .*True"),
        (_text(MAVERICK, hidden_act="gelu"), "hidden_act .*'silu'"),
        (_text(MAVERICK, rope_scaling={"rope_type": "yarn"}), "rope_type .*'yarn'"),
        (_text(MAVERICK, hidden_size="big"), "hidden_size .*'big'.* whole number"),
        (_text(MAVERICK, num_key_value_heads=7), "num_heads .40. .*num_kv_heads .7."),
        (_text(MAVERICK, torch_dtype="int8"), "dtype .*'int8'"),
        (_text(MAVERICK, layer_types=["full_attention"] * 48), r"layer_types\[0\]"),
        ({**MAVERICK, "vision_config": {"vision_output_dim": 8}}, "projector_input_dim"),
        ({**MAVERICK, "text_config": []}, "text_config must be a JSON object"),
        (
            {**MAVERICK, "vision_config": {**MAVERICK["vision_config"], "intermediate_size": 9}},
            "intermediate_size .9. must be .*5632",
        ),
    ],
)
def test_an_impossible_config_json_is_refused_by_key(values, message):
    with pytest.raises(ValueError, match=message):
        from_hf(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": None}, "dim is missing"),
        ({"nope_layer_interval": 0}, "nope_layer_interval .0. must be at least 1"),
        ({"vocab_size": 1000}, "special tokens are unknown"),
        ({"n_heads": 41}, "num_heads .41."),
        ({"vision_args": {**SCOUT_PARAMS["vision_args"], "dim": "x"}}, "vision_args: dim"),
    ],
)
def test_impossible_params_are_refused_by_key(changes, message):
    with pytest.raises(ValueError, match=message):
        from_meta({**SCOUT_PARAMS, **changes})


def test_a_null_id_means_none_and_an_absent_one_what_transformers_takes():
    none = from_hf(_text(MAVERICK, eos_token_id=None, bos_token_id=None))
    assert none.eos_ids == () and none.bos_id is None
    assert from_hf(to_hf(none)) == none
    assert from_meta(to_meta(none)) == none
    absent = {k: v for k, v in MAVERICK["text_config"].items() if not k.endswith("_token_id")}
    found = from_hf({**MAVERICK, "text_config": absent})
    assert (found.bos_id, found.eos_ids, found.pad_id) == (1, (2,), 2)
    above = from_hf({**_text(MAVERICK, eos_token_id=None), "eos_token_id": 7})
    assert above.eos_ids == (7,)


def test_the_encoders_norm_eps_is_ignored_as_by_transformers_and_no_other_is_written():
    vision = {**MAVERICK["vision_config"], "norm_eps": 0.1}
    assert from_hf({**MAVERICK, "vision_config": vision}) == from_hf(MAVERICK)
    other = dataclasses.replace(scout().vision, norm_eps=1e-6)
    with pytest.raises(ValueError, match=r"norm_eps \(1e-06\) cannot be expressed"):
        to_hf(dataclasses.replace(scout(), vision=other))


@pytest.mark.parametrize(
    ("key", "scaling", "says"),
    [
        ("rope_scaling", {"type": "yarn"}, r"rope_scaling: type \('yarn'\)"),
        ("rope_scaling", {"rope_type": "yarn"}, r"rope_scaling: rope_type \('yarn'\)"),
        ("rope_parameters", {"rope_type": ["x"]}, "rope_parameters: rope_type"),
        ("rope_scaling", {"rope_type": "llama3"}, "rope_scaling: low_freq_factor is missing"),
        ("rope_scaling", {"factor": 0}, r"rope_scaling: factor \(0\)"),
        ("rope_scaling", {"high_freq_factor": 0.5}, r"rope_scaling: high_freq_factor \(0.5\)"),
        (
            "rope_parameters",
            {"original_max_position_embeddings": 0},
            r"rope_parameters: original_max_position_embeddings \(0\) must be .* from 1 to",
        ),
        ("rope_scaling", 3, "rope_scaling must be a JSON object, not 3"),
    ],
)
def test_errors_of_rope_scaling_name_the_key_that_was_written(key, scaling, says):
    whole = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if isinstance(scaling, dict) and not {"type", "rope_type"} & scaling.keys():
        scaling = {**whole, **scaling}
    with pytest.raises(ValueError, match=says):
        from_hf(_text(MAVERICK, **{key: scaling}))


def _keys(values, path=()):
    """Yield the path of every key of a config."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _keys(value, (*path, key))


def _with(values, path, value):
    if not path:
        return value
    return {**values, path[0]: _with(values.get(path[0], {}), path[1:], value)}


EVERY_KEY = {
    "hf": (from_hf, to_hf(scout())),
    "meta": (from_meta, to_meta(scout())),
    "native": (lambda v: config_from_json(v, "config"), config_to_json(scout())),
}


@pytest.mark.parametrize("layout", EVERY_KEY)
def test_a_strange_value_of_any_key_is_a_config_or_a_line(layout):
    read, values = EVERY_KEY[layout]
    paths = [*_keys(values), ("rope_theta",), ("text_config", "layer_types")]
    for path in paths:
        for strange in STRANGE:
            try:
                assert read(_with(values, path, strange)).text.num_layers <= 512
            except ValueError as error:
                assert len(str(error)) < 1000, (path, strange)


def test_widths_follow_metas_integer_arithmetic():
    rule = FFNRule()
    assert rule.mlp_dim(5120) == 16384
    assert rule.expert_dim(5120) == 8192  # 16383 / 2 is rounded down before rounding up to 2048s
    assert dataclasses.replace(rule, auto_scale=False).expert_dim(5120) == 16384
    assert FFNRule(multiple_of=256, ffn_dim_multiplier=None).mlp_dim(4096) == 11008


@pytest.mark.parametrize("mlp_dim", [1, 97, 1000])
@pytest.mark.parametrize("expert_dim", [1, 7, 3000])
def test_any_pair_of_widths_is_expressible_in_params_json(mlp_dim, expert_dim):
    text = dataclasses.replace(nano().text, mlp_dim=mlp_dim, expert_dim=expert_dim)
    config = dataclasses.replace(nano(), vision=None, text=text)
    assert from_meta(to_meta(config)) == config


@pytest.mark.parametrize("field", ["moe_layers", "nope_layers"])
def test_params_json_refuses_an_irregular_layer_pattern(field):
    text = dataclasses.replace(nano().text, **{field: (0, 3)})
    config = dataclasses.replace(nano(), text=text)
    with pytest.raises(ValueError, match=rf"{field} \(0, 3\) cannot be expressed"):
        to_meta(config)
    assert from_hf(to_hf(config)) == config
