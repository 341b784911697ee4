"""Feed-forward layers: a dense SwiGLU MLP, and a mixture of experts with one as shared expert."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llama4_jax.config.model import TextConfig
from llama4_jax.layers.linear import ExpertWeights, can_be_stacked, expert_matrices, project
from llama4_jax.layers.param import buffer, normal
from llama4_jax.parallel.experts import sharded_expert_mlp


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
            hidden = ("batch", "seq", "mlp")
            gate_BTF = project("BTD,DF->BTF", x_BTD, self.w_gate_DF, out=hidden)
            up_BTF = project("BTD,DF->BTF", x_BTD, self.w_up_DF, out=hidden)
            hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
            out = ("batch", "seq", "embed")
            return project("BTF,FD->BTD", hidden_BTF, self.w_down_FD, out=out)


class Routing(NamedTuple):
    """Which experts each token chose (int32 [B, T, X]) and their gates ([B, T, X])."""

    expert_BTX: jax.Array
    gate_BTX: jax.Array


def route(
    logits_BTE: jax.Array,
    experts_per_token: int,
    *,
    bias_E: jax.Array | None = None,
    is_token_BT: jax.Array | None = None,
) -> Routing:
    """Choose the largest logits, the lowest index on ties; a gate is the sigmoid of its logit.

    Gates are not normalised over the choices. The sigmoid is taken in float32. A bias is added, in
    float32, for the choice alone. Padding is routed to no expert (-1).

    Source: the bias: arXiv 2408.15664, equation 3.
    """
    if bias_E is None:
        top_BTX, expert_BTX = jax.lax.top_k(logits_BTE, experts_per_token)
    else:
        biased_BTE = jax.lax.stop_gradient(logits_BTE.astype(jnp.float32)) + bias_E
        _, expert_BTX = jax.lax.top_k(biased_BTE, experts_per_token)
        is_chosen_BTXE = expert_BTX[..., None] == jnp.arange(logits_BTE.shape[-1])
        top_BTX = jnp.where(is_chosen_BTXE, logits_BTE[:, :, None], 0).sum(-1)
    if is_token_BT is not None:
        expert_BTX = jnp.where(is_token_BT[..., None], expert_BTX, -1)
    gate_BTX = jax.nn.sigmoid(top_BTX.astype(jnp.float32)).astype(logits_BTE.dtype)
    return Routing(expert_BTX, gate_BTX)


class RouterLoad(NamedTuple):
    """What a router did with the tokens of each row, padding left out.

    Sums stay apart by row: rows are sharded over devices, and adding them up layer by layer would
    be a collective in every layer, where one for all layers will do.

    Attributes:
        tokens_BE: int32, tokens that chose each expert.
        probability_BE: float32, sum over tokens of the softmax of their logits.
        entropy_B: float32, sum over tokens of the entropy of that softmax, in nats.
    """

    tokens_BE: jax.Array
    probability_BE: jax.Array
    entropy_B: jax.Array


def load_of(logits_BTE: jax.Array, expert_BTX: jax.Array) -> RouterLoad:
    """Count the choices that `route` made of these logits; expert -1 marks what is no token."""

    @jax.checkpoint  # keeps the logits for the gradient, and no float32 array of their size
    def add_up(logits_BTE: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_BTE = jax.nn.log_softmax(logits_BTE.astype(jnp.float32))
        probability_BTE = jnp.where(expert_BTX[..., :1] >= 0, jnp.exp(log_BTE), 0.0)
        return probability_BTE.sum(1), -(probability_BTE * log_BTE).sum((1, 2))

    with jax.named_scope("router_load"):
        chose_BTXE = expert_BTX[..., None] == jnp.arange(logits_BTE.shape[-1])
        return RouterLoad(chose_BTXE.sum((1, 2), dtype=jnp.int32), *add_up(logits_BTE))


class RouterOutput(NamedTuple):
    """A router's logits, and the load that came of them; over layers, both begin with L."""

    logits_BTE: jax.Array
    load: RouterLoad


