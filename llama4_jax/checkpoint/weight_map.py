"""One table of every weight: its canonical name, its Hugging Face name and its Meta name.

A row says in which dimensions each layout stores the same numbers. `"NH D"` means a stored matrix
whose first axis runs over heads and then over the head dimension, and whose second axis is the
embedding; the canonical name `w_q_DNH` says that the model holds the same numbers as [D, N, H].
Rows that share a stored key are fused there, in table order, along the axis that `fuse` names.
Meta cuts a weight over its model-parallel ranks along the letter `shard`; a fused weight is cut
first and fused within each rank.

Source: the module names of transformers 5.23 `modeling_llama4.py` and of llama_models 0.3.0
`llama4/model.py`, with the raw keys that the latter's load hooks rename.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Literal

from llama4_jax.config import ModelConfig

Layout = Literal["hf", "meta"]
Scope = Literal["model", "tower", "layer", "dense", "moe", "balance", "tower_layer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a layout stores a weight.

    Attributes:
      key: the stored tensor's name, `{}` being the layer.
      axes: letters of each stored axis, the slowest first, such as ("NH", "D").
      fuse: the stored axis along which rows with the same key follow each other, or None.
      shard: the letter that Meta's ranks divide, or None where every rank has the whole.
    """

    key: str
    axes: tuple[str, ...]
    fuse: int | None = None
    shard: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """One row of the table; the canonical name's suffix lists its dimensions.

    Attributes:
      hf, meta: where those layouts store it, or None where they have no place for it.
      others: where Meta's layout may store it too.
      keeps_dtype: it is stored in its own precision, whatever others are converted to.
    """

    name: str
    scope: Scope
    hf: Place | None
    meta: Place | None
    others: tuple[Place, ...] = ()
    keeps_dtype: bool = False

    @property
    def letters(self) -> str:
        return self.name.rpartition("_")[2]

    def place(self, layout: Layout) -> Place:
        """Return where a layout stores it.

        Raises:
          ValueError: the layout has no place for it.
        """
        found = self.hf if layout == "hf" else self.meta
        if found is None:
            raise ValueError(
                f"the {layout} layout has no place for {self.name}; convert to orbax instead"
            )
        return found


def _place(text: str, *, fuse: int | None = None, shard: str | None = None) -> Place:
    key, _, axes = text.partition(": ")
    return Place(key=key, axes=tuple(axes.split()), fuse=fuse, shard=shard)


_LM = "language_model."
_HF = "language_model.model.layers.{}."
_META = "layers.{}."
_TOWER = "vision_model."
_ENCODER = "vision_embeddings.vision_encoder."
_ADAPTER = "vision_embeddings.vision_adapter.mlp."
_HF_BLOCK = _TOWER + "model.layers.{}."
_META_BLOCK = _ENCODER + "transformer.resblocks.{}."


def _model_weights() -> list[Weight]:
    return [
        Weight(
            name="embed.table_VD",
            scope="model",
            hf=_place(_LM + "model.embed_tokens.weight: V D"),
            meta=_place("tok_embeddings.weight: V D", shard="V"),
        ),
        Weight(
            name="final_norm.scale_D",
            scope="model",
            hf=_place(_LM + "model.norm.weight: D"),
            meta=_place("norm.weight: D"),
        ),
        Weight(
            name="head.w_DV",
            scope="model",
            hf=_place(_LM + "lm_head.weight: V D"),
            meta=_place("output.weight: V D", shard="V"),
        ),
    ]


def _attention_weights() -> list[Weight]:
    def projection(name: str, hf: str, heads: str) -> Weight:
        return Weight(
            name="layers.{}.attention." + name,
            scope="layer",
            hf=_place(f"{_HF}self_attn.{hf}_proj.weight: {heads} D"),
            meta=_place(f"{_META}attention.wqkv.weight: {heads} D", fuse=0, shard=heads[0]),
            others=(_place(f"{_META}attention.w{hf}.weight: {heads} D", shard=heads[0]),),
        )

    return [
        Weight(
            name="layers.{}.attention_norm.scale_D",
            scope="layer",
            hf=_place(_HF + "input_layernorm.weight: D"),
            meta=_place(_META + "attention.wqkv.layer_norm_weight: D"),
            others=(_place(_META + "attention_norm.weight: D"),),
        ),
        projection("w_q_DNH", "q", "NH"),
        projection("w_k_DKH", "k", "KH"),
        projection("w_v_DKH", "v", "KH"),
        Weight(
            name="layers.{}.attention.w_o_NHD",
            scope="layer",
            hf=_place(_HF + "self_attn.o_proj.weight: D NH"),
            meta=_place(_META + "attention.wo.weight: D NH", shard="N"),
        ),
    ]


def _ffn_norm(scope: Scope, key: str) -> Weight:
    return Weight(
        name="layers.{}.ffn_norm.scale_D",
        scope=scope,
        hf=_place(_HF + "post_attention_layernorm.weight: D"),
        meta=_place(f"{_META}feed_forward.{key}: D"),
        others=(_place(_META + "ffn_norm.weight: D"),),
    )


