"""One table of every weight: its canonical name, its Hugging Face key and its Meta keys.

A row says in which axes each layout stores the same numbers. `NH D` means a stored matrix whose
first axis runs over heads and then over the head dimension, and whose second axis is the embedding;
the canonical name `w_q_DNH` says that the model holds the same numbers as [D, N, H]. Which of the
weights a model has, and their shapes, the model itself says.

Rows that share a stored key are fused there, in table order, along the axis with the letter
`shard`. That is also the letter that Meta divides over its model-parallel ranks; a fused weight is
divided first and fused within each rank. The order of rows is that of tensors in files.

Source: the module names of transformers 5.23 `modeling_llama4.py` and of llama_models 0.3.0
`llama4/model.py`, with the raw keys that the latter's load hooks rename.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

Layout = Literal["hf", "meta"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a layout stores a weight.

    Attributes:
      key: the stored tensor's name, `{}` being the layer.
      axes: letters of each stored axis, the slowest first, such as ("NH", "D").
    """

    key: str
    axes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """One row of the table.

    Attributes:
      name: canonical, `{}` being the layer; the suffix lists its dimensions.
      hf: where Hugging Face's layout stores it.
      meta: where Meta's files may store it; we write the first.
      shard: the letter that Meta's ranks divide, or None where every rank has the whole.
      is_moe: the row is for mixture layers only, or for dense ones only; None is for both.
    """

    name: str
    hf: Place
    meta: tuple[Place, ...]
    shard: str | None
    is_moe: bool | None


def _weights(
    ours: str, hf: str, meta: str, *rows: tuple[str, ...], is_moe: bool | None = None
) -> Iterator[Weight]:
    """Read rows of (name, axes, shard, Hugging Face key, Meta keys...) under three prefixes.

    A key that has axes of its own says so behind a colon.
    """
    for name, axes, shard, *keys in rows:
        prefixes = [hf, *[meta] * (len(keys) - 1)]
        parts = [key.partition(": ") for key in keys]
        first, *others = [
            Place(key=prefix + key, axes=tuple((own or axes).split()))
            for prefix, (key, _, own) in zip(prefixes, parts, strict=True)
        ]
        yield Weight(
            name=ours + name, hf=first, meta=tuple(others), shard=shard or None, is_moe=is_moe
        )


_LM = "language_model."
_HF = _LM + "model.layers.{}."
_TOWER, _ENCODER = "vision_model.", "vision_embeddings.vision_encoder."

