"""The online softmax of the TPU's attention kernels, over blocks of keys that are in VMEM."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import tpu_blocks as tb
from kernels_pallas.attention.visibility import NEGATIVE
from kernels_pallas.tpu_primitives import LANES, dot


class Softmax(NamedTuple):
    """The running softmax of a block of queries; references to VMEM.

    Attributes:
        acc: [G, bq, H] values times their weights.
        top: [G, bq, 128] largest logit so far, in base 2; alike in all lanes.
        total: [G, bq, 128] sums of weights, apart in each lane.
    """

    acc: Any
    top: Any
    total: Any

    @staticmethod
    def scratch(G: int, bq: int, H: int) -> "Softmax":
        """Return what to ask VMEM for."""
        row = pltpu.VMEM((G, bq, LANES), jnp.float32)
        return Softmax(pltpu.VMEM((G, bq, H), jnp.float32), row, row)

    def clear(self) -> None:
        """Begin with no keys."""
        self.acc[...] = jnp.zeros_like(self.acc)
        self.total[...] = jnp.zeros_like(self.total)
        self.top[...] = jnp.full_like(self.top, NEGATIVE)

    def add(
        self,
        q_ref: Any,
        k_ref: Any,
        v_ref: Any,
        *,
        factor: Callable[[], jax.Array | float],
        mask: jax.Array | None = None,
        k_scale: jax.Array | None = None,
        v_scale: jax.Array | None = None,
    ) -> None:
        """See a block of keys.

        Args:
            q_ref: [G, bq, H].
            k_ref, v_ref: [bkv, H].
            factor: returns what is on the products, to logits in base 2; [bq, bkv] or a number.
            mask: [bq, bkv] of what is seen; None is all.
            k_scale, v_scale: [1, bkv] finite factors on keys and values.
        """
        bkv, (G, _, H) = k_ref.shape[0], self.acc.shape

        def begin(g: Any) -> jax.Array:
            logits = dot(q_ref[g], k_ref[...], (1, 1)) * factor()
            if k_scale is not None:
                logits *= k_scale
            return logits if mask is None else jnp.where(mask, logits, tb.HIDDEN)

        def finish(g: Any, logits: jax.Array) -> None:
            new_top = jnp.maximum(self.top[g], logits.max(1, keepdims=True))
            weights = jnp.exp2(logits - tb.wide(new_top, bkv))
            shrink = jnp.exp2(self.top[g] - new_top)
            lanes = [weights[:, n : n + LANES] for n in range(0, bkv, LANES)]
            self.total[g] = self.total[g] * shrink + sum(lanes[1:], lanes[0])
            if v_scale is not None:
                weights *= v_scale
            seen = dot(weights.astype(v_ref.dtype), v_ref[...], (1, 0))
            self.acc[g] = self.acc[g] * tb.wide(shrink, H) + seen
            self.top[g] = new_top

        tb.heads_ahead(G, begin, finish)

    def write(self, out_ref: Any, lse_ref: Any) -> None:
        """Write outputs [G, bq, H] and log-sum-exps [G, bq]; see `api.chunked_attention`."""

        def finish(g: Any) -> None:
            total = self.total[g].sum(1, keepdims=True)
            is_seen = total > 0
            out_ref[g] = (self.acc[g] * jnp.where(is_seen, 1.0 / total, 0.0)).astype(out_ref.dtype)
            lse = jnp.where(is_seen, self.top[g] * tb.LN_2 + jnp.log(total), NEGATIVE)
            lse_ref[pl.ds(g, 1)] = lse.T[:1]

        tb.heads(self.acc.shape[0], finish)
