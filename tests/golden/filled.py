"""Our model, filled with the closed-form weights through a name mapping that only tests know.

The mapping is written apart from the checkpoint readers on purpose: a mistake in either shows when
their results are compared.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.config.model import (
    DType,
    ModelConfig,
    RopeScaling,
    Temperature,
    TextConfig,
    VisionConfig,
)
from llama4_jax.model import Llama4
from tests.golden import closed_form
from tests.golden.closed_form import VISION, Case, Shape, Weights

# Half the compile time, for programs that run a few times.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}


def model_config(shape: Shape, dtype: DType = "float32") -> ModelConfig:
    """Translate a tiny shape into our config."""
    temperature = None
    if shape.floor is not None:
        temperature = Temperature(floor=shape.floor, coefficient=shape.temperature_coefficient)
    text = TextConfig(
        vocab_size=closed_form.VOCAB_SIZE,
        embed_dim=shape.embed_dim,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        mlp_dim=shape.mlp_dim,
        expert_dim=shape.expert_dim,
        num_experts=shape.num_experts,
        experts_per_token=shape.experts_per_token,
        moe_layers=shape.moe_layers,
        nope_layers=shape.nope_layers,
        chunk_size=shape.chunk_size,
        rope_scaling=RopeScaling() if shape.scaled_rope else None,
        use_qk_norm=shape.use_qk_norm,
        temperature=temperature,
        norm_eps=shape.norm_eps,
        max_positions=shape.max_positions,
    )
    vision = VisionConfig(
        image_size=VISION.image_size,
        patch_size=VISION.patch_size,
        embed_dim=VISION.embed_dim,
        num_layers=VISION.num_layers,
        num_heads=VISION.num_heads,
        mlp_dim=VISION.mlp_dim,
        adapter_dim=VISION.adapter_dim,
    )
    return ModelConfig(
        name="tiny",
        text=text,
        vision=vision,
        bos_id=closed_form.BOS,
        eos_ids=(closed_form.EOS,),
        pad_id=closed_form.PAD,
        patch_id=closed_form.PATCH,
        dtype=dtype,
    )


def _text_layer(weights: Weights, shape: Shape, n: int) -> Weights:
    source = f"language_model.model.layers.{n}."
    D, H = shape.embed_dim, shape.head_dim
    layer = {
        "attention_norm.scale_D": weights[source + "input_layernorm.weight"],
        "ffn_norm.scale_D": weights[source + "post_attention_layernorm.weight"],
    }
    for short, heads in (("q", "DNH"), ("k", "DKH"), ("v", "DKH")):
        w_OI = weights[f"{source}self_attn.{short}_proj.weight"]
        layer[f"attention.w_{short}_{heads}"] = w_OI.T.reshape(D, -1, H)
    layer["attention.w_o_NHD"] = weights[source + "self_attn.o_proj.weight"].T.reshape(-1, H, D)
    ffn, into = source + "feed_forward.", "ffn."
    if n in shape.moe_layers:
        fused_EDF = weights[ffn + "experts.gate_up_proj"]
        layer["ffn.router_DE"] = weights[ffn + "router.weight"].T
        layer["ffn.experts.w_gate_EDF"] = fused_EDF[:, :, : shape.expert_dim]
        layer["ffn.experts.w_up_EDF"] = fused_EDF[:, :, shape.expert_dim :]
        layer["ffn.experts.w_down_EFD"] = weights[ffn + "experts.down_proj"]
        ffn, into = ffn + "shared_expert.", "ffn.shared."
    for kind, dims in (("gate", "DF"), ("up", "DF"), ("down", "FD")):
        layer[f"{into}w_{kind}_{dims}"] = weights[f"{ffn}{kind}_proj.weight"].T
    return layer


def _vision_layer(weights: Weights, m: int) -> Weights:
    source = f"vision_model.model.layers.{m}."
    D, H = VISION.embed_dim, VISION.embed_dim // VISION.num_heads
    layer = {}
    for ours, theirs in (("attention", "input"), ("mlp", "post_attention")):
        layer[f"{ours}_norm.scale_D"] = weights[f"{source}{theirs}_layernorm.weight"]
        layer[f"{ours}_norm.bias_D"] = weights[f"{source}{theirs}_layernorm.bias"]
    for short in "qkv":
        proj = f"{source}self_attn.{short}_proj."
        layer[f"attention.w_{short}_DNH"] = weights[proj + "weight"].T.reshape(D, -1, H)
        layer[f"attention.b_{short}_NH"] = weights[proj + "bias"].reshape(-1, H)
    layer["attention.w_o_NHD"] = weights[source + "self_attn.o_proj.weight"].T.reshape(-1, H, D)
    layer["attention.b_o_D"] = weights[source + "self_attn.o_proj.bias"]
    for ours, theirs, dims in (("in", "fc1", "DF"), ("out", "fc2", "FD")):
        layer[f"mlp.w_{ours}_{dims}"] = weights[f"{source}mlp.{theirs}.weight"].T
        layer[f"mlp.b_{ours}_{dims[1]}"] = weights[f"{source}mlp.{theirs}.bias"]
    return layer


def canonical_weights(weights: Weights, shape: Shape) -> Weights:
    """Rename and turn transformers weights into our per-layer names."""
    text = "language_model."
    vision = "vision_model."
    ours = {
        "embed.table_VD": weights[text + "model.embed_tokens.weight"],
        "final_norm.scale_D": weights[text + "model.norm.weight"],
        "head.w_DV": weights[text + "lm_head.weight"].T,
        "projector.w_DE": weights["multi_modal_projector.linear_1.weight"].T,
        "vision.patch_w_ID": weights[vision + "patch_embedding.linear.weight"].T,
        "vision.class_embedding_D": weights[vision + "class_embedding"],
        "vision.position_embedding_PD": weights[vision + "positional_embedding_vlm"],
        "vision.adapter.w_in_DF": weights[vision + "vision_adapter.mlp.fc1.weight"].T,
        "vision.adapter.w_out_FD": weights[vision + "vision_adapter.mlp.fc2.weight"].T,
    }
    for end in ("pre", "post"):
        ours[f"vision.norm_{end}.scale_D"] = weights[f"{vision}layernorm_{end}.weight"]
        ours[f"vision.norm_{end}.bias_D"] = weights[f"{vision}layernorm_{end}.bias"]
    for n in range(shape.num_layers):
        layer = _text_layer(weights, shape, n)
        ours |= {f"layers.{n}.{name}": value for name, value in layer.items()}
    layers = [_vision_layer(weights, m) for m in range(VISION.num_layers)]
    for name in layers[0]:
        ours[f"vision.layers.{name}"] = np.stack([layer[name] for layer in layers])
    return ours


def _dotted(path: tuple) -> str:
    parts = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path]
    return ".".join(part for part in parts if part not in ("value", "raw_value"))


def fill(config: ModelConfig, canonical: Weights) -> Llama4:
    """Build our model from canonical per-layer arrays; every one must be used exactly once."""
    abstract = jax.eval_shape(lambda: Llama4(config, key=jax.random.key(0)))
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    names = [_dotted(path) for path, _ in leaves]
    slots = [re.match(r"decoder\.groups\.slots\.(\d+)\.", name) for name in names]
    period = 1 + max(int(slot[1]) for slot in slots if slot)
    depth = config.text.num_layers // period * period
    unused = dict(canonical)
    filled = []
    for name, (_, leaf) in zip(names, leaves, strict=True):
        stem = name.removeprefix("decoder.")
        if stem.startswith("groups.slots."):
            slot, rest = stem.removeprefix("groups.slots.").split(".", 1)
            rows = range(int(slot), depth, period)
            value = np.stack([unused.pop(f"layers.{n}.{rest}") for n in rows])
        elif stem.startswith("tail."):
            place, rest = stem.removeprefix("tail.").split(".", 1)
            value = unused.pop(f"layers.{depth + int(place)}.{rest}")
        else:
            value = unused.pop(stem)
        if value.shape != leaf.shape:
            raise ValueError(f"{name}: {value.shape} for a parameter of shape {leaf.shape}")
        filled.append(jnp.asarray(value, leaf.dtype))
    if unused:
        raise ValueError(f"the model has no place for {sorted(unused)}")
    return jax.tree_util.tree_unflatten(tree, filled)


@functools.lru_cache(maxsize=4)
def build(case: Case, dtype: DType = "float32") -> Llama4:
    """Build our model for a golden case."""
    weights = canonical_weights(case.weights(), case.shape)
    return fill(model_config(case.shape, dtype), weights)
