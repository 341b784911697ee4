"""The dense SwiGLU MLP, also the shared expert of a mixture layer."""

import jax
from flax import nnx

from llama4_jax.layers.param import normal, weight
from llama4_jax.parallel.shard import einsum


class MLP(nnx.Module):
    """y = (silu(x W_gate) * (x W_up)) W_down."""

    def __init__(
        self, embed_dim: int, mlp_dim: int, *, num_layers: int, key: jax.Array, dtype: str
    ):
        D, F = embed_dim, mlp_dim
        keys = jax.random.split(key, 3)
        in_axes, out_axes = ("weight_embed", "mlp"), ("mlp", "weight_embed")
        self.w_gate_DF = normal(keys[0], (D, F), in_axes, std=D**-0.5, dtype=dtype)
        self.w_up_DF = normal(keys[1], (D, F), in_axes, std=D**-0.5, dtype=dtype)
        out_std = (F * 2 * num_layers) ** -0.5
        self.w_down_FD = normal(keys[2], (F, D), out_axes, std=out_std, dtype=dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        with jax.named_scope("mlp"):
            hidden, dtype = ("batch", "seq", "mlp"), x_BTD.dtype
            gate_BTF = einsum("BTD,DF->BTF", x_BTD, weight(self.w_gate_DF, dtype), out=hidden)
            up_BTF = einsum("BTD,DF->BTF", x_BTD, weight(self.w_up_DF, dtype), out=hidden)
            hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
            out = ("batch", "seq", "embed")
            return einsum("BTF,FD->BTD", hidden_BTF, weight(self.w_down_FD, dtype), out=out)
