"""Hugging Face `config.json` to ModelConfig and back.

Keys that do not shape the model (dropout, initialisers, tokenizer ids of image borders) are
ignored; a key that would change the mathematics in a way this package does not compute is refused.
A missing key means what it means to transformers' `Llama4TextConfig` and `Llama4VisionConfig`.
"""

from collections.abc import Mapping
from typing import Any

from llama4_jax.config.families import every
from llama4_jax.config.json_section import EXTRAS_KEY, Section, refuse_balance_bias
from llama4_jax.config.model import (
    MAX_LAYERS,
    DType,
    ModelConfig,
    RopeScaling,
    Temperature,
    TextConfig,
    VisionConfig,
)
from llama4_jax.untrusted import shown

_DTYPES: dict[str, DType] = {"bfloat16": "bfloat16", "float32": "float32", "float16": "float32"}


def from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Read the contents of a Hugging Face `config.json`.

    Understands `Llama4ForConditionalGeneration` (nested text_config and vision_config) and
    `Llama4ForCausalLM` (flat, text only), in the spellings of transformers 4.51 to 5.23. A dtype of
    float16 is read as float32, which holds the same values; an absent one as float32 too.

    Raises:
      ValueError: a key is missing, impossible, or asks for mathematics that Llama 4 does not have.
    """
    top = Section(values, "config.json")
    model_type = top.get("model_type")
    if model_type not in ("llama4", "llama4_text"):
        raise top.fail("model_type", "'llama4' or 'llama4_text'")
    nested = model_type == "llama4"
    if nested and "text_config" not in top:
        raise ValueError("config.json: a model_type of 'llama4' needs a text_config")
    text = top.section("text_config") if nested else top
    has_vision = nested and "vision_config" in top
    extras = top.section(EXTRAS_KEY)
    dtype = text.get("dtype", text.get("torch_dtype", top.get("dtype", top.get("torch_dtype"))))
    dtype = "float32" if dtype is None else dtype
    known = dtype.removeprefix("torch.") if isinstance(dtype, str) else None
    if known not in _DTYPES:
        raise ValueError(f"config.json: dtype ({shown(dtype)}) must be one of {sorted(_DTYPES)}")
    eos_ids = _token_ids(text, top, "eos_token_id", default=2)
    bos_ids = _token_ids(text, top, "bos_token_id", default=1)
    pad_ids = _token_ids(text, top, "pad_token_id", default=None)
    return ModelConfig(
        name=extras.text("name", "llama4"),
        text=_text_from_hf(text, top, extras),
        vision=_vision_from_hf(top.section("vision_config")) if has_vision else None,
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=eos_ids,
        pad_id=(pad_ids or eos_ids or (0,))[0],
        patch_id=_patch_id(top, extras, has_vision=has_vision),
        max_tiles=extras.integer("max_tiles", 16),
        dtype=_DTYPES[known],
    )


def _patch_id(top: Section, extras: Section, *, has_vision: bool) -> int | None:
    if has_vision:
        return top.integer("image_token_index", top.integer("image_token_id", 200_092))
    return extras.integer("patch_id", None)


def _token_ids(text: Section, top: Section, key: str, default: int | None) -> tuple[int, ...]:
    """Return one id or a list of ids as a tuple; null and a negative id mean that there is none.

    The default is for a key that is in neither section.
    """
    section = text if key in text else top
    if not any(key in s.values for s in (text, top)):
        return () if default is None else (default,)
    value = section.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise section.fail(key, "a token id or a list of them")
    return tuple(i for i in ids if i >= 0)


def _text_from_hf(text: Section, top: Section, extras: Section) -> TextConfig:
    _refuse(text, "hidden_act", allowed=("silu",))
    _refuse(text, "attention_bias", allowed=(False,))
    num_layers = text.integer("num_hidden_layers", 48)
    if num_layers > MAX_LAYERS:
        raise text.fail("num_hidden_layers", f"at most {MAX_LAYERS}")
    num_heads = text.integer("num_attention_heads", 40)
    embed_dim = text.integer("hidden_size", 5120)
    has_chunks = text.values.get("attention_chunk_size", 8192) is not None
    chunk_size = text.integer("attention_chunk_size", 8192) if has_chunks else None
    nope_layers = _nope_layers(text, num_layers)
    _check_layer_types(text, nope_layers, chunk_size)
    tuned = text.flag("attn_temperature_tuning", default=True)
    tied = text if "tie_word_embeddings" in text else top
    rope_theta, rope_scaling = _rope_from_hf(text)
    return TextConfig(
        vocab_size=text.integer("vocab_size", 202_048),
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=text.integer("num_key_value_heads", 8),
        head_dim=text.integer("head_dim", 128),
        mlp_dim=text.integer("intermediate_size_mlp", 16_384),
        expert_dim=text.integer("intermediate_size", 8192),
        num_experts=text.integer("num_local_experts", 16),
        experts_per_token=text.integer("num_experts_per_tok", 1),
        moe_layers=_moe_layers(text, num_layers),
        nope_layers=nope_layers,
        chunk_size=None if extras.get("full_attention") else chunk_size,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        use_qk_norm=text.flag("use_qk_norm", default=True),
        temperature=_temperature(text) if tuned else None,
        norm_eps=text.number("rms_norm_eps", 1e-5),
        max_positions=text.integer("max_position_embeddings", 131_072),
        tie_embeddings=tied.flag("tie_word_embeddings", default=False),
        rope_positions=extras.text("rope_positions", "chunk"),
    )


def _refuse(section: Section, key: str, allowed: tuple[Any, ...]) -> None:
    if key in section and section.get(key) not in allowed:
        raise section.fail(key, f"{allowed[0]!r}: Llama 4 computes nothing else")


def _temperature(text: Section) -> Temperature:
    return Temperature(
        floor=text.integer("floor_scale", 8192), coefficient=text.number("attn_scale", 0.1)
    )


def _moe_layers(text: Section, num_layers: int) -> tuple[int, ...]:
    layers = text.items("moe_layers", "a list of layers, counted from 0")
    if layers is not None:
        if not all(type(i) is int and 0 <= i < num_layers for i in layers):
            raise text.fail("moe_layers", f"a list of layers, from 0 to {num_layers - 1}")
        return tuple(sorted(layers))
    step = text.integer("interleave_moe_layer_step", 1)
    if step < 1:
        raise text.fail("interleave_moe_layer_step", "at least 1, or moe_layers must be given")
    return every(step, num_layers)


def _nope_layers(text: Section, num_layers: int) -> tuple[int, ...]:
    """Read `no_rope_layers`, whose 1 marks a RoPE layer and 0 a NoPE layer; empty means default."""
    marks = text.items("no_rope_layers", "a list of 0 and 1")
    if not marks:
        interval = text.integer("no_rope_layer_interval", 4)
        if interval < 1:
            raise text.fail("no_rope_layer_interval", "at least 1, or no_rope_layers must be given")
        return every(interval, num_layers)
    if len(marks) < num_layers or any(mark not in (0, 1) for mark in marks):
        raise text.fail("no_rope_layers", f"a list of 0 and 1 for each of {num_layers} layers")
    return tuple(i for i in range(num_layers) if not marks[i])


def _check_layer_types(text: Section, nope: tuple[int, ...], chunk_size: int | None) -> None:
    """Refuse `layer_types` that would chunk a NoPE layer or let a RoPE layer see past its chunk."""
    types = text.items("layer_types", "a list with the kind of each layer")
    if not types or chunk_size is None:
        return
    for layer, kind in enumerate(types):
        expected = "full_attention" if layer in nope else "chunked_attention"
        never_cut = chunk_size >= text.integer("max_position_embeddings", 131_072)
        if kind != expected and not never_cut:
            raise ValueError(
                f"{text.where}: layer_types[{layer}] ({shown(kind)}) must be {expected!r}, because "
                f"no_rope_layers makes it a {'NoPE' if layer in nope else 'RoPE'} layer"
            )


def _rope_from_hf(text: Section) -> tuple[float, RopeScaling | None]:
    """Read theta and scaling from `rope_parameters` (5.x) or `rope_theta`, `rope_scaling` (4.x)."""
    rope = text.section("rope_parameters" if "rope_parameters" in text else "rope_scaling")
    theta = rope.number("rope_theta", text.number("rope_theta", 500_000.0))
    key = "type" if "type" in rope and "rope_type" not in rope else "rope_type"
    kind = rope.get(key, "default")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise rope.fail(key, "'llama3' or 'default'")
    low = rope.number("low_freq_factor", positive=True)
    high = rope.number("high_freq_factor", positive=True)
    if high < low:
        raise rope.fail("high_freq_factor", f"at least low_freq_factor ({low})")
    return theta, RopeScaling(
        factor=rope.number("factor", positive=True),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=rope.integer("original_max_position_embeddings", least=1),
    )


def _vision_from_hf(vision: Section) -> VisionConfig:
    """Read the encoder; its `norm_eps` is ignored as by transformers, which computes with 1e-5."""
    _refuse(vision, "hidden_act", allowed=("gelu",))
    _refuse(vision, "multi_modal_projector_bias", allowed=(False,))
    _refuse(vision, "vision_feature_select_strategy", allowed=("default",))
    adapter_dim = vision.integer("vision_output_dim", 7680)
    for key in ("projector_input_dim", "projector_output_dim"):
        if vision.integer(key, 4096) != adapter_dim:
            raise vision.fail(key, f"the same as vision_output_dim ({adapter_dim})")
    rope = vision.section("rope_parameters")
    config = VisionConfig(
        image_size=_side(vision, "image_size", 448),
        patch_size=_side(vision, "patch_size", 14),
        num_channels=vision.integer("num_channels", 3),
        embed_dim=vision.integer("hidden_size", 768),
        num_layers=vision.integer("num_hidden_layers", 34),
        num_heads=vision.integer("num_attention_heads", 16),
        mlp_dim=vision.integer("intermediate_size", 5632),
        adapter_dim=adapter_dim,
        rope_theta=rope.number("rope_theta", vision.number("rope_theta", 10_000.0)),
        pixel_shuffle_ratio=vision.number("pixel_shuffle_ratio", 0.5),
    )
    shuffled = config.embed_dim * config.shuffle**2
    if config.mlp_dim != shuffled:
        raise vision.fail(
            "intermediate_size",
            f"hidden_size / pixel_shuffle_ratio**2 ({shuffled}), the width that the adapter reads",
        )
    return config


def _side(vision: Section, key: str, default: int) -> int:
    value = vision.get(key)
    if isinstance(value, list):
        if len(value) != 2 or value[0] != value[1]:
            raise vision.fail(key, "one side or two equal ones")
        return Section({key: value[0]}, vision.where).integer(key)
    return vision.integer(key, default)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the contents of a `config.json` that transformers loads as the same model.

    transformers cannot express an unchunked decoder (its mask builder requires a chunk size), so
    one is written with a chunk of all its positions and full attention in every layer.

    Raises:
      ValueError: the format cannot express the model.
    """
    refuse_balance_bias(config.text, "config.json")
    text = _text_to_hf(config)
    extras = _extras(config)
    if config.vision is None:
        head = {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"}
        return {**head, **text, EXTRAS_KEY: extras}
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "image_token_index": config.patch_id,
        "tie_word_embeddings": config.text.tie_embeddings,
        "dtype": config.dtype,
        "text_config": text,
        "vision_config": _vision_to_hf(config.vision, config.dtype),
        EXTRAS_KEY: extras,
    }


