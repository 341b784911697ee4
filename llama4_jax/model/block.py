"""One decoder layer: pre-norm attention, then a pre-norm dense MLP or mixture."""

import jax
from flax import nnx

from llama4_jax.config.model import TextConfig
from llama4_jax.config.pattern import LayerKind
from llama4_jax.layers.attention import Attention, CacheView, LayerCache, Positions
from llama4_jax.layers.mlp import MLP
from llama4_jax.layers.moe import MoE
from llama4_jax.layers.norm import RMSNorm


class Block(nnx.Module):
    """h = x + attention(norm(x)); y = h + ffn(norm(h))."""

    def __init__(self, config: TextConfig, kind: LayerKind, *, key: jax.Array, dtype: str):
        D, eps = config.embed_dim, config.norm_eps
        attention_key, ffn_key = jax.random.split(key)
        self.attention_norm = RMSNorm(D, eps=eps, dtype=dtype)
        self.attention = Attention(config, is_nope=kind.is_nope, key=attention_key, dtype=dtype)
        self.ffn_norm = RMSNorm(D, eps=eps, dtype=dtype)
        if kind.is_moe:
            self.ffn: MoE | MLP = MoE(config, key=ffn_key, dtype=dtype)
        else:
            self.ffn = MLP(
                D, config.mlp_dim, num_layers=config.num_layers, key=ffn_key, dtype=dtype
            )

    def __call__(
        self, x_BTD: jax.Array, at: Positions, cache: CacheView | None
    ) -> tuple[jax.Array, LayerCache | None, jax.Array | None]:
        """Returns y_BTD, the layer's new cache, and the router's logits if there is one."""
        attended_BTD, stored = self.attention(self.attention_norm(x_BTD), at, cache)
        x_BTD = x_BTD + attended_BTD
        if isinstance(self.ffn, MoE):
            y_BTD, router_logits_BTE = self.ffn(self.ffn_norm(x_BTD))
        else:
            y_BTD, router_logits_BTE = self.ffn(self.ffn_norm(x_BTD)), None
        return x_BTD + y_BTD, stored, router_logits_BTE
