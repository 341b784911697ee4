"""Small members of the family for tests: every feature, sizes that compile in seconds."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.config import ModelConfig, Temperature, TextConfig, VisionConfig
from llama4_jax.config.families import every
from llama4_jax.model import Llama4

CHUNK = 8


def scout_like(**changes: Any) -> ModelConfig:
    """Five layers (two groups of a local and a NoPE one, a tail of one), all mixtures, qk-norm."""
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
        nope_layers=every(2, 5),
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


@functools.cache
def build(config: ModelConfig, *, seed: int = 0) -> Llama4:
    """Fill a model with random numbers, norms off their neutral values, compiling nothing."""
    shapes = jax.eval_shape(lambda key: Llama4(config, key=key), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(centre + 0.2 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)
