"""The vision encoder: patches, a transformer with 2-D RoPE, pixel shuffle, an adapter."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.attention.api import chunked_attention
from llama4_jax.config.model import VisionConfig
from llama4_jax.layers.linear import Weight, project
from llama4_jax.layers.norm import LayerNorm
from llama4_jax.layers.param import constant, normal, weight
from llama4_jax.layers.rope import apply_rope, image_angles
from llama4_jax.parallel.axes import Axes
from llama4_jax.parallel.shard import per_shard, shard

_FEATURES = ("tiles", None, "embed")
_HEADS = ("tiles", None, "q_heads", None)
_HIDDEN = ("tiles", None, "mlp")


def patchify(tile_CHW: jax.Array, patch_size: int) -> jax.Array:
    """Cut a tile into row-major patches of (channel, row, column) features. Returns x_PI."""
    C, height, width = tile_CHW.shape
    rows, columns = height // patch_size, width // patch_size
    patches = tile_CHW.reshape(C, rows, patch_size, columns, patch_size)
    return patches.transpose(1, 3, 0, 2, 4).reshape(rows * columns, C * patch_size**2)


def pixel_shuffle(x_PD: jax.Array, grid: int, shuffle: int) -> jax.Array:
    """Fold each square of shuffle x shuffle patches into one token, rows slow and columns fast.

    Returns:
        [P / shuffle^2, D * shuffle^2].
    """
    side, D = grid // shuffle, x_PD.shape[-1]
    squares = x_PD.reshape(side, shuffle, side, shuffle, D).transpose(0, 2, 1, 3, 4)
    return squares.reshape(side * side, shuffle * shuffle * D)


def _per_tile(function: Callable[[jax.Array], jax.Array], tiles: jax.Array) -> jax.Array:
    """Apply a function of one tile to all of them, sharded as they are."""
    whole = (None,) * (tiles.ndim - 1)
    return per_shard(
        lambda _, local: jax.vmap(function)(local),
        tiles,
        axes=(("tiles", *whole),),
        out=_FEATURES,
    )


def _attend(
    _: dict[str, tuple[str, ...]], q_BPNH: jax.Array, k_BPNH: jax.Array, v_BPNH: jax.Array
) -> jax.Array:
    everywhere_BP = jnp.zeros(q_BPNH.shape[:2], jnp.int32)  # equal positions: all see all
    out_BPNH = chunked_attention(
        q_BPNH, k_BPNH, v_BPNH, q_positions_BT=everywhere_BP, kv_positions_BS=everywhere_BP
    )
    assert isinstance(out_BPNH, jax.Array)
    return out_BPNH


class VisionAttention(nnx.Module):
    """Full attention among the patches of one tile, with biases and 2-D RoPE."""

    def __init__(self, config: VisionConfig, *, key: jax.Array, dtype: str):
        D, N, H = config.embed_dim, config.num_heads, config.head_dim
        keys = jax.random.split(key, 4)
        axes: Axes = ("weight_embed", "q_heads", "head_dim")
        bias_axes, out_axes = axes[1:], (*axes[1:], axes[0])
        how: Any = {"std": D**-0.5, "dtype": dtype}
        self.w_q_DNH = normal(keys[0], (D, N, H), axes, contracted=(-3,), **how)
        self.w_k_DNH = normal(keys[1], (D, N, H), axes, contracted=(-3,), **how)
        self.w_v_DNH = normal(keys[2], (D, N, H), axes, contracted=(-3,), **how)
        self.w_o_NHD = normal(keys[3], (N, H, D), out_axes, contracted=(-3, -2), **how)
        self.b_q_NH = constant(0.0, (N, H), bias_axes, dtype=dtype, role="bias")
        self.b_k_NH = constant(0.0, (N, H), bias_axes, dtype=dtype, role="bias")
        self.b_v_NH = constant(0.0, (N, H), bias_axes, dtype=dtype, role="bias")
        self.b_o_D = constant(0.0, (D,), ("weight_embed",), dtype=dtype, role="bias")

    def __call__(self, x_BPD: jax.Array, angles_BPh: jax.Array) -> jax.Array:
        dtype = x_BPD.dtype

        def affine(w_DNH: Weight, b_NH: nnx.Param) -> jax.Array:
            x_BPNH = project("BPD,DNH->BPNH", x_BPD, w_DNH, out=_HEADS)
            return x_BPNH + weight(b_NH, dtype)

        q_BPNH = apply_rope(affine(self.w_q_DNH, self.b_q_NH), angles_BPh)
        k_BPNH = apply_rope(affine(self.w_k_DNH, self.b_k_NH), angles_BPh)
        v_BPNH = affine(self.w_v_DNH, self.b_v_NH)
        out_BPNH = per_shard(_attend, q_BPNH, k_BPNH, v_BPNH, axes=(_HEADS,) * 3, out=_HEADS)
        out_BPD = project("BPNH,NHD->BPD", out_BPNH, self.w_o_NHD, out=_FEATURES)
        return out_BPD + weight(self.b_o_D, dtype)


class VisionMLP(nnx.Module):
    """y = gelu(x W_in + b_in) W_out + b_out, with the exact (erf) gelu."""

    def __init__(self, config: VisionConfig, *, key: jax.Array, dtype: str):
        D, F = config.embed_dim, config.mlp_dim
        in_key, out_key = jax.random.split(key)
        self.w_in_DF = normal(in_key, (D, F), ("weight_embed", "mlp"), std=D**-0.5, dtype=dtype)
        self.b_in_F = constant(0.0, (F,), ("mlp",), dtype=dtype, role="bias")
        self.w_out_FD = normal(out_key, (F, D), ("mlp", "weight_embed"), std=F**-0.5, dtype=dtype)
        self.b_out_D = constant(0.0, (D,), ("weight_embed",), dtype=dtype, role="bias")

    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        dtype = x_BPD.dtype
        hidden_BPF = project("BPD,DF->BPF", x_BPD, self.w_in_DF, out=_HIDDEN)
        hidden_BPF = jax.nn.gelu(hidden_BPF + weight(self.b_in_F, dtype), approximate=False)
        out_BPD = project("BPF,FD->BPD", hidden_BPF, self.w_out_FD, out=_FEATURES)
        return out_BPD + weight(self.b_out_D, dtype)


class VisionBlock(nnx.Module):
    """One encoder layer: pre-norm attention, then a pre-norm MLP."""

    def __init__(self, config: VisionConfig, *, key: jax.Array, dtype: str):
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm = LayerNorm(config.embed_dim, eps=config.norm_eps, dtype=dtype)
        self.attention = VisionAttention(config, key=attention_key, dtype=dtype)
        self.mlp_norm = LayerNorm(config.embed_dim, eps=config.norm_eps, dtype=dtype)
        self.mlp = VisionMLP(config, key=mlp_key, dtype=dtype)

    def __call__(self, x_BPD: jax.Array, angles_BPh: jax.Array) -> jax.Array:
        x_BPD = x_BPD + self.attention(self.attention_norm(x_BPD), angles_BPh)
        return x_BPD + self.mlp(self.mlp_norm(x_BPD))


class Adapter(nnx.Module):
    """Two linear layers on pixel-shuffled features, each followed by the exact gelu."""

    def __init__(self, config: VisionConfig, *, key: jax.Array, dtype: str):
        D, F = config.embed_dim * config.shuffle**2, config.adapter_dim
        in_key, out_key = jax.random.split(key)
        self.w_in_DF = normal(in_key, (D, F), ("weight_embed", "mlp"), std=D**-0.5, dtype=dtype)
        self.w_out_FD = normal(out_key, (F, F), ("mlp", "weight_embed"), std=F**-0.5, dtype=dtype)

    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        hidden_BPF = project("BPD,DF->BPF", x_BPD, self.w_in_DF, out=_HIDDEN)
        hidden_BPF = jax.nn.gelu(hidden_BPF, approximate=False)
        out_BPF = project("BPF,FD->BPD", hidden_BPF, self.w_out_FD, out=_FEATURES)
        return jax.nn.gelu(out_BPF, approximate=False)


class VisionEncoder(nnx.Module):
    """Every tile on its own: patches and, last, a class token that the adapter never sees."""

    def __init__(self, config: VisionConfig, *, key: jax.Array, dtype: str):
        D, eps = config.embed_dim, config.norm_eps
        inputs, positions = config.patch_dim, config.num_patches + 1
        keys = jax.random.split(key, 5)
        axes, std = (None, "weight_embed"), D**-0.5
        self.patch_w_ID = normal(keys[0], (inputs, D), axes, std=inputs**-0.5, dtype=dtype)
        table: Any = {"std": std, "dtype": dtype, "role": "embedding"}
        self.class_embedding_D = normal(keys[1], (D,), ("weight_embed",), **table)
        self.position_embedding_PD = normal(keys[2], (positions, D), axes, **table)
        self.norm_pre = LayerNorm(D, eps=eps, dtype=dtype)
        self.layers = jax.vmap(lambda k: VisionBlock(config, key=k, dtype=dtype))(
            jax.random.split(keys[3], config.num_layers)
        )
        self.norm_post = LayerNorm(D, eps=eps, dtype=dtype)
        self.adapter = Adapter(config, key=keys[4], dtype=dtype)
        self.config = config

    def __call__(self, tiles_NCHW: jax.Array, *, dtype: str, remat: bool = False) -> jax.Array:
        """Encode tiles.

        Args:
            tiles_NCHW: [tiles, channels, image_size, image_size] in [-1, 1].
            dtype: what to compute in.
            remat: recompute each layer in the backward pass.

        Returns:
            [tiles, tokens_per_tile, adapter_dim].
        """
        config, compute = self.config, jnp.dtype(dtype)
        with jax.named_scope("vision_encoder"):
            tiles_NCHW = shard(tiles_NCHW.astype(compute), ("tiles", None, None, None))
            x_BPI = _per_tile(lambda tile: patchify(tile, config.patch_size), tiles_NCHW)
            x_BPD = project("BPI,ID->BPD", x_BPI, self.patch_w_ID, out=_FEATURES)
            B, _, D = x_BPD.shape
            class_D = weight(self.class_embedding_D, compute)
            class_B1D = shard(jnp.broadcast_to(class_D, (B, 1, D)), _FEATURES)
            x_BPD = jnp.concatenate([x_BPD, class_B1D], axis=1)
            x_BPD = x_BPD + weight(self.position_embedding_PD, compute)
            x_BPD = self.norm_pre(x_BPD)
            angles_PH = jnp.asarray(image_angles(config.grid, config.head_dim, config.rope_theta))

            def step(x_BPD: jax.Array, block: VisionBlock) -> tuple[jax.Array, None]:
                return block(x_BPD, angles_PH[None]), None

            x_BPD, _ = jax.lax.scan(jax.checkpoint(step) if remat else step, x_BPD, self.layers)
            x_BPD = self.norm_post(x_BPD)[:, :-1]
            x_BPD = _per_tile(lambda x_PD: pixel_shuffle(x_PD, config.grid, config.shuffle), x_BPD)
            return self.adapter(x_BPD)
