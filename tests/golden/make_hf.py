"""Make `hf_*.npz`: what Hugging Face transformers computes for the tiny models of `closed_form.py`.

Run in the environment of the references (README.md): `python tests/golden/make_hf.py`. It checks
sums that were computed independently of this program, prints them, and takes ten seconds.
"""

import dataclasses
import pathlib
import tempfile

import closed_form
import numpy as np
import torch
import transformers
from closed_form import TEXT_CASES, VISION, Shape
from transformers import Llama4Config, Llama4ForConditionalGeneration
from transformers.models.llama4 import modeling_llama4

HERE = pathlib.Path(__file__).parent

# From a separate program: sum of logits, sum of their magnitudes, and a few logits of the first
# and of the last token.
EXPECTED = {
    "scout": (
        -83.27918,
        10371.6192,
        [0.17864, 0.52649, -1.00324, 2.26437],
        [0.08325, 0.61874, -1.04553, 0.39381],
    ),
    "maverick_scaled": (162.48903, 10318.7735, None, [-0.03144, 0.32366, 0.05026, 3.85379]),
}
EXPECTED_IMAGE = {
    "scout": ([2.06617, -1.12123, -1.30688, 1.12691], [-0.01239, 1.54972, -0.04751, -0.13963]),
    "maverick_scaled": (
        [-0.47034, -0.30572, -1.78208, -0.90146],
        [1.17139, 3.30697, 2.16056, 2.88725],
    ),
}