def _extras(config: ModelConfig) -> dict[str, Any]:
    extras: dict[str, Any] = {"name": config.name, "max_tiles": config.max_tiles}
    if config.text.chunk_size is None:
        extras["full_attention"] = True
    if config.text.rope_positions != "chunk":
        extras["rope_positions"] = config.text.rope_positions
    if config.vision is None and config.patch_id is not None:
        extras["patch_id"] = config.patch_id
    return extras


def _text_to_hf(config: ModelConfig) -> dict[str, Any]:
    text = config.text
    temperature = text.temperature or Temperature()
    eos_ids = list(config.eos_ids)
    values: dict[str, Any] = {
        "model_type": "llama4_text",
        "vocab_size": text.vocab_size,
        "hidden_size": text.embed_dim,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "intermediate_size": text.expert_dim,
        "intermediate_size_mlp": text.mlp_dim,
        "num_local_experts": text.num_experts,
        "num_experts_per_tok": text.experts_per_token,
        "moe_layers": list(text.moe_layers),
        "no_rope_layers": [int(i not in text.nope_layers) for i in range(text.num_layers)],
        "attention_chunk_size": text.chunk_size or text.max_positions,
        "use_qk_norm": text.use_qk_norm,
        "attn_temperature_tuning": text.temperature is not None,
        "floor_scale": temperature.floor,
        "attn_scale": temperature.coefficient,
        "rms_norm_eps": text.norm_eps,
        "max_position_embeddings": text.max_positions,
        "rope_theta": text.rope_theta,
        "rope_scaling": _rope_scaling_to_hf(text.rope_scaling),
        "attention_bias": False,
        "hidden_act": "silu",
        "tie_word_embeddings": text.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids or None,
        "pad_token_id": config.pad_id,
        "dtype": config.dtype,
    }
    if text.chunk_size is None:
        values["layer_types"] = ["full_attention"] * text.num_layers
    return values


def _rope_scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }


def _vision_to_hf(vision: VisionConfig, dtype: DType) -> dict[str, Any]:
    shuffled = vision.embed_dim * vision.shuffle**2
    if vision.norm_eps != 1e-5:
        raise ValueError(
            f"vision norm_eps ({vision.norm_eps}) cannot be expressed by config.json, whose "
            "readers compute with 1e-05 whatever it says"
        )
    if vision.mlp_dim != shuffled:
        raise ValueError(
            f"vision mlp_dim ({vision.mlp_dim}) must be embed_dim / pixel_shuffle_ratio**2 "
            f"({shuffled}): config.json has one number for both"
        )
    return {
        "model_type": "llama4_vision_model",
        "hidden_size": vision.embed_dim,
        "hidden_act": "gelu",
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "num_channels": vision.num_channels,
        "intermediate_size": vision.mlp_dim,
        "vision_output_dim": vision.adapter_dim,
        "projector_input_dim": vision.adapter_dim,
        "projector_output_dim": vision.adapter_dim,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "norm_eps": vision.norm_eps,
        "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        "rope_parameters": {"rope_type": "default", "rope_theta": vision.rope_theta},
        "dtype": dtype,
    }