def _dense_weights() -> list[Weight]:
    def matrix(name: str, hf: str, meta: str, axes: str, other: str, fuse: int | None) -> Weight:
        return Weight(
            name="layers.{}.ffn." + name,
            scope="dense",
            hf=_place(f"{_HF}feed_forward.{hf}_proj.weight: {axes}"),
            meta=_place(f"{_META}feed_forward.mlp.{meta}_weight: {axes}", fuse=fuse, shard="F"),
            others=(_place(f"{_META}feed_forward.{other}.weight: {axes}", shard="F"),),
        )

    return [
        _ffn_norm("dense", "mlp.layer_norm_weight"),
        matrix("w_gate_DF", "gate", "fc1", "F D", "w1", 0),
        matrix("w_up_DF", "up", "fc1", "F D", "w3", 0),
        matrix("w_down_FD", "down", "fc2", "D F", "w2", None),
    ]


def _moe_weights() -> list[Weight]:
    def shared(name: str, hf: str, meta: str, axes: str, other: str) -> Weight:
        return Weight(
            name="layers.{}.ffn.shared." + name,
            scope="moe",
            hf=_place(f"{_HF}feed_forward.shared_expert.{hf}_proj.weight: {axes}"),
            meta=_place(f"{_META}feed_forward.{meta}.weight: {axes}", shard="F"),
            others=(
                _place(f"{_META}feed_forward.shared_expert.{other}.weight: {axes}", shard="F"),
            ),
        )

    def routed(name: str, hf: Place, meta: str, axes: str, other: str) -> Weight:
        experts = _META + "feed_forward.experts."
        return Weight(
            name="layers.{}.ffn.experts." + name,
            scope="moe",
            hf=hf,
            meta=_place(f"{experts}{meta}: {axes}", shard="F"),
            others=(_place(f"{experts}{other}: {' '.join(axes.replace(' ', ''))}", shard="F"),),
        )

    gate_up = _place(_HF + "feed_forward.experts.gate_up_proj: E D F", fuse=-1)
    down = _place(_HF + "feed_forward.experts.down_proj: E F D")
    return [
        _ffn_norm("moe", "norm.weight"),
        Weight(
            name="layers.{}.ffn.router_DE",
            scope="moe",
            hf=_place(_HF + "feed_forward.router.weight: E D"),
            meta=_place(_META + "feed_forward.router_DE: D E"),
        ),
        routed("w_gate_EDF", gate_up, "moe_w_in_eD_F", "ED F", "w1"),
        routed("w_up_EDF", gate_up, "moe_w_swiglu_eD_F", "ED F", "w3"),
        routed("w_down_EFD", down, "moe_w_out_eF_D", "EF D", "w2"),
        shared("w_gate_DF", "gate", "w_in_shared_FD", "F D", "w1"),
        shared("w_up_DF", "up", "w_swiglu_FD", "F D", "w3"),
        shared("w_down_FD", "down", "w_out_shared_DF", "D F", "w2"),
        Weight(name="layers.{}.ffn.bias_E", scope="balance", hf=None, meta=None, keeps_dtype=True),
    ]


def _tower_weights() -> list[Weight]:
    def weight(name: str, hf: str, meta: str, axes: str, shard: str | None = None) -> Weight:
        return Weight(
            name=name,
            scope="tower",
            hf=_place(f"{hf}: {axes}"),
            meta=_place(f"{meta}: {axes}", shard=shard),
        )

    def norm(name: str, hf: str, meta: str) -> list[Weight]:
        return [
            weight(f"vision.{name}.{ours}_D", f"{_TOWER}{hf}.{end}", f"{_ENCODER}{meta}.{end}", "D")
            for ours, end in (("scale", "weight"), ("bias", "bias"))
        ]

    table, adapter = "positional_embedding_vlm", _TOWER + "vision_adapter.mlp."
    patches = (_TOWER + "patch_embedding.linear.weight", _ENCODER + "conv1._linear.weight")
    projector = ("multi_modal_projector.linear_1.weight", "vision_projection.weight")
    return [
        weight("vision.patch_w_ID", *patches, "D I", "D"),
        weight(
            "vision.class_embedding_D",
            _TOWER + "class_embedding",
            _ENCODER + "class_embedding",
            "D",
        ),
        weight("vision.position_embedding_PD", _TOWER + table, _ENCODER + table, "P D"),
        *norm("norm_pre", "layernorm_pre", "ln_pre"),
        *norm("norm_post", "layernorm_post", "ln_post"),
        weight(
            "vision.adapter.w_in_DF", adapter + "fc1.weight", _ADAPTER + "c_fc.weight", "F D", "F"
        ),
        weight(
            "vision.adapter.w_out_FD",
            adapter + "fc2.weight",
            _ADAPTER + "c_proj.weight",
            "D F",
            "F",
        ),
        weight("projector.w_DE", *projector, "E D", "E"),
    ]