class Experts(nnx.Module):
    """The matrices of the routed experts."""

    def __init__(self, config: TextConfig, *, key: jax.Array, dtype: str):
        E, D, F = config.num_experts, config.embed_dim, config.expert_dim
        keys = jax.random.split(key, 3)
        in_axes = ("experts", "expert_embed", "expert_mlp")
        out_axes = ("experts", "expert_mlp", "expert_embed")
        self.w_gate_EDF = normal(keys[0], (E, D, F), in_axes, std=D**-0.5, dtype=dtype)
        self.w_up_EDF = normal(keys[1], (E, D, F), in_axes, std=D**-0.5, dtype=dtype)
        out_std = (F * 2 * config.num_layers) ** -0.5
        self.w_down_EFD = normal(keys[2], (E, F, D), out_axes, std=out_std, dtype=dtype)

    @property
    def weights(self) -> ExpertWeights:
        """Return gate, up and down."""
        return self.w_gate_EDF, self.w_up_EDF, self.w_down_EFD


@dataclasses.dataclass(frozen=True)
class ExpertStack:
    """The experts of one slot in all groups (a leading axis on every matrix), and whose turn it is.

    A loop over stacked layers hands each layer its own slice, which is free where the slice goes
    into a product, but a copy of all experts where it goes into the loop over blocks of rows. A
    decoding step would move every expert's matrices for the few that are hit; reading the stack
    itself at (group, expert) moves those alone.
    """

    experts: Experts
    group: jax.Array

    def is_ready(self, dtype: jnp.dtype) -> bool:
        """Can the stack be read where it lies, neither cast nor gathered?"""
        return can_be_stacked(self.experts.weights, dtype)


class MoE(nnx.Module):
    """y = shared(x) + sum over the chosen experts e of Expert_e(sigmoid(logit_e) * x)."""

    def __init__(self, config: TextConfig, *, key: jax.Array, dtype: str):
        D, E = config.embed_dim, config.num_experts
        keys = jax.random.split(key, 3)
        self.router_DE = normal(
            keys[0], (D, E), ("weight_embed", None), std=D**-0.5, dtype=dtype, role="router"
        )
        self.experts = Experts(config, key=keys[1], dtype=dtype)
        self.shared = MLP(
            D, config.expert_dim, num_layers=config.num_layers, key=keys[2], dtype=dtype
        )
        self.bias_E = buffer(jnp.zeros(E), (None,)) if config.balance_bias else None
        self.experts_per_token = config.experts_per_token

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        is_token_BT: jax.Array | None = None,
        stack: ExpertStack | None = None,
    ) -> tuple[jax.Array, RouterOutput]:
        """Apply the layer, with the experts of `stack` if there is one.

        Padding, if `is_token_BT` tells of any, goes to the shared expert alone. Returns y_BTD and
        what the router did; its logits are in the dtype of x.
        """
        experts, is_stacked = (stack.experts, True) if stack else (self.experts, False)
        matrices = expert_matrices(experts.weights, x_BTD.dtype, is_stacked=is_stacked)
        with jax.named_scope("moe"):
            logits_BTE = project("BTD,DE->BTE", x_BTD, self.router_DE, out=("batch", "seq", None))
            routing = route(
                logits_BTE,
                self.experts_per_token,
                bias_E=None if self.bias_E is None else self.bias_E[...],
                is_token_BT=is_token_BT,
            )
            y_BTD = sharded_expert_mlp(
                x_BTD,
                *matrices.matrices,
                weight_scales=matrices.scales,
                expert_BTX=routing.expert_BTX,
                gate_BTX=routing.gate_BTX,
                shared_BTD=self.shared(x_BTD),
                group=stack.group if stack else None,
            )
            return y_BTD, RouterOutput(logits_BTE, load_of(logits_BTE, routing.expert_BTX))