def hf_config(shape: Shape) -> Llama4Config:
    """Translate a tiny shape into a transformers config."""
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    if shape.scaled_rope:
        rope |= {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        }
    text = {
        "vocab_size": closed_form.VOCAB_SIZE,
        "hidden_size": shape.embed_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.expert_dim,
        "intermediate_size_mlp": shape.mlp_dim,
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "interleave_moe_layer_step": shape.moe_step,
        "use_qk_norm": shape.use_qk_norm,
        "no_rope_layer_interval": shape.nope_interval,
        "attention_chunk_size": shape.chunk_size,
        "attn_temperature_tuning": shape.floor is not None,
        "floor_scale": shape.floor or 8192,
        "attn_scale": shape.temperature_coefficient,
        "rope_parameters": rope,
        "rms_norm_eps": shape.norm_eps,
        "max_position_embeddings": shape.max_positions,
        "bos_token_id": closed_form.BOS,
        "eos_token_id": closed_form.EOS,
        "pad_token_id": closed_form.PAD,
    }
    vision = {
        "hidden_size": VISION.embed_dim,
        "num_attention_heads": VISION.num_heads,
        "num_hidden_layers": VISION.num_layers,
        "intermediate_size": VISION.mlp_dim,
        "image_size": VISION.image_size,
        "patch_size": VISION.patch_size,
        "projector_input_dim": VISION.adapter_dim,
        "projector_output_dim": VISION.adapter_dim,
        "vision_output_dim": VISION.adapter_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return Llama4Config(
        text_config=text,
        vision_config=vision,
        image_token_index=closed_form.PATCH,
        boi_token_index=closed_form.IMAGE_START,
        eoi_token_index=closed_form.IMAGE_END,
    )


def build(shape: Shape, weights: closed_form.Weights) -> Llama4ForConditionalGeneration:
    """Make the float32 model, eager attention, and fill it; every weight must be named once."""
    model = Llama4ForConditionalGeneration._from_config(
        hf_config(shape), attn_implementation="eager"
    ).eval()
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        raise ValueError(f"names differ: {sorted(parameters.keys() ^ weights.keys())}")
    for name, value in weights.items():
        if tuple(parameters[name].shape) != value.shape:
            raise ValueError(f"{name}: {tuple(parameters[name].shape)} against {value.shape}")
        parameters[name].data = torch.from_numpy(value)
    return model


def in_bfloat16(model: Llama4ForConditionalGeneration) -> Llama4ForConditionalGeneration:
    """Reload in bfloat16; a cast in place would destroy the complex vision rotation table."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return Llama4ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()


def run(model: Llama4ForConditionalGeneration, ids: np.ndarray, **inputs) -> np.ndarray:
    """Return logits [B, T, V] float32 of ids [T] or [B, T]."""
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(np.atleast_2d(ids).astype(np.int64)), **inputs)
    return out.logits.float().numpy()


def check(name: str, found: np.ndarray | float, expected, tolerance: float) -> None:
    """Refuse to write a file when an expected number is missed."""
    error = float(np.abs(np.asarray(found) - np.asarray(expected)).max())
    print(f"{name}: {error:.2e} from the expected value")
    if not error < tolerance:
        raise ValueError(f"{name}: {found} against {expected}")


def make_text() -> dict[str, np.ndarray]:
    """Logits of every text case, and the router logits of two."""
    arrays = {}
    for name, case in TEXT_CASES.items():
        model = build(case.shape, case.weights())
        ids = torch.from_numpy(closed_form.tokens(case.length).astype(np.int64))[None]
        with torch.no_grad():
            out = model(input_ids=ids, output_router_logits=True)
        logits = out.logits[0].numpy()
        arrays[name] = logits[:, :: case.stride]
        if name in ("scout", "maverick"):
            arrays[name + ".router_logits"] = np.stack([r.numpy() for r in out.router_logits])
        if name in EXPECTED:
            total, magnitude, first, last = EXPECTED[name]
            check(name + " sum", logits.astype(np.float64).sum(), total, 2e-3)
            check(
                name + " sum of magnitudes", np.abs(logits).sum(dtype=np.float64), magnitude, 2e-3
            )
            check(name + " last", logits[36, :4], last, 2e-5)
            if first:
                check(name + " first", logits[0, :4], first, 2e-5)
    return arrays


def make_decode() -> dict[str, np.ndarray]:
    """Greedy continuations, token-by-token decode, and left padding without temperature."""
    arrays = {}
    for name in ("scout", "maverick"):
        case = TEXT_CASES[name]
        model = build(case.shape, case.weights())
        prompt = torch.from_numpy(closed_form.tokens(13).astype(np.int64))[None]
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=closed_form.PAD,
        )
        arrays[name + ".greedy"] = out[0, 13:].numpy().astype(np.int32)
        top = np.sort(run(model, out[0].numpy())[0, 12:-1], axis=-1)
        arrays[name + ".greedy_margin"] = (top[:, -1] - top[:, -2]).min()
        print(f"{name}: smallest greedy margin {arrays[name + '.greedy_margin']:.4f}")
        with torch.no_grad():
            cache, steps = None, []
            for token in closed_form.tokens(37):
                step = model(
                    input_ids=torch.tensor([[int(token)]]), past_key_values=cache, use_cache=True
                )
                cache = step.past_key_values
                steps.append(step.logits[0, -1, ::8].numpy())
        arrays[name + ".stepwise"] = np.stack(steps)
    case = TEXT_CASES["scout_no_temperature"]
    model = build(case.shape, case.weights())
    for pad in (1, 3, 8):
        ids = np.concatenate([np.full(pad, closed_form.PAD), closed_form.tokens(37)])
        mask = torch.ones(1, 37 + pad, dtype=torch.long)
        mask[0, :pad] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = run(model, ids, attention_mask=mask, position_ids=positions)
        arrays[f"left_padded_{pad}"] = logits[0, pad:, ::8]
    return arrays


def make_vision() -> dict[str, np.ndarray]:
    """Vision features, pixel shuffle, and logits of texts with images."""
    arrays = {}
    ramp = np.arange(2 * 16 * 3, dtype=np.float32).reshape(2, 16, 3)
    arrays["pixel_shuffle"] = modeling_llama4.pixel_shuffle(torch.from_numpy(ramp), 0.5).numpy()
    for name in ("scout", "maverick_scaled"):
        case = TEXT_CASES[name]
        model = build(case.shape, case.weights())
        with torch.no_grad():
            pixels = torch.from_numpy(closed_form.tiles(3))
            features = model.vision_model(pixels).last_hidden_state
            arrays[name + ".features"] = features.numpy()
            arrays[name + ".projected"] = model.multi_modal_projector(features).numpy()
        for image, (ids, count) in closed_form.IMAGE_CASES.items():
            pixels = torch.from_numpy(closed_form.tiles(count))
            logits = run(model, ids, pixel_values=pixels)[0]
            arrays[f"{name}.{image}"] = logits[:, ::4]
            if image == "one_image":
                at_9, feature = EXPECTED_IMAGE[name]
                check(name + " image", logits[9, :4], at_9, 2e-5)
                check(name + " feature", arrays[name + ".features"][0, 0, :4], feature, 2e-5)
        batch = closed_form.image_batch()
        logits = run(model, batch.ids_BT, pixel_values=torch.from_numpy(batch.tiles_NCHW))
        arrays[name + ".batch"] = logits[:, :, ::4]
    return arrays


def make_bfloat16() -> dict[str, np.ndarray]:
    """bfloat16 logits, hidden states and features as uint16; sdpa's softmax is float32."""
    arrays = {}
    for name, row in closed_form.BFLOAT16_ROWS.items():
        case = TEXT_CASES[name]
        model = in_bfloat16(build(case.shape, case.weights()))
        hidden = []
        for layer in model.language_model.model.layers:
            layer.register_forward_hook(
                lambda _, inputs, out, into=hidden: into.append((inputs, out))
            )
        arrays[name] = _bits(run(model, closed_form.tokens(case.length, row))[0])
        if not name.endswith("no_temperature"):
            states = [inputs[0] for inputs, _ in hidden] + [hidden[-1][1]]
            arrays[name + ".hidden"] = _bits(torch.cat(states).float().numpy())
        if name == "scout":
            with torch.no_grad():
                pixels = torch.from_numpy(closed_form.tiles(3)).to(torch.bfloat16)
                features = model.vision_model(pixels).last_hidden_state
            arrays["scout.features"] = _bits(features.float().numpy())
    return arrays


def _bits(values: np.ndarray) -> np.ndarray:
    """Return the upper half of float32 values that are exact in bfloat16."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    if (bits & 0xFFFF).any():
        raise ValueError("values are not bfloat16")
    return (bits >> 16).astype(np.uint16)


def make_positions() -> dict[str, np.ndarray]:
    """Rotation frequencies, temperatures and the vision rotation of the released sizes."""
    arrays = {}
    for name, (head_dim, scaled) in closed_form.ROPE_TABLES.items():
        shape = dataclasses.replace(closed_form.SCOUT, head_dim=head_dim, scaled_rope=scaled)
        rotary = modeling_llama4.Llama4TextRotaryEmbedding(hf_config(shape).text_config)
        arrays[name + ".frequencies"] = rotary.inv_freq.numpy()
    positions = torch.from_numpy(closed_form.TEMPERATURE_POSITIONS).float()
    arrays["temperature"] = (torch.log1p(torch.floor((positions + 1.0) / 8192)) * 0.1 + 1.0).numpy()
    vision = transformers.Llama4VisionConfig(
        hidden_size=1408,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    table = modeling_llama4.Llama4VisionRotaryEmbedding._compute_freqs_ci(vision)
    table = table.reshape(577, 44)[closed_form.VISION_ROTATION_PATCHES]
    arrays["vision_rotation"] = torch.view_as_real(table).numpy()
    return arrays


def main() -> None:
    """Write all files."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    makers = {
        "text": make_text,
        "decode": make_decode,
        "vision": make_vision,
        "bfloat16": make_bfloat16,
        "positions": make_positions,
    }
    for kind, make in makers.items():
        path = HERE / f"hf_{kind}.npz"
        np.savez_compressed(path, made_with=np.array(versions), **make())
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
