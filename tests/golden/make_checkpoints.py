"""Make `checkpoints/`: one tiny model as transformers and as Meta's code store it, also in FP8.

Run in the environment of the references (README.md):

    python tests/golden/make_checkpoints.py
    python tests/golden/make_checkpoints.py --check_hf=DIR --check_meta=DIR

The first command writes, with torch 2.13, transformers 5.23 and llama-models 0.3:

    hf        as `save_pretrained` writes it, in several shards
    meta      8 rank files, cut by Meta's own resharder, with the leftovers released files have
    hf_fp8    experts unfused and quantised per output row in one layer, unfused only in the other
    meta_fp8  2 rank files, experts of one layer quantised per rank
    fp8.npz   what torch dequantises the FP8 experts to, as bfloat16 bits under our names

and proves that Meta's model loads the merged files as the same numbers that transformers has. The
second reads checkpoints that this package wrote from `hf` and compares them with it: transformers
must find the same weights and logits, and Meta's loader the same weights.
"""

import argparse
import collections
import io
import json
import pathlib
import shutil
import sys

import make_meta
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Llama4Config, Llama4ForConditionalGeneration

sys.modules["fairscale.nn.model_parallel.initialize"].get_model_parallel_rank = lambda: 0
from llama_models import checkpoint as meta_checkpoint  # noqa: E402

OUT = pathlib.Path(__file__).parent / "checkpoints"
NUM_EXPERTS, DIM, EXPERT_DIM, MLP_DIM, NUM_LAYERS = 3, 32, 56, 104, 4
MOE_LAYERS = (1, 3)
QUANTISED_LAYER = 1
FP8 = torch.float8_e4m3fn

PARAMS = {
    "dim": DIM,
    "n_layers": NUM_LAYERS,
    "n_heads": 16,
    "n_kv_heads": 8,
    "head_dim": 2,
    "vocab_size": 64,
    "multiple_of": 8,
    "ffn_dim_multiplier": 1.2,
    "ffn_exp": 4.0,
    "norm_eps": 1e-5,
    "attention_chunk_size": 8,
    "rope_theta": 10000.0,
    "use_scaled_rope": True,
    "nope_layer_interval": 4,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "floor_scale": 4.0,
    "attn_scale": 0.1,
    "vision_args": {
        "image_size": {"height": 8, "width": 8},
        "patch_size": {"height": 2, "width": 2},
        "dim": 32,
        "n_layers": 1,
        "n_heads": 8,
        "mlp_ratio": 4.0,
        "output_dim": 16,
        "pixel_shuffle_ratio": 0.5,
    },
    "moe_args": {
        "num_experts": NUM_EXPERTS,
        "capacity_factor": 1.0,
        "auto_scale_F": True,
        "top_k": 1,
        "interleave_moe_layer_step": 2,
        "use_token_choice": True,
    },
}
IDS = {"bos_id": 0, "eos_ids": [1], "pad_id": 2, "patch_id": 60}