def _tower_layer_weights() -> list[Weight]:
    def weight(name: str, hf: str, meta: str, axes: str, shard: str | None = None) -> Weight:
        return Weight(
            name="vision.layers.{}." + name,
            scope="tower_layer",
            hf=_place(f"{_HF_BLOCK}{hf}: {axes}"),
            meta=_place(f"{_META_BLOCK}{meta}: {axes}", shard=shard),
        )

    rows = []
    norms = (("attention_norm", "input", "ln_1"), ("mlp_norm", "post_attention", "ln_2"))
    for ours, hf, meta in norms:
        rows.append(weight(f"{ours}.scale_D", f"{hf}_layernorm.weight", f"{meta}.weight", "D"))
        rows.append(weight(f"{ours}.bias_D", f"{hf}_layernorm.bias", f"{meta}.bias", "D"))
    for x in "qkv":
        hf, meta = f"self_attn.{x}_proj", f"attn.w{x}"
        rows.append(weight(f"attention.w_{x}_DNH", hf + ".weight", meta + ".weight", "NH D", "N"))
        rows.append(weight(f"attention.b_{x}_NH", hf + ".bias", meta + ".bias", "NH", "N"))
    out = ("self_attn.o_proj", "attn.wo")
    up, down = ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")
    return [
        *rows,
        weight("attention.w_o_NHD", out[0] + ".weight", out[1] + ".weight", "D NH", "N"),
        weight("attention.b_o_D", out[0] + ".bias", out[1] + ".bias", "D"),
        weight("mlp.w_in_DF", up[0] + ".weight", up[1] + ".weight", "F D", "F"),
        weight("mlp.b_in_F", up[0] + ".bias", up[1] + ".bias", "F", "F"),
        weight("mlp.w_out_FD", down[0] + ".weight", down[1] + ".weight", "D F", "F"),
        weight("mlp.b_out_D", down[0] + ".bias", down[1] + ".bias", "D"),
    ]


TABLE: tuple[Weight, ...] = (
    *_model_weights(),
    *_attention_weights(),
    *_dense_weights(),
    *_moe_weights(),
    *_tower_weights(),
    *_tower_layer_weights(),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of one model: a row of the table with its layer and its sizes filled in.

    Attributes:
      name: canonical name, such as "layers.3.attention.w_q_DNH".
      sizes: the size of each of its letters, in canonical order.
      layer: the layer, or None outside the layers.
      weight: its row.
    """

    name: str
    sizes: Mapping[str, int]
    layer: int | None
    weight: Weight

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.sizes.values())

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def key(self, place: Place) -> str:
        """Return the stored name of `place` for this parameter's layer."""
        return place.key if self.layer is None else place.key.format(self.layer)


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Return every parameter of the model by canonical name, in the order of the forward pass."""
    by_scope: dict[Scope, list[Weight]] = {}
    for weight in TABLE:
        by_scope.setdefault(weight.scope, []).append(weight)
    embed, final_norm, head = by_scope["model"]
    found: list[Parameter] = []
    if config.vision is not None:
        found += _expand(config, by_scope["tower"][:-1], [None])
        found += _expand(config, by_scope["tower_layer"], range(config.vision.num_layers))
        found += _expand(config, by_scope["tower"][-1:], [None])
    found += _expand(config, [embed], [None])
    for layer in range(config.text.num_layers):
        is_moe = layer in config.text.moe_layers
        weights = by_scope["layer"] + by_scope["moe" if is_moe else "dense"]
        if is_moe and config.text.balance_bias:
            weights += by_scope["balance"]
        found += _expand(config, weights, [layer])
    found += _expand(config, [final_norm], [None])
    if not config.text.tie_embeddings:
        found += _expand(config, [head], [None])
    return {parameter.name: parameter for parameter in found}


def _expand(
    config: ModelConfig, weights: Iterable[Weight], layers: Iterable[int | None]
) -> list[Parameter]:
    return [
        Parameter(
            name=weight.name.format(layer),
            sizes={letter: _sizes(config, weight)[letter] for letter in weight.letters},
            layer=layer,
            weight=weight,
        )
        for layer in layers
        for weight in weights
    ]


def _sizes(config: ModelConfig, weight: Weight) -> dict[str, int]:
    """Return what the letters of a row mean in this model: D is the width of the row's own part."""
    text, vision = config.text, config.vision
    if weight.scope in ("tower", "tower_layer") and vision is not None:
        sizes = {
            "D": vision.embed_dim,
            "N": vision.num_heads,
            "H": vision.head_dim,
            "F": vision.mlp_dim,
            "I": vision.patch_dim,
            "P": vision.num_patches + 1,
            "E": text.embed_dim,
        }
        if weight.name == "vision.adapter.w_in_DF":
            sizes |= {"D": vision.embed_dim * vision.shuffle**2, "F": vision.adapter_dim}
        elif weight.name in ("vision.adapter.w_out_FD", "projector.w_DE"):
            sizes |= {"D": vision.adapter_dim, "F": vision.adapter_dim}
        return sizes
    return {
        "V": text.vocab_size,
        "D": text.embed_dim,
        "N": text.num_heads,
        "K": text.num_kv_heads,
        "H": text.head_dim,
        "F": text.mlp_dim if weight.scope == "dense" else text.expert_dim,
        "E": text.num_experts,
    }
