"""Meta `params.json` to ModelConfig and back.

The file stores no feed-forward widths: they follow from `dim` by integer arithmetic, reproduced
here step by step. Unknown keys are ignored, as Meta's own reader does.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llama4_jax.config.families import every
from llama4_jax.config.json_section import EXTRAS_KEY, Section, refuse_balance_bias
from llama4_jax.config.model import (
    MAX_LAYERS,
    ModelConfig,
    RopeScaling,
    Temperature,
    TextConfig,
    VisionConfig,
)

_VOCAB_SIZE = 202_048
_RELEASED_IDS = {
    "bos_id": 200_000,
    "eos_ids": [200_001, 200_007, 200_008],
    "pad_id": 200_018,
    "patch_id": 200_092,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FFNRule:
    """The numbers in `params.json` from which the feed-forward widths follow.

    Source: llama_models 0.3.0, llama4/model.py `TransformerBlock` and llama4/moe.py `MoE`.
    """

    multiple_of: int = 2048
    ffn_dim_multiplier: float | None = 1.2
    ffn_exp: float = 4.0
    capacity_factor: float = 1.0
    auto_scale: bool = True

    def mlp_dim(self, embed_dim: int) -> int:
        """Return the width of a dense MLP: two thirds of 4 * embed_dim, scaled, rounded up."""
        return self._round(self._scale(int(4 * embed_dim)))

    def expert_dim(self, embed_dim: int) -> int:
        """Return the width of an expert; it is divided among active experts before rounding."""
        width = self._scale(int(self.ffn_exp * embed_dim))
        if self.auto_scale:
            width = int(width / (self.capacity_factor + 1))
        return self._round(width)

    def _scale(self, width: int) -> int:
        width = int(2 * width / 3)
        return width if self.ffn_dim_multiplier is None else int(self.ffn_dim_multiplier * width)

    def _round(self, width: int) -> int:
        return width + -width % self.multiple_of


def from_meta(values: Mapping[str, Any], *, dtype: Any = "bfloat16") -> ModelConfig:
    """Read the contents of a Meta `params.json`.

    What the format cannot say has these defaults, unless this package wrote the file: the token
    ids of Llama 4's tokenizer; at most 10,485,760 positions with scaled RoPE (Scout), 1,048,576
    without (Maverick) and 8192 without chunks.

    Raises:
      ValueError: a key is missing or impossible, or the vocabulary is not Llama 4's own and the
        file does not say its special token ids.
    """
    try:
        return _from_meta(Section(values, "params.json"), dtype)
    except ArithmeticError as error:
        raise ValueError(f"params.json: its numbers give no model ({error})") from error


def _from_meta(outer: Section, dtype: Any) -> ModelConfig:
    params = Section(outer.get("model"), "params.json model") if "model" in outer else outer
    extras = (params if EXTRAS_KEY in params else outer).section(EXTRAS_KEY)
    vocab_size = params.integer("vocab_size", -1)
    vocab_size = _VOCAB_SIZE if vocab_size == -1 else vocab_size
    vision = params.section("vision_args") if "vision_args" in params else None
    ids = _token_ids(extras, vocab_size)
    return ModelConfig(
        name=extras.text("name", "llama4"),
        text=_text_from_meta(params, extras, vocab_size),
        vision=None if vision is None else _vision_from_meta(vision),
        bos_id=ids["bos_id"],
        eos_ids=tuple(ids["eos_ids"]),
        pad_id=ids["pad_id"],
        patch_id=ids["patch_id"],
        max_tiles=extras.integer("max_tiles", 16),
        dtype=extras.text("dtype", dtype),
    )


def _token_ids(extras: Section, vocab_size: int) -> dict[str, Any]:
    if "bos_id" in extras.values:
        eos_ids = extras.items("eos_ids", "a list of token ids") or []
        return {**{key: extras.values.get(key) for key in _RELEASED_IDS}, "eos_ids": eos_ids}
    if vocab_size != _VOCAB_SIZE:
        raise ValueError(
            f"params.json: vocab_size ({vocab_size}) is not Llama 4's {_VOCAB_SIZE}, so the ids of "
            f"the special tokens are unknown; add {{{EXTRAS_KEY!r}: {_RELEASED_IDS}}} with the ids"
        )
    return _RELEASED_IDS


def _text_from_meta(params: Section, extras: Section, vocab_size: int) -> TextConfig:
    embed_dim = params.integer("dim")
    num_layers = params.integer("n_layers")
    if num_layers > MAX_LAYERS:
        raise params.fail("n_layers", f"at most {MAX_LAYERS}")
    num_heads = params.integer("n_heads", least=1)
    moe = params.section("moe_args") if "moe_args" in params else None
    rule = _read_rule(params, moe)
    nope = "nope_layer_interval" in params
    chunk_size = params.integer("attention_chunk_size", None)
    scaling = _scaling(params) if params.flag("use_scaled_rope", default=False) else None
    tuned = params.flag("attn_temperature_tuning", default=False)
    temperature = Temperature(
        floor=params.integer("floor_scale", 8192), coefficient=params.number("attn_scale", 0.1)
    )
    expert_dim = extras.integer("expert_dim", rule.expert_dim(embed_dim))
    return TextConfig(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=params.integer("n_kv_heads", num_heads),
        head_dim=params.integer("head_dim", embed_dim // num_heads),
        mlp_dim=rule.mlp_dim(embed_dim),
        expert_dim=expert_dim,
        num_experts=(moe or extras).integer("num_experts", 1),
        experts_per_token=1 if moe is None else moe.integer("top_k", 1),
        moe_layers=() if moe is None else _every(moe, "interleave_moe_layer_step", num_layers),
        nope_layers=_every(params, "nope_layer_interval", num_layers) if nope else (),
        chunk_size=chunk_size or None,
        rope_theta=params.number("rope_theta", 500_000.0),
        rope_scaling=scaling,
        use_qk_norm=params.flag("use_qk_norm", default=False),
        temperature=temperature if tuned else None,
        norm_eps=params.number("norm_eps", 1e-5),
        max_positions=extras.integer("max_positions", _max_positions(scaling, chunk_size)),
        tie_embeddings=extras.flag("tie_embeddings", default=False),
        rope_positions=extras.text("rope_positions", "chunk"),
    )


def _read_rule(params: Section, moe: Section | None) -> FFNRule:
    moe = Section({}, "moe_args") if moe is None else moe
    return FFNRule(
        multiple_of=params.integer("multiple_of", 256, least=1),
        ffn_dim_multiplier=params.number("ffn_dim_multiplier", None, positive=True),
        ffn_exp=params.number("ffn_exp", 4.0, positive=True),
        capacity_factor=moe.number("capacity_factor", 1.0),
        auto_scale=moe.flag("auto_scale_F", default=True),
    )


def _every(section: Section, key: str, num_layers: int) -> tuple[int, ...]:
    interval = section.integer(key, 1)
    if interval < 1:
        raise section.fail(key, "at least 1")
    return every(interval, num_layers)


def _scaling(params: Section) -> RopeScaling:
    return RopeScaling(
        factor=params.number("rope_scaling_factor", 16.0, positive=True),
        high_freq_factor=params.number("rope_high_freq_factor", 1.0),
    )


def _max_positions(scaling: RopeScaling | None, chunk_size: int | None) -> int:
    if not chunk_size:
        return 8192
    return 1_048_576 if scaling is None else 10_485_760


def _vision_from_meta(vision: Section) -> VisionConfig:
    dim = vision.integer("dim")
    return VisionConfig(
        image_size=_side(vision, "image_size"),
        patch_size=_side(vision, "patch_size"),
        embed_dim=dim,
        num_layers=vision.integer("n_layers"),
        num_heads=vision.integer("n_heads"),
        mlp_dim=int(dim * vision.number("mlp_ratio", 4.0)),
        adapter_dim=vision.integer("output_dim"),
        pixel_shuffle_ratio=vision.number("pixel_shuffle_ratio", 0.5),
    )


def _side(vision: Section, key: str) -> int:
    if not isinstance(vision.get(key), Mapping):
        return vision.integer(key)
    size = vision.section(key)
    if size.integer("height") != size.integer("width"):
        raise vision.fail(key, "square: Llama 4 tiles are")
    return size.integer("height")


def to_meta(config: ModelConfig) -> dict[str, Any]:
    """Return the contents of a `params.json` that Meta's reader takes as the same model.

    Tied embeddings are unknown to Meta; its model then has the table twice.

    Raises:
      ValueError: the format cannot express the model, for example an irregular layer pattern.
    """
    text = config.text
    refuse_balance_bias(text, "params.json")
    rule = _fit_rule(text)
    params: dict[str, Any] = {
        "dim": text.embed_dim,
        "n_layers": text.num_layers,
        "n_heads": text.num_heads,
        "n_kv_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "vocab_size": text.vocab_size,
        "multiple_of": rule.multiple_of,
        "ffn_dim_multiplier": rule.ffn_dim_multiplier,
        "ffn_exp": rule.ffn_exp,
        "norm_eps": text.norm_eps,
        "attention_chunk_size": text.chunk_size,
        "rope_theta": text.rope_theta,
        "use_scaled_rope": text.rope_scaling is not None,
        "nope_layer_interval": _find_interval(text.nope_layers, text, "nope_layers"),
        "use_qk_norm": text.use_qk_norm,
        "attn_temperature_tuning": text.temperature is not None,
    }
    if text.temperature is not None:
        params["floor_scale"] = float(text.temperature.floor)
        params["attn_scale"] = text.temperature.coefficient
    if text.rope_scaling is not None:
        params |= _scaling_to_meta(text.rope_scaling)
    if text.moe_layers:
        params["moe_args"] = {
            "num_experts": text.num_experts,
            "capacity_factor": rule.capacity_factor,
            "auto_scale_F": rule.auto_scale,
            "top_k": text.experts_per_token,
            "interleave_moe_layer_step": _find_interval(text.moe_layers, text, "moe_layers"),
        }
    if config.vision is not None:
        params["vision_args"] = _vision_to_meta(config.vision)
    params[EXTRAS_KEY] = _extras(config)
    return params


def _extras(config: ModelConfig) -> dict[str, Any]:
    text = config.text
    extras: dict[str, Any] = {
        "name": config.name,
        "bos_id": config.bos_id,
        "eos_ids": list(config.eos_ids),
        "pad_id": config.pad_id,
        "patch_id": config.patch_id,
        "max_positions": text.max_positions,
        "max_tiles": config.max_tiles,
        "dtype": config.dtype,
        "tie_embeddings": text.tie_embeddings,
        "rope_positions": text.rope_positions,
    }
    if not text.moe_layers:
        extras |= {"expert_dim": text.expert_dim, "num_experts": text.num_experts}
    return extras


def _fit_rule(text: TextConfig) -> FFNRule:
    """Return numbers from which Meta's arithmetic gives this model's widths.

    The released models' own numbers are tried first. Any other pair of widths comes from a
    multiplier that hits the dense width and a capacity factor that divides it down to the experts';
    aiming half a step above a target keeps the truncations away from it.
    """
    unscaled = int(2 * int(4 * text.embed_dim) / 3)
    fitted = FFNRule(
        multiple_of=1,
        ffn_dim_multiplier=(text.mlp_dim + 0.5) / unscaled,
        capacity_factor=text.mlp_dim / (text.expert_dim + 0.5) - 1,
    )
    for rule in (FFNRule(), fitted):
        widths = (rule.mlp_dim(text.embed_dim), rule.expert_dim(text.embed_dim))
        if widths == (text.mlp_dim, text.expert_dim):
            return rule
    raise ValueError(
        f"mlp_dim ({text.mlp_dim}) with expert_dim ({text.expert_dim}) cannot be expressed by "
        "params.json, which computes both from dim; convert to the hf or orbax layout instead"
    )


def _find_interval(layers: tuple[int, ...], text: TextConfig, name: str) -> int | None:
    if not layers:
        return None
    interval = layers[0] + 1
    if layers != every(interval, text.num_layers):
        raise ValueError(
            f"{name} {layers} cannot be expressed by params.json, which knows every n-th layer "
            "only; convert to the hf or orbax layout instead"
        )
    return interval


def _scaling_to_meta(scaling: RopeScaling) -> dict[str, float]:
    fixed = (scaling.low_freq_factor, scaling.original_max_positions)
    if fixed != (1.0, 8192):
        raise ValueError(
            f"rope_scaling with low_freq_factor, original_max_positions {fixed} cannot be "
            "expressed by params.json, which fixes them at (1.0, 8192)"
        )
    return {
        "rope_scaling_factor": scaling.factor,
        "rope_high_freq_factor": scaling.high_freq_factor,
    }


def _vision_to_meta(vision: VisionConfig) -> dict[str, Any]:
    ratio = vision.mlp_dim / vision.embed_dim
    fixed = (vision.num_channels, vision.norm_eps, vision.rope_theta)
    if fixed != (3, 1e-5, 10_000.0) or int(vision.embed_dim * ratio) != vision.mlp_dim:
        raise ValueError(
            f"vision num_channels, norm_eps, rope_theta {fixed} cannot be expressed by "
            "params.json, which fixes them at (3, 1e-05, 10000.0)"
        )
    return {
        "image_size": {"height": vision.image_size, "width": vision.image_size},
        "patch_size": {"height": vision.patch_size, "width": vision.patch_size},
        "dim": vision.embed_dim,
        "n_layers": vision.num_layers,
        "n_heads": vision.num_heads,
        "mlp_ratio": ratio,
        "output_dim": vision.adapter_dim,
        "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
    }
