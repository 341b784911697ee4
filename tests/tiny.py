"""Small members of the family for tests: every feature, sizes that compile in seconds."""

import dataclasses
from typing import Any

import jax

from llama4_jax.config import ModelConfig, Temperature, TextConfig, VisionConfig
from llama4_jax.config.families import every
from llama4_jax.model import Llama4

CHUNK = 8


def scout_like(**changes: Any) -> ModelConfig:
    """Five layers (a group of four and a tail of one), all mixtures, qk-norm."""
    text = TextConfig(
        vocab_size=64,
        embed_dim=32,
        num_layers=5,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=64,
        expert_dim=48,
        num_experts=4,
        moe_layers=every(1, 5),
        nope_layers=every(4, 5),
        chunk_size=CHUNK,
        rope_theta=10_000.0,
        rope_scaling=None,
        use_qk_norm=True,
        temperature=Temperature(floor=4),
        max_positions=1024,
    )
    vision = VisionConfig(
        image_size=16,
        patch_size=4,
        embed_dim=32,
        num_layers=2,
        num_heads=2,
        mlp_dim=64,
        adapter_dim=48,
    )
    return ModelConfig(
        name="scout_like",
        text=dataclasses.replace(text, **changes),
        vision=vision,
        bos_id=0,
        eos_ids=(1,),
        pad_id=2,
        patch_id=3,
        dtype="float32",
    )


def maverick_like(**changes: Any) -> ModelConfig:
    """Eight layers (two groups of four), dense and mixture layers alternating, no qk-norm."""
    changes = {
        "num_layers": 8,
        "num_experts": 8,
        "moe_layers": every(2, 8),
        "nope_layers": every(4, 8),
        "use_qk_norm": False,
    } | changes
    return dataclasses.replace(scout_like(**changes), name="maverick_like")


def build(config: ModelConfig, *, seed: int = 0) -> Llama4:
    """Initialise a model; norm scales and biases are moved off their neutral values."""

    def make(key: jax.Array) -> Llama4:
        model = Llama4(config, key=key)
        leaves, tree = jax.tree.flatten(model)
        keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
        moved = [
            x + 0.1 * jax.random.normal(k, x.shape, x.dtype)
            for x, k in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(tree, moved)

    return jax.jit(make)(jax.random.key(seed))
