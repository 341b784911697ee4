"""The family: Scout, Maverick, Behemoth (its size a guess) and nano, as functions."""

import dataclasses

from llama4_jax.config.model import ModelConfig, RopeScaling, Temperature, TextConfig, VisionConfig

_PATCH = 200_092
_INSTRUCT_STOPS = (200_001, 200_007, 200_008)


def every(interval: int, num_layers: int) -> tuple[int, ...]:
    """Return the layers i with (i + 1) % interval == 0, as Llama 4 places NoPE and MoE layers."""
    return tuple(range(interval - 1, num_layers, interval))


def _model(name: str, text: TextConfig, vision: VisionConfig) -> ModelConfig:
    return ModelConfig(
        name=name,
        text=text,
        vision=vision,
        bos_id=200_000,
        eos_ids=_INSTRUCT_STOPS,
        pad_id=200_018,
        patch_id=_PATCH,
    )


def scout() -> ModelConfig:
    """Llama 4 Scout 17B-16E: 108,641,793,536 parameters, MoE in every layer, 10M positions."""
    text = TextConfig(
        vocab_size=202_048,
        embed_dim=5120,
        num_layers=48,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=16_384,
        expert_dim=8192,
        num_experts=16,
        moe_layers=every(1, 48),
        nope_layers=every(4, 48),
        chunk_size=8192,
        rope_scaling=RopeScaling(),
        use_qk_norm=True,
        temperature=Temperature(),
        max_positions=10_485_760,
    )
    return _model("scout", text, VisionConfig())


def maverick() -> ModelConfig:
    """Llama 4 Maverick 17B-128E: 401,583,781,376 parameters, dense and MoE layers alternate."""
    text = dataclasses.replace(
        scout().text,
        num_experts=128,
        moe_layers=every(2, 48),
        rope_scaling=None,
        use_qk_norm=False,
        max_positions=1_048_576,
    )
    return _model("maverick", text, VisionConfig())


def behemoth_preview() -> ModelConfig:
    """A stand-in for Behemoth, which was never released: every size here is a guess.

    Known: 288B active parameters, 16 experts, nearly 2T in all. The family's recipe with those
    numbers fixes the product of depth, width and expert width but not each; this choice (the layer
    shape of Llama 3.1 405B) gives 288.0B active and 2015B in all.
    """
    text = dataclasses.replace(
        scout().text,
        embed_dim=16_384,
        num_layers=88,
        num_heads=128,
        mlp_dim=53_248,
        expert_dim=26_624,
        moe_layers=every(1, 88),
        nope_layers=every(4, 88),
        max_positions=262_144,
    )
    return _model("behemoth_preview", text, VisionConfig())


def nano() -> ModelConfig:
    """The member that ships: 3.6M parameters with every feature of its big sisters, chunk 64.

    Its small tokenizer carries Llama 4's special tokens at the top of a vocabulary of 2048.
    """
    text = TextConfig(
        vocab_size=2048,
        embed_dim=128,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        mlp_dim=512,
        expert_dim=160,
        num_experts=4,
        moe_layers=every(1, 8),
        nope_layers=every(4, 8),
        chunk_size=64,
        rope_theta=10_000.0,
        rope_scaling=None,
        use_qk_norm=True,
        temperature=Temperature(floor=512),
        max_positions=8192,
    )
    vision = VisionConfig(
        image_size=32,
        patch_size=4,
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        mlp_dim=256,
        adapter_dim=128,
    )
    return ModelConfig(
        name="nano",
        text=text,
        vision=vision,
        bos_id=1920,
        eos_ids=(1921, 1927, 1928),
        pad_id=1938,
        patch_id=2012,
        max_tiles=4,
    )


FAMILIES = {f.__name__: f for f in (scout, maverick, behemoth_preview, nano)}
