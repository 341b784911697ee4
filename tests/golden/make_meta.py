"""Make `meta_text.npz`: what Meta's PyTorch code computes for the tiny models of `closed_form.py`.

Run in the environment of the references (README.md), after `make_hf.py`:
`python tests/golden/make_meta.py`. Meta's code wants fairscale and a GPU; `_stub_fairscale` gives
it a world of one process on the CPU. In bfloat16 its temperature cannot run, so those cases have
it switched off, and there the program also checks that both references agree to the last bit.
"""

import pathlib
import sys
import types

import closed_form
import numpy as np
import torch
from closed_form import TEXT_CASES, VISION, Shape, Weights

HERE = pathlib.Path(__file__).parent

FLOAT32_CASES = (
    "scout",
    "maverick",
    "scout_eight_layers",
    "maverick_eight_layers",
    "scout_two_experts",
    "scout_tied_routers",
)
BFLOAT16_CASES = ("scout_no_temperature", "maverick_no_temperature")


class _Linear(torch.nn.Linear):
    """A parallel linear layer in a world of one."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **_) -> None:
        super().__init__(in_features, out_features, bias=bias)


class _Embedding(torch.nn.Embedding):
    def __init__(self, rows: int, dim: int, **_) -> None:
        super().__init__(rows, dim)


def _stub_fairscale() -> None:
    """Stand in for fairscale with one process, and keep tensors on the CPU."""
    names = (
        "fairscale",
        "fairscale.nn",
        "fairscale.nn.model_parallel",
        "fairscale.nn.model_parallel.initialize",
        "fairscale.nn.model_parallel.layers",
        "fairscale.nn.model_parallel.mappings",
    )
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    modules[names[3]].get_model_parallel_world_size = lambda: 1
    modules[names[4]].ColumnParallelLinear = _Linear
    modules[names[4]].RowParallelLinear = _Linear
    modules[names[4]].VocabParallelEmbedding = _Embedding
    modules[names[5]].reduce_from_model_parallel_region = lambda x: x
    sys.modules.update(modules)
    torch.Tensor.cuda = lambda self, *_, **__: self


_stub_fairscale()
from llama_models.llama4 import args as meta_args  # noqa: E402
from llama_models.llama4 import model as meta_model  # noqa: E402
from llama_models.llama4.datatypes import MaskedEmbedding, TransformerInput  # noqa: E402


def meta_config(shape: Shape) -> meta_args.ModelArgs:
    """Translate a tiny shape into Meta's arguments, whose formulas must give our hidden widths."""
    vision = meta_args.VisionArgs(
        image_size={"height": VISION.image_size, "width": VISION.image_size},
        patch_size={"height": VISION.patch_size, "width": VISION.patch_size},
        dim=VISION.embed_dim,
        n_layers=VISION.num_layers,
        n_heads=VISION.num_heads,
        mlp_ratio=VISION.mlp_dim / VISION.embed_dim,
        output_dim=VISION.adapter_dim,
        pixel_shuffle_ratio=0.5,
    )
    moe = meta_args.MoEArgs(
        num_experts=shape.num_experts,
        top_k=shape.experts_per_token,
        interleave_moe_layer_step=shape.moe_step,
    )
    return meta_args.ModelArgs(
        dim=shape.embed_dim,
        n_layers=shape.num_layers,
        n_heads=shape.num_heads,
        n_kv_heads=shape.num_kv_heads,
        vocab_size=closed_form.VOCAB_SIZE,
        multiple_of=32,
        ffn_dim_multiplier=0.7,
        ffn_exp=6.0,
        norm_eps=shape.norm_eps,
        attention_chunk_size=shape.chunk_size,
        rope_theta=500000.0,
        use_scaled_rope=shape.scaled_rope,
        nope_layer_interval=shape.nope_interval,
        use_qk_norm=shape.use_qk_norm,
        attn_temperature_tuning=shape.floor is not None,
        floor_scale=shape.floor or 8192,
        attn_scale=shape.temperature_coefficient,
        vision_args=vision,
        moe_args=moe,
        max_batch_size=4,
        max_seq_len=512,
    )


