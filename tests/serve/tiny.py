"""A small random model for the serving tests: every feature, chunks of 8, a byte vocabulary."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from PIL import Image

from llama4_jax.config import ModelConfig, Temperature, TextConfig, VisionConfig
from llama4_jax.model import Llama4
from llama4_jax.pretrained import GenerationDefaults, Pretrained, save_pretrained
from llama4_jax.text import load_tokenizer
from llama4_jax.text.hf_tokenizer import bytes_by_character
from llama4_jax.text.special_tokens import llama4_special_tokens

SPECIAL = {name: 256 + i for i, name in enumerate(llama4_special_tokens()[:93])}
BOS, EOT = SPECIAL["<|begin_of_text|>"], SPECIAL["<|eot|>"]
PAD, PATCH = SPECIAL["<|finetune_right_pad|>"], SPECIAL["<|patch|>"]
VOCAB = 352  # divides over 8 devices
TOKENS_PER_TILE = 4
LONGEST = 128


def config(positions: int = LONGEST) -> ModelConfig:
    """Two groups of a chunked dense layer and a global NoPE layer with experts and temperature."""
    text = TextConfig(
        vocab_size=VOCAB,
        embed_dim=32,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
        expert_dim=32,
        num_experts=4,
        moe_layers=(1, 3),
        nope_layers=(1, 3),
        chunk_size=8,
        rope_scaling=None,
        use_qk_norm=True,
        temperature=Temperature(floor=4),
        max_positions=positions,
    )
    vision = VisionConfig(
        image_size=8, patch_size=2, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=64,
        adapter_dim=16,
    )  # fmt: skip
    return ModelConfig(
        name="tiny",
        text=text,
        vision=vision,
        bos_id=BOS,
        eos_ids=(EOT,),
        pad_id=PAD,
        patch_id=PATCH,
        max_tiles=4,
        dtype="float32",
    )


@functools.cache
def model(positions: int = LONGEST) -> Llama4:
    """Its matrices are three times their usual size, so that logits differ clearly."""
    made = jax.jit(lambda key: Llama4(config(positions), key=key))(jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(3 * np.asarray(x)) if x.ndim > 1 else x, made)


def write_tokenizer(folder: pathlib.Path) -> None:
    """Write a tokenizer.json in which every byte is a token and the special tokens follow."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=bytes_by_character(), merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    made.save(str(folder / "tokenizer.json"))


def pretrained(folder: pathlib.Path, **changes) -> Pretrained:
    """Return the model with its tokenizer, whose file `folder` then holds."""
    write_tokenizer(folder)
    parts = {
        "model": model(),
        "config": config(),
        "tokenizer": load_tokenizer(folder),
        "generation": GenerationDefaults(stop_ids=(EOT,)),
        "directory": folder,
    }
    return Pretrained(**{**parts, **changes})


def write_checkpoint(folder: pathlib.Path, *, with_tokenizer: bool = True) -> pathlib.Path:
    """Write the model in Hugging Face layout into a new folder below `folder`."""
    whole = pretrained(folder)
    target = folder / "checkpoint"
    save_pretrained(whole if with_tokenizer else whole.model, target)
    return target


def picture(seed: int, *, wide: bool = False) -> Image.Image:
    """A random picture of one tile, or of two side by side, which a global tile follows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 16 if wide else 8, 3), np.uint8)
    return Image.fromarray(pixels)


def random_tokens(seed: int, length: int) -> list[int]:
    """A begin-of-text token and random bytes."""
    return [BOS, *np.random.default_rng(seed).integers(0, 256, length - 1).tolist()]


_forward = jax.jit(lambda model, tokens_BT, tiles=None: model(tokens_BT, tiles).logits_BTV)


def full_logits(tokens: list[int], tiles_NCHW=None) -> np.ndarray:
    """Return logits [T, V] of a row read at once and without a cache, padded to one shape."""
    padded = jnp.asarray([tokens + [PAD] * (LONGEST - len(tokens))])
    return np.asarray(_forward(model(), padded, tiles_NCHW))[0, : len(tokens)]


def greedy(tokens: list[int], count: int, tiles_NCHW=None) -> list[int]:
    """Continue by the argmax of the full forward."""
    row = list(tokens)
    for _ in range(count):
        row.append(int(full_logits(row, tiles_NCHW)[-1].argmax()))
    return row[len(tokens) :]
