"""What multiplies in the forward pass of attention on Hopper GPUs, wherever keys come from.

One block of threads serves 128 queries of one head: two warpgroups multiply, each for 64 queries,
while a third brings the keys and values that both read, some stages ahead. (Of a head of 256 one
warpgroup multiplies; see `gpu_blocks.multipliers`.) Softmax is online, in base 2, and its weights
go from registers straight into the second product. The two that multiply are kept half a step
apart, so that one computes weights while the other has the tensor cores.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention import gpu_blocks
from kernels_pallas.attention.gpu_blocks import (
    LN2,
    OF_COLUMNS,
    OF_ROWS,
    ROWS,
    accumulate,
    across,
    down,
    filled,
    load,
    product,
)
from kernels_pallas.attention.visibility import NEGATIVE


class Tiles(NamedTuple):
    """Shared memory, and the barriers that say who may use it.

    Attributes:
        q: [multipliers, 64, H].
        k, v: rings of [stages, kv_block, H].
        out: where outputs of another dtype than that of q are put together; else None.
        lse: [multipliers, 64].
        q_ready: a barrier for each warpgroup that multiplies.
        k_ready, v_ready: barriers of the rings' slots, for what fills them.
        k_free, v_free: the same, for those who have multiplied.
        turns: a barrier at which the two that multiply change turns; None if they do not.
    """

    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    turns: Any

    @staticmethod
    def types(
        head_dim: int,
        kv_block: int,
        stages: int,
        *,
        dtype: Any,
        out_dtype: Any,
        arrivals: int = 1,
        alternate: int = 1,
    ) -> "Tiles":
        """Return what to ask for.

        Args:
            head_dim: 64, 128 or 256.
            kv_block: keys of a block.
            stages: of the rings.
            dtype: of q, and of k and v as they are multiplied.
            out_dtype: of the output.
            arrivals: copies that fill a slot.
            alternate: whether two warpgroups take turns.
        """
        multipliers = gpu_blocks.multipliers(head_dim)
        ring = plgpu.SMEM((stages, kv_block, head_dim), dtype)
        ready = plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)
        free = plgpu.Barrier(num_arrivals=multipliers, num_barriers=stages)
        is_same = jnp.dtype(out_dtype) == jnp.dtype(dtype)
        return Tiles(
            q=plgpu.SMEM((multipliers, ROWS, head_dim), dtype),
            k=ring,
            v=ring,
            out=None if is_same else plgpu.SMEM((multipliers, ROWS, 32), out_dtype),
            lse=plgpu.SMEM((multipliers, ROWS), jnp.float32),
            q_ready=plgpu.Barrier(num_barriers=multipliers),
            k_ready=ready,
            v_ready=ready,
            k_free=free,
            v_free=free,
            turns=plgpu.Barrier(num_arrivals=2) if alternate and multipliers > 1 else None,
        )


class Keys(NamedTuple):
    """What a block of queries has to know of the keys.

    Attributes:
        walk: (step, carry) -> (turns, carry), see `gpu_blocks.walk`.
        is_whole: of a block, whether all of it is seen by all.
        mask: puts -inf where a key of a block is not seen: (block, products) -> products.
        scales: vectors of factors on the keys and on the values of a block, or None.
    """

    walk: Callable[..., Any]
    is_whole: Callable[[jax.Array], jax.Array]
    mask: Callable[[jax.Array, jax.Array], jax.Array]
    scales: Callable[[jax.Array], tuple[Any, Any]] = lambda block: (None, None)


def multiply(
    t: Tiles,
    keys: Keys,
    refs: tuple[Any, Any, Any],
    at: tuple[Any, Any, Any],
    group: Any,
    factor: Callable[[], jax.Array],
) -> None:
    """Attend for 64 queries of a head, and write what comes of it.

    Args:
        t: the tiles; what `walk` visits comes into their rings in the same order.
        keys: of the row.
        refs: q_BTNH, out_BTNH and lse_BNT in global memory.
        at: the row, the queries and the head.
        group: the number of this warpgroup.
        factor: returns what the products of each query are multiplied by to give logits to base 2.
    """
    (q, out, lse), (b, tokens, n) = refs, at
    H, stages = q.shape[3], t.k.shape[0]

    def pass_turn() -> None:
        """Let the other warpgroup have the tensor cores, and wait until it has done the same."""
        if t.turns is not None:
            plgpu.barrier_arrive(t.turns)
            plgpu.barrier_wait(t.turns)

    plgpu.copy_gmem_to_smem(q.at[b, tokens, n], t.q.at[group], t.q_ready.at[group])
    factor_T = factor()
    plgpu.barrier_wait(t.q_ready.at[group])

    def step(turn: jax.Array, j: jax.Array, carry: Any) -> Any:
        acc, m, total = carry
        slot = jax.lax.rem(turn, jnp.int32(stages))
        of_k, of_v = keys.scales(j)
        plgpu.barrier_wait(t.k_ready.at[slot])
        s = product((t.q.at[group], t.k.at[slot]), meanwhile=pass_turn)
        plgpu.barrier_arrive(t.k_free.at[slot])
        if of_k is not None:
            s *= down(load(of_k, OF_COLUMNS), s.shape)
        s = jax.lax.cond(keys.is_whole(j), lambda s: s, lambda s: keys.mask(j, s), s)
        m_new = jnp.maximum(m, s.max(axis=1) * factor_T)
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(s * across(factor_T, s.shape) - across(m_new, s.shape))
        total = total * alpha + p.sum(axis=1)
        if of_v is not None:
            p *= down(load(of_v, OF_COLUMNS), p.shape)
        p = p.astype(t.v.dtype)
        acc *= across(alpha, acc.shape)
        if t.turns is not None:  # the weights are made while the other one multiplies
            acc, total, p = jax.lax.optimization_barrier((acc, total, p))
            plgpu.barrier_arrive(t.turns)
        plgpu.barrier_wait(t.v_ready.at[slot])
        if t.turns is not None:
            plgpu.barrier_wait(t.turns)
        acc = accumulate(acc, p, t.v.at[slot])
        plgpu.barrier_arrive(t.v_free.at[slot])
        return acc, m_new, total

    start = (
        filled(0, (ROWS, H), plgpu.Layout.WGMMA),
        filled(NEGATIVE, (ROWS,), OF_ROWS),
        filled(0, (ROWS,), OF_ROWS),
    )
    pl.when(group == 1)(pass_turn)  # half a step behind the first
    _, (acc, m, total) = keys.walk(step, start)
    pl.when(group == 0)(pass_turn)
    acc *= across(jnp.where(total > 0, 1 / total, 0.0), acc.shape)
    t.lse.at[group][...] = jnp.where(total > 0, (m + jnp.log2(total)) * LN2, NEGATIVE)
    acc = acc.astype(out.dtype)
    staging = (t.q if t.out is None else t.out).at[group]
    width = staging.shape[1]
    for c in range(0, H, width):
        staging[...] = acc[:, c : c + width]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, out.at[b, tokens, n, pl.ds(c, width)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.copy_smem_to_gmem(t.lse.at[group], lse.at[b, n, tokens])
    plgpu.wait_smem_to_gmem(0)