RENAMED = (
    ("language_model.lm_head.", "output."),
    ("language_model.model.embed_tokens.", "tok_embeddings."),
    ("language_model.model.norm.", "norm."),
    ("language_model.model.layers.", "layers."),
    ("multi_modal_projector.linear_1.", "vision_projection."),
    ("vision_model.vision_adapter.mlp.fc1.", "vision_embeddings.vision_adapter.mlp.c_fc."),
    ("vision_model.vision_adapter.mlp.fc2.", "vision_embeddings.vision_adapter.mlp.c_proj."),
    ("vision_model.model.layers.", "vision_model.transformer.resblocks."),
    ("vision_model.patch_embedding.linear.", "vision_model.conv1._linear."),
    ("vision_model.layernorm_", "vision_model.ln_"),
    ("vision_model.", "vision_embeddings.vision_encoder."),
)
RENAMED_IN_TEXT = (
    ("input_layernorm.", "attention_norm."),
    ("post_attention_layernorm.", "ffn_norm."),
    ("self_attn.", "attention."),
    ("router.weight", "router_DE"),
    ("down_proj", "w2"),
    ("gate_proj", "w1"),
    ("up_proj", "w3"),
    ("q_proj", "wq"),
    ("k_proj", "wk"),
    ("v_proj", "wv"),
    ("o_proj", "wo"),
)
RENAMED_IN_VISION = (
    ("input_layernorm.", "ln_1."),
    ("post_attention_layernorm.", "ln_2."),
    ("self_attn.", "attn."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
    ("q_proj", "wq"),
    ("k_proj", "wk"),
    ("v_proj", "wv"),
    ("o_proj", "wo"),
)


def meta_weights(weights: Weights) -> dict[str, torch.Tensor]:
    """Rename transformers weights to Meta's; the router turns over and gate and up part ways."""
    renamed = {}
    for name, value in weights.items():
        is_vision = name.startswith(("vision", "multi_modal"))
        for old, new in RENAMED:
            if name.startswith(old):
                name = new + name[len(old) :]
        if is_vision and "resblocks" not in name:
            renamed[name] = value
            continue
        if name.endswith("experts.gate_up_proj"):
            stem, width = name.removesuffix("gate_up_proj"), value.shape[-1] // 2
            renamed |= {stem + "w1": value[..., :width], stem + "w3": value[..., width:]}
            continue
        for old, new in RENAMED_IN_VISION if is_vision else RENAMED_IN_TEXT:
            name = name.replace(old, new)
        renamed[name] = value.T if name.endswith("router_DE") else value
    return {name: torch.from_numpy(value.copy()) for name, value in renamed.items()}


def build(shape: Shape, weights: Weights, dtype: torch.dtype) -> meta_model.Transformer:
    """Make and fill Meta's model; every weight must be named once."""
    model = meta_model.Transformer(meta_config(shape)).float()
    model.load_state_dict(meta_weights(weights), strict=True)
    return model.to(dtype).eval()


def run(
    model: meta_model.Transformer, ids: np.ndarray, tiles: np.ndarray | None = None
) -> np.ndarray:
    """Return logits [T, V] float32 of ids [T] from one prefill, with tiles [N, 3, H, W]."""
    tokens = torch.from_numpy(np.asarray(ids, dtype=np.int64))[None]
    image = None
    if tiles is not None:
        mask = (tokens == closed_form.PATCH)[..., None]
        with torch.no_grad():
            reference = model.tok_embeddings(tokens)
            features = model.vision_embeddings([[torch.from_numpy(tiles)]], mask, reference)
        image = MaskedEmbedding(embedding=features, mask=mask)
    out = model(TransformerInput(tokens=tokens, tokens_position=0, image_embedding=image))
    return out.logits[0].numpy()


def main() -> None:
    """Write the file, printing how far the two references are apart."""
    torch.set_num_threads(1)
    hf = {kind: np.load(HERE / f"hf_{kind}.npz") for kind in ("text", "vision", "bfloat16")}
    arrays = {}
    for name in FLOAT32_CASES:
        case = TEXT_CASES[name]
        model = build(case.shape, case.weights(), torch.float32)
        arrays[name] = run(model, closed_form.tokens(case.length))[:, ::4]
        stride = 4 // case.stride
        error = np.abs(arrays[name] - hf["text"][name][:, ::stride]).max()
        print(f"{name}: float32 differs from transformers by {error:.1e}")
    for name in ("scout", "maverick_scaled"):
        model = build(TEXT_CASES[name].shape, TEXT_CASES[name].weights(), torch.float32)
        ids, count = closed_form.IMAGE_CASES["two_images"]
        arrays[name + ".two_images"] = run(model, ids, closed_form.tiles(count))[:, ::4]
        error = np.abs(arrays[name + ".two_images"] - hf["vision"][name + ".two_images"]).max()
        print(f"{name}: images differ from transformers by {error:.1e}")
    for name in BFLOAT16_CASES:
        case = TEXT_CASES[name]
        model = build(case.shape, case.weights(), torch.bfloat16)
        ids = closed_form.tokens(case.length, closed_form.BFLOAT16_ROWS[name])
        bits = run(model, ids).view(np.uint32) >> 16
        arrays[name + ".bfloat16"] = bits.astype(np.uint16)[:, ::4]
        same = np.array_equal(bits, hf["bfloat16"][name])
        print(f"{name}: bfloat16 {'equals' if same else 'DIFFERS FROM'} transformers bit for bit")
    versions = f"llama-models 0.3.0, torch {torch.__version__}"
    path = HERE / "meta_text.npz"
    np.savez_compressed(path, made_with=np.array(versions), **arrays)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