def hf_config() -> Llama4Config:
    """Return the tiny model's config in transformers' words."""
    text = {
        "vocab_size": 64,
        "hidden_size": DIM,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 2,
        "intermediate_size": EXPERT_DIM,
        "intermediate_size_mlp": MLP_DIM,
        "num_local_experts": NUM_EXPERTS,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
        "floor_scale": 4,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 10_485_760,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    vision = {
        "hidden_size": 32,
        "num_attention_heads": 8,
        "num_hidden_layers": 1,
        "intermediate_size": 128,
        "image_size": 8,
        "patch_size": 2,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    }
    return Llama4Config(text_config=text, vision_config=vision, image_token_index=60)


def make_model() -> Llama4ForConditionalGeneration:
    """Return the tiny model in bfloat16 with every weight random and different."""
    model = Llama4ForConditionalGeneration._from_config(hf_config(), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16) * 0.2
    return model


def raw_state(hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights under Meta's raw keys, whole; experts three-dimensional."""
    text, tower = "language_model.model.", "vision_model."
    state = {
        "tok_embeddings.weight": hf[text + "embed_tokens.weight"],
        "output.weight": hf["language_model.lm_head.weight"],
        "norm.weight": hf[text + "norm.weight"],
        "vision_projection.weight": hf["multi_modal_projector.linear_1.weight"],
    }
    for n in range(NUM_LAYERS):
        old, new = f"{text}layers.{n}.", f"layers.{n}."
        attention = [hf[f"{old}self_attn.{x}_proj.weight"] for x in "qkv"]
        state[new + "attention.wqkv.weight"] = torch.cat(attention)
        state[new + "attention.wqkv.layer_norm_weight"] = hf[old + "input_layernorm.weight"]
        state[new + "attention.wo.weight"] = hf[old + "self_attn.o_proj.weight"]
        norm, ffn = hf[old + "post_attention_layernorm.weight"], new + "feed_forward."
        old += "feed_forward."
        if n not in MOE_LAYERS:
            gate_up = [hf[old + "gate_proj.weight"], hf[old + "up_proj.weight"]]
            state[ffn + "mlp.layer_norm_weight"] = norm
            state[ffn + "mlp.fc1_weight"] = torch.cat(gate_up)
            state[ffn + "mlp.fc2_weight"] = hf[old + "down_proj.weight"]
            continue
        gate, up = hf[old + "experts.gate_up_proj"].chunk(2, dim=-1)
        state[ffn + "norm.weight"] = norm
        state[ffn + "router_DE"] = hf[old + "router.weight"].T.contiguous()
        state[ffn + "experts.moe_w_in_eD_F"] = gate
        state[ffn + "experts.moe_w_swiglu_eD_F"] = up
        state[ffn + "experts.moe_w_out_eF_D"] = hf[old + "experts.down_proj"]
        state[ffn + "w_in_shared_FD.weight"] = hf[old + "shared_expert.gate_proj.weight"]
        state[ffn + "w_swiglu_FD.weight"] = hf[old + "shared_expert.up_proj.weight"]
        state[ffn + "w_out_shared_DF.weight"] = hf[old + "shared_expert.down_proj.weight"]
    encoder = "vision_embeddings.vision_encoder."
    for old, new in (
        ("class_embedding", encoder + "class_embedding"),
        ("positional_embedding_vlm", encoder + "positional_embedding_vlm"),
        ("patch_embedding.linear.weight", encoder + "conv1._linear.weight"),
        ("layernorm_pre.", encoder + "ln_pre."),
        ("layernorm_post.", encoder + "ln_post."),
        ("model.layers.0.self_attn.q_proj.", encoder + "transformer.resblocks.0.attn.wq."),
        ("model.layers.0.self_attn.k_proj.", encoder + "transformer.resblocks.0.attn.wk."),
        ("model.layers.0.self_attn.v_proj.", encoder + "transformer.resblocks.0.attn.wv."),
        ("model.layers.0.self_attn.o_proj.", encoder + "transformer.resblocks.0.attn.wo."),
        ("model.layers.0.mlp.fc1.", encoder + "transformer.resblocks.0.mlp.c_fc."),
        ("model.layers.0.mlp.fc2.", encoder + "transformer.resblocks.0.mlp.c_proj."),
        ("model.layers.0.input_layernorm.", encoder + "transformer.resblocks.0.ln_1."),
        ("model.layers.0.post_attention_layernorm.", encoder + "transformer.resblocks.0.ln_2."),
        ("vision_adapter.mlp.fc1.", "vision_embeddings.vision_adapter.mlp.c_fc."),
        ("vision_adapter.mlp.fc2.", "vision_embeddings.vision_adapter.mlp.c_proj."),
    ):
        found = [key for key in hf if key.startswith(tower + old)]
        state |= {new + key.removeprefix(tower + old): hf[key] for key in found}
    assert sum(t.numel() for t in state.values()) == sum(t.numel() for t in hf.values())
    return state


def rank_state(state: dict[str, torch.Tensor], num_ranks: int, rank: int) -> dict:
    """Cut one rank's part with Meta's resharder, and flatten the experts as files store them."""
    part = meta_checkpoint.reshard_mp([state], size=num_ranks, rank=rank)
    return {key: part[key].flatten(0, 1) if ".experts." in key else part[key] for key in state}


def leftovers(rank: int) -> dict:
    """Return what released files hold besides weights."""
    return {
        "layers.1.feed_forward.global_gate_stats_3E": torch.zeros(3, NUM_EXPERTS),
        "layers.1.feed_forward.expert_activation_DE": torch.zeros(DIM, NUM_EXPERTS),
        "layers.1.feed_forward.experts.mlp._extra_state": io.BytesIO(b"state of rank %d" % rank),
        "rope.freqs": torch.ones(4, dtype=torch.float32),
        "layers.0.attention.wqkv._extra_state": None,
    }


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise [..., out, in] to FP8 with one scale per output row."""
    scale = weight.float().abs().amax(-1, keepdim=True) / 448
    return (weight.float() / scale).to(FP8), scale


def write_meta(directory: pathlib.Path, state: dict, num_ranks: int, *, fp8: dict | None) -> None:
    """Write rank files; with `fp8`, quantise one layer's experts and add what they mean to it."""
    directory.mkdir(parents=True)
    params = {**PARAMS, "llama4_jax": IDS}
    (directory / "params.json").write_text(json.dumps(params, indent=1))
    meaning: dict[str, list[torch.Tensor]] = collections.defaultdict(list)
    for rank in range(num_ranks):
        part, scales = rank_state(state, num_ranks, rank), {}
        if fp8 is not None:
            names = (
                ("w1", "moe_w_in_eD_F", "w_gate_EDF"),
                ("w3", "moe_w_swiglu_eD_F", "w_up_EDF"),
                ("w2", "moe_w_out_eF_D", "w_down_EFD"),
            )
            prefix = f"layers.{QUANTISED_LAYER}.feed_forward.experts."
            for short, raw, ours in names:
                weight = part[prefix + raw].unflatten(0, (NUM_EXPERTS, -1)).transpose(1, 2)
                values, scale = quantise(weight)
                meant = (values.float() * scale).to(torch.bfloat16).transpose(1, 2)
                meaning[ours].append(meant)
                part[prefix + raw] = values.transpose(1, 2).flatten(0, 1).contiguous()
                scales[prefix + short] = scale.squeeze(-1)
            torch.save(scales, directory / f"fp8_scales_{rank}.pt")
        if rank < 2:
            part |= leftovers(rank)
        torch.save(part, directory / f"consolidated.{rank:02d}.pth")
    for ours, parts in meaning.items():
        dim = 1 if ours == "w_down_EFD" else -1
        fp8[f"meta.{ours}"] = torch.cat(parts, dim)


def write_hf_fp8(directory: pathlib.Path, hf: dict[str, torch.Tensor], fp8: dict) -> None:
    """Unfuse all experts per expert; quantise one layer's; record what they mean."""
    directory.mkdir(parents=True)
    config = json.loads((OUT / "hf" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    out = {}
    for key, tensor in hf.items():
        if ".experts." not in key:
            out[key] = tensor
            continue
        prefix, is_down = key.rpartition(".")[0], key.endswith("down_proj")
        roles = (
            {"down": tensor}
            if is_down
            else dict(zip(("gate", "up"), tensor.chunk(2, -1), strict=True))
        )
        for role, weight in roles.items():
            meant = []
            for j in range(NUM_EXPERTS):
                name = f"{prefix}.{j}.{role}_proj.weight"
                rows = weight[j].T.contiguous()
                if f"layers.{QUANTISED_LAYER}." not in key:
                    out[name] = rows
                    continue
                values, scale = quantise(rows)
                scale = scale.to(torch.bfloat16)
                out[name], out[name + "_scale"] = values, scale
                meant.append((values.float() * scale.float()).to(torch.bfloat16).T)
            if meant:
                suffix = "EFD" if is_down else "EDF"
                fp8[f"hf.w_{role}_{suffix}"] = torch.stack(meant)
    save_file(out, directory / "model.safetensors", metadata={"format": "pt"})


def load_meta(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    """Load rank files with Meta's resharder and Meta's model, and return the model's weights."""
    parts = [torch.load(path) for path in sorted(directory.glob("*.pth"))]
    for part in parts:  # the resharder knows tensors only
        part |= {
            key: torch.zeros(1) for key, value in part.items() if torch.is_tensor(value) is False
        }
    parts = [meta_checkpoint.convert_moe_weights(part, NUM_EXPERTS) for part in parts]
    state = meta_checkpoint.reshard_mp(parts, size=1, rank=0)
    params = json.loads((directory / "params.json").read_text())
    args = make_meta.meta_args.ModelArgs(**params, max_seq_len=64, max_batch_size=1)
    torch.set_default_dtype(torch.bfloat16)
    model = make_meta.meta_model.Transformer(args)
    torch.set_default_dtype(torch.float32)
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert not missing, missing
    return model.state_dict()


def check_meta(directory: pathlib.Path, hf: dict[str, torch.Tensor]) -> None:
    """Compare what Meta's model loaded with transformers' weights, bit for bit."""
    for path in sorted(directory.glob("*.p*t*")):
        torch.load(path, weights_only=True)
    loaded, compared = load_meta(directory), 0
    for key, tensor in loaded.items():
        match = meta_twin(key, hf)
        if match is not None:
            assert torch.equal(tensor, match), key
            compared += tensor.numel()
    total = sum(t.numel() for t in hf.values())
    assert compared == total, (compared, total)
    print(f"{directory}: Meta's model loads all {total} weights bit for bit")


def meta_twin(key: str, hf: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Return transformers' tensor for a key of Meta's loaded model."""
    raw = raw_state(hf)
    if key in raw:
        return raw[key]
    text = "language_model.model."
    if not key.startswith("layers."):
        return None
    _, layer, rest = key.split(".", 2)
    old = f"{text}layers.{layer}."
    ffn = old + "feed_forward."
    shared = "shared_expert." if "shared_expert" in rest else ""
    names = {
        "attention.wq.weight": old + "self_attn.q_proj.weight",
        "attention.wk.weight": old + "self_attn.k_proj.weight",
        "attention.wv.weight": old + "self_attn.v_proj.weight",
        "attention_norm.weight": old + "input_layernorm.weight",
        "ffn_norm.weight": old + "post_attention_layernorm.weight",
        f"feed_forward.{shared}w1.weight": f"{ffn}{shared}gate_proj.weight",
        f"feed_forward.{shared}w3.weight": f"{ffn}{shared}up_proj.weight",
        f"feed_forward.{shared}w2.weight": f"{ffn}{shared}down_proj.weight",
        "feed_forward.experts.w2": ffn + "experts.down_proj",
    }
    if rest in ("feed_forward.experts.w1", "feed_forward.experts.w3"):
        return hf[ffn + "experts.gate_up_proj"].chunk(2, -1)[int(rest[-1]) // 2]
    return hf[names[rest]] if rest in names else None


def check_hf(directory: pathlib.Path, golden: Llama4ForConditionalGeneration) -> None:
    """Compare a checkpoint with the golden model: the same keys, equal bits, equal logits."""
    model, info = Llama4ForConditionalGeneration.from_pretrained(
        directory, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16, model.dtype
    theirs = golden.state_dict()
    for name, ours in model.state_dict().items():
        assert torch.equal(ours, theirs[name]), name
    ids = torch.tensor([[(7 * t) % 57 + 3 for t in range(33)]])
    ids[0, 5:9] = 60
    pixels = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8).to(torch.bfloat16)
    with torch.no_grad():
        logits = [m(input_ids=ids, pixel_values=pixels).logits for m in (model, golden)]
    assert torch.equal(*logits)
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 1, generation
    print(f"{directory}: transformers loads {len(golden.state_dict())} tensors, equal logits")


def make() -> None:
    """Write every golden checkpoint and prove that Meta's code reads its own."""
    shutil.rmtree(OUT, ignore_errors=True)
    torch.serialization.add_safe_globals([io.BytesIO])  # released files hold some; ours do not
    model = make_model()
    model.save_pretrained(OUT / "hf", max_shard_size="50KB")
    hf, fp8 = model.state_dict(), {}
    state = raw_state(hf)
    write_meta(OUT / "meta", state, 8, fp8=None)
    check_meta(OUT / "meta", hf)
    write_meta(OUT / "meta_fp8", state, 2, fp8=fp8)
    write_hf_fp8(OUT / "hf_fp8", hf, fp8)
    bits = {key: tensor.contiguous().view(torch.int16).numpy() for key, tensor in fp8.items()}
    np.savez_compressed(OUT / "fp8.npz", **bits)
    check_hf(OUT / "hf", Llama4ForConditionalGeneration.from_pretrained(OUT / "hf", dtype="auto"))


def main() -> None:
    """Make the golden files, or check files that this package wrote."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check_hf", type=pathlib.Path)
    parser.add_argument("--check_meta", type=pathlib.Path)
    arguments = parser.parse_args()
    if not (arguments.check_hf or arguments.check_meta):
        make()
        return
    golden = Llama4ForConditionalGeneration.from_pretrained(OUT / "hf", dtype="auto")
    if arguments.check_hf:
        check_hf(arguments.check_hf, golden)
    if arguments.check_meta:
        check_meta(arguments.check_meta, golden.state_dict())


if __name__ == "__main__":
    main()
