"""The decoder: one layer, and a scan over groups of them, so compile time ignores depth."""

from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llama4_jax.cache.layers import Cache, CacheView, LayerCache
from llama4_jax.config.model import TextConfig
from llama4_jax.config.pattern import LayerKind, layer_pattern
from llama4_jax.layers.attention import Attention, Positions
from llama4_jax.layers.feed_forward import MLP, ExpertStack, MoE, RouterOutput
from llama4_jax.layers.norm import RMSNorm


class Block(nnx.Module):
    """h = x + attention(norm(x)); y = h + ffn(norm(h))."""

    def __init__(self, config: TextConfig, kind: LayerKind, *, key: jax.Array, dtype: str):
        D, eps = config.embed_dim, config.norm_eps
        attention_key, ffn_key = jax.random.split(key)
        self.attention_norm = RMSNorm(D, eps=eps, dtype=dtype)
        self.attention = Attention(config, kind, key=attention_key, dtype=dtype)
        self.ffn_norm = RMSNorm(D, eps=eps, dtype=dtype)
        if kind.is_moe:
            self.ffn: MoE | MLP = MoE(config, key=ffn_key, dtype=dtype)
        else:
            self.ffn = MLP(
                D, config.mlp_dim, num_layers=config.num_layers, key=ffn_key, dtype=dtype
            )

    def __call__(
        self,
        x_BTD: jax.Array,
        at: Positions,
        cache: CacheView | None,
        stack: ExpertStack | None = None,
    ) -> tuple[jax.Array, LayerCache | None, RouterOutput | None]:
        """Returns y_BTD, the layer's new cache, and what the router did if there is one."""
        attended_BTD, stored = self.attention(self.attention_norm(x_BTD), at, cache)
        x_BTD = x_BTD + attended_BTD
        if isinstance(self.ffn, MoE):
            is_token_BT = None if at.order == "row" else at.positions_BT >= 0
            y_BTD, router = self.ffn(self.ffn_norm(x_BTD), is_token_BT=is_token_BT, stack=stack)
        else:
            y_BTD, router = self.ffn(self.ffn_norm(x_BTD)), None
        return x_BTD + y_BTD, stored, router


class Group(nnx.Module):
    """One run of the repeating layer pattern; each slot has its own parameter types."""

    def __init__(self, config: TextConfig, *, key: jax.Array, dtype: str):
        kinds = layer_pattern(config).slots
        keys = jax.random.split(key, len(kinds))
        self.slots = nnx.List(
            [Block(config, kind, key=k, dtype=dtype) for kind, k in zip(kinds, keys, strict=True)]
        )


def _expert_stack(ffn: MoE | MLP, group: jax.Array, dtype: jnp.dtype) -> ExpertStack | None:
    """Return stacked experts to read in place, for inference: their gradient would be a stack."""
    stack = ExpertStack(ffn.experts, group) if isinstance(ffn, MoE) else None
    return stack if stack and stack.is_ready(dtype) else None


class _Stream(NamedTuple):
    """What flows through the layers: the residual stream and, if there is one, the cache."""

    x_BTD: jax.Array
    slots: tuple[LayerCache, ...]


class Decoder(nnx.Module):
    """All layers: `groups` are stacked along a leading axis, `tail` are the ones left over."""

    def __init__(self, config: TextConfig, *, key: jax.Array, dtype: str):
        pattern = layer_pattern(config)
        groups_key, tail_key = jax.random.split(key)
        self.groups = jax.vmap(lambda k: Group(config, key=k, dtype=dtype))(
            jax.random.split(groups_key, pattern.num_groups)
        )
        tail_keys = jax.random.split(tail_key, max(len(pattern.tail), 1))
        self.tail = nnx.List(
            [
                Block(config, kind, key=k, dtype=dtype)
                for kind, k in zip(pattern.tail, tail_keys, strict=False)
            ]
        )
        self.num_groups = pattern.num_groups

    def __call__(
        self, x_BTD: jax.Array, at: Positions, cache: Cache | None, *, remat: bool
    ) -> tuple[jax.Array, Cache | None, RouterOutput | None]:
        """Apply every layer.

        Args:
            x_BTD: embeddings.
            at: where the tokens stand.
            cache: what earlier calls stored, or None.
            remat: recompute each group in the backward pass instead of storing its activations.

        Returns:
            y_BTD, the cache with x stored, and what the routers did, stacked in the order of the
            mixture layers (None if no layer is a mixture).
        """

        def group_step(
            stream: _Stream, xs: tuple[Group, jax.Array]
        ) -> tuple[_Stream, list[RouterOutput]]:
            group, index = xs
            x_BTD, slots, routers = stream.x_BTD, list(stream.slots), []
            for i, block in enumerate(group.slots):
                view = CacheView(slots[i], index, cache.lengths_B) if cache else None
                with jax.named_scope(f"slot_{i}"):
                    ffn = self.groups.slots[i].ffn
                    stack = _expert_stack(ffn, index, x_BTD.dtype) if cache else None
                    x_BTD, stored, router = block(x_BTD, at, view, stack)
                if stored is not None:
                    slots[i] = stored
                if router is not None:
                    routers.append(router)
            return _Stream(x_BTD, tuple(slots)), routers

        step = jax.checkpoint(group_step) if remat else group_step
        stream = _Stream(x_BTD, cache.slots if cache else ())
        stream, by_slot = jax.lax.scan(step, stream, (self.groups, jnp.arange(self.num_groups)))
        x_BTD, tail = stream.x_BTD, []
        groups = [itemgetter(g) for g in range(self.num_groups)]
        routers = [jax.tree.map(group, slot) for group in groups for slot in by_slot]
        for i, block in enumerate(self.tail):
            view = CacheView(cache.tail[i], jnp.int32(0), cache.lengths_B) if cache else None
            with jax.named_scope(f"tail_{i}"):
                alone = jax.tree.map(lambda x: x[None], block.ffn)  # a stack of one
                stack = _expert_stack(alone, jnp.int32(0), x_BTD.dtype) if cache else None
                x_BTD, stored, router = block(x_BTD, at, view, stack)
            if stored is not None:
                tail.append(stored)
            if router is not None:
                routers.append(router)
        together = jax.tree.map(lambda *a: jnp.stack(a), *routers) if routers else None
        if cache is None:
            return x_BTD, None, together
        lengths_B = jnp.maximum(cache.lengths_B, at.positions_BT.max(1) + 1)
        return x_BTD, Cache(stream.slots, tuple(tail), lengths_B), together
