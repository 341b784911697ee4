"""Self-attention of the decoder: chunk-local with RoPE, or global without it (NoPE)."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from llama4_jax.cache.layers import CacheView, LayerCache
from llama4_jax.config.model import TextConfig
from llama4_jax.config.pattern import LayerKind
from llama4_jax.layers.linear import project
from llama4_jax.layers.norm import rms_normalize
from llama4_jax.layers.param import normal
from llama4_jax.layers.rope import apply_rope, rope_angles, rope_frequencies
from llama4_jax.parallel.sequence import Order, self_attention


@dataclasses.dataclass(frozen=True)
class Positions:
    """Where the tokens of a call stand.

    Attributes:
        positions_BT: int32, 0-based, -1 for padding.
        segments_BT: int32 segments of packed rows, or None.
        order: what is known of the positions.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    order: Order


class Attention(nnx.Module):
    """Grouped-query attention; query head n reads kv head n // (num_heads / num_kv_heads)."""

    def __init__(self, config: TextConfig, kind: LayerKind, *, key: jax.Array, dtype: str):
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        keys = jax.random.split(key, 4)
        how: Any = {"std": D**-0.5, "dtype": dtype, "contracted": (-3,)}
        q_axes = ("weight_embed", "q_heads", "head_dim")
        kv_axes = ("weight_embed", "kv_heads", "head_dim")
        self.w_q_DNH = normal(keys[0], (D, N, H), q_axes, **how)
        self.w_k_DKH = normal(keys[1], (D, K, H), kv_axes, **how)
        self.w_v_DKH = normal(keys[2], (D, K, H), kv_axes, **how)
        out_axes = ("q_heads", "head_dim", "weight_embed")
        out_std = (N * H * 2 * config.num_layers) ** -0.5
        self.w_o_NHD = normal(
            keys[3], (N, H, D), out_axes, std=out_std, dtype=dtype, contracted=(-3, -2)
        )
        self.config = config
        self.kind = kind

    def _rotate(self, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Apply RoPE and then, if the model has it, qk-norm."""
        config = self.config
        period = config.chunk_size if config.rope_positions == "chunk" else None
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        x_BTNH = apply_rope(x_BTNH, rope_angles(positions_BT, frequencies, period=period))
        return rms_normalize(x_BTNH, config.norm_eps) if config.use_qk_norm else x_BTNH

    def __call__(
        self, x_BTD: jax.Array, at: Positions, cache: CacheView | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attend; with a cache, to what it holds too. Returns out_BTD and the new cache."""
        q_axes, kv_axes = ("batch", "seq", "q_heads", None), ("batch", "seq", "kv_heads", None)
        q_BTNH = project("BTD,DNH->BTNH", x_BTD, self.w_q_DNH, out=q_axes)
        k_BTKH = project("BTD,DKH->BTKH", x_BTD, self.w_k_DKH, out=kv_axes)
        v_BTKH = project("BTD,DKH->BTKH", x_BTD, self.w_v_DKH, out=kv_axes)
        if self.kind.has_rope:
            q_BTNH = self._rotate(q_BTNH, at.positions_BT)
            k_BTKH = self._rotate(k_BTKH, at.positions_BT)
        visibility, stored = self.kind.visibility, None
        if cache is None:
            out_BTNH = self_attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                positions_BT=at.positions_BT,
                segments_BT=at.segments_BT,
                order=at.order,
                visibility=visibility,
            )
        else:
            out_BTNH, stored = cache.attend(
                q_BTNH, k_BTKH, v_BTKH, positions_BT=at.positions_BT, visibility=visibility
            )
        out_axes = ("batch", "seq", "embed")
        return project("BTNH,NHD->BTD", out_BTNH, self.w_o_NHD, out=out_axes), stored