TABLE: tuple[Weight, ...] = (
    *_weights(
        "vision.", _TOWER, _ENCODER,
        ("patch_w_ID", "D I", "D", "patch_embedding.linear.weight", "conv1._linear.weight"),
        ("class_embedding_D", "D", "", "class_embedding", "class_embedding"),
        ("position_embedding_PD", "P D", "", *2 * ("positional_embedding_vlm",)),
        ("norm_pre.scale_D", "D", "", "layernorm_pre.weight", "ln_pre.weight"),
        ("norm_pre.bias_D", "D", "", "layernorm_pre.bias", "ln_pre.bias"),
        ("norm_post.scale_D", "D", "", "layernorm_post.weight", "ln_post.weight"),
        ("norm_post.bias_D", "D", "", "layernorm_post.bias", "ln_post.bias"),
    ),
    *_weights(
        "vision.adapter.", _TOWER + "vision_adapter.mlp.", "vision_embeddings.vision_adapter.mlp.",
        ("w_in_DF", "F D", "F", "fc1.weight", "c_fc.weight"),
        ("w_out_FD", "D F", "F", "fc2.weight", "c_proj.weight"),
    ),
    *_weights(
        "vision.layers.{}.", _TOWER + "model.layers.{}.", _ENCODER + "transformer.resblocks.{}.",
        ("attention_norm.scale_D", "D", "", "input_layernorm.weight", "ln_1.weight"),
        ("attention_norm.bias_D", "D", "", "input_layernorm.bias", "ln_1.bias"),
        ("mlp_norm.scale_D", "D", "", "post_attention_layernorm.weight", "ln_2.weight"),
        ("mlp_norm.bias_D", "D", "", "post_attention_layernorm.bias", "ln_2.bias"),
        ("attention.w_q_DNH", "NH D", "N", "self_attn.q_proj.weight", "attn.wq.weight"),
        ("attention.b_q_NH", "NH", "N", "self_attn.q_proj.bias", "attn.wq.bias"),
        ("attention.w_k_DNH", "NH D", "N", "self_attn.k_proj.weight", "attn.wk.weight"),
        ("attention.b_k_NH", "NH", "N", "self_attn.k_proj.bias", "attn.wk.bias"),
        ("attention.w_v_DNH", "NH D", "N", "self_attn.v_proj.weight", "attn.wv.weight"),
        ("attention.b_v_NH", "NH", "N", "self_attn.v_proj.bias", "attn.wv.bias"),
        ("attention.w_o_NHD", "D NH", "N", "self_attn.o_proj.weight", "attn.wo.weight"),
        ("attention.b_o_D", "D", "", "self_attn.o_proj.bias", "attn.wo.bias"),
        ("mlp.w_in_DF", "F D", "F", "mlp.fc1.weight", "mlp.c_fc.weight"),
        ("mlp.b_in_F", "F", "F", "mlp.fc1.bias", "mlp.c_fc.bias"),
        ("mlp.w_out_FD", "D F", "F", "mlp.fc2.weight", "mlp.c_proj.weight"),
        ("mlp.b_out_D", "D", "", "mlp.fc2.bias", "mlp.c_proj.bias"),
    ),
    *_weights(
        "", "", "",
        ("projector.w_DE", "E D", "E", "multi_modal_projector.linear_1.weight",
         "vision_projection.weight"),
        ("embed.table_VD", "V D", "V", _LM + "model.embed_tokens.weight", "tok_embeddings.weight"),
    ),
    *_weights(
        "layers.{}.", _HF, "layers.{}.",
        ("attention_norm.scale_D", "D", "", "input_layernorm.weight",
         "attention.wqkv.layer_norm_weight", "attention_norm.weight"),
        ("attention.w_q_DNH", "NH D", "N", "self_attn.q_proj.weight",
         "attention.wqkv.weight", "attention.wq.weight"),
        ("attention.w_k_DKH", "KH D", "K", "self_attn.k_proj.weight",
         "attention.wqkv.weight", "attention.wk.weight"),
        ("attention.w_v_DKH", "KH D", "K", "self_attn.v_proj.weight",
         "attention.wqkv.weight", "attention.wv.weight"),
        ("attention.w_o_NHD", "D NH", "N", "self_attn.o_proj.weight", "attention.wo.weight"),
    ),
    *_weights(
        "layers.{}.", _HF, "layers.{}.",
        ("ffn_norm.scale_D", "D", "", "post_attention_layernorm.weight",
         "feed_forward.mlp.layer_norm_weight", "ffn_norm.weight"),
        is_moe=False,
    ),
    *_weights(
        "layers.{}.", _HF, "layers.{}.",
        ("ffn_norm.scale_D", "D", "", "post_attention_layernorm.weight",
         "feed_forward.norm.weight", "ffn_norm.weight"),
        is_moe=True,
    ),
    *_weights(
        "layers.{}.ffn.", _HF + "feed_forward.", "layers.{}.feed_forward.",
        ("w_gate_DF", "F D", "F", "gate_proj.weight", "mlp.fc1_weight", "w1.weight"),
        ("w_up_DF", "F D", "F", "up_proj.weight", "mlp.fc1_weight", "w3.weight"),
        ("w_down_FD", "D F", "F", "down_proj.weight", "mlp.fc2_weight", "w2.weight"),
        ("router_DE", "E D", "", "router.weight", "router_DE: D E"),
    ),
    *_weights(
        "layers.{}.ffn.experts.", _HF + "feed_forward.experts.", "layers.{}.feed_forward.experts.",
        ("w_gate_EDF", "E D F", "F", "gate_up_proj", "moe_w_in_eD_F: ED F", "w1"),
        ("w_up_EDF", "E D F", "F", "gate_up_proj", "moe_w_swiglu_eD_F: ED F", "w3"),
        ("w_down_EFD", "E F D", "F", "down_proj", "moe_w_out_eF_D: EF D", "w2"),
    ),
    *_weights(
        "layers.{}.ffn.shared.", _HF + "feed_forward.shared_expert.", "layers.{}.feed_forward.",
        ("w_gate_DF", "F D", "F", "gate_proj.weight",
         "w_in_shared_FD.weight", "shared_expert.w1.weight"),
        ("w_up_DF", "F D", "F", "up_proj.weight",
         "w_swiglu_FD.weight", "shared_expert.w3.weight"),
        ("w_down_FD", "D F", "F", "down_proj.weight",
         "w_out_shared_DF.weight", "shared_expert.w2.weight"),
    ),
    *_weights(
        "", _LM, "",
        ("final_norm.scale_D", "D", "", "model.norm.weight", "norm.weight"),
        ("head.w_DV", "V D", "V", "lm_head.weight", "output.weight"),
    ),
)  # fmt: skip

_ROWS = {
    (weight.name, is_moe): weight
    for is_moe in (False, True)
    for weight in TABLE
    if weight.is_moe in (None, is_moe)
}
_NAMES = dict.fromkeys(n for w in TABLE for n in (w.name.partition("{}")[0], w.name))
_ORDER = {name: number for number, name in enumerate(_NAMES)}


def find_weight(name: str, *, is_moe: bool) -> Weight | None:
    """Return the row of a canonical name with `{}` for its layer, if the table has one."""
    return _ROWS.get((name, is_moe))


def file_order(name: str, layer: int | None) -> tuple[int, int, int]:
    """Sort names as files hold them: by part of the model, by layer, and by row of the table.

    What the table does not know comes last.
    """
    part, last = name.partition("{}")[0], len(_ORDER)
    return _ORDER.get(part, last), layer or 0, _ORDER.get(name, last)
