"""Attention on Hopper GPUs: wgmma on tiles that TMA brings, blocks that cannot meet left out.

One block of threads serves 128 queries of one head: two warpgroups multiply, each for 64 queries,
while a third copies the keys and values that both read, some stages ahead. (Of a head of 256 one
warpgroup multiplies; see `gpu_blocks.multipliers`.) Softmax is online, in
base 2, and its weights go from registers straight into the second product. The two that multiply
are kept half a step apart, so that one computes weights while the other has the tensor cores.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import tuning
from kernels_pallas.attention import gpu_backward, gpu_blocks
from kernels_pallas.attention.gpu_blocks import (
    LN2,
    OF_ROWS,
    ROWS,
    Stream,
    accumulate,
    across,
    filled,
    load,
    mask,
    product,
)
from kernels_pallas.attention.visibility import (
    NEGATIVE,
    Inputs,
    QueryBlocks,
    Settings,
    may_see,
    sees_all,
)

refusal = gpu_blocks.refusal
backward = gpu_backward.backward


def _attend(
    *refs: Any, how: Settings, segmented: bool, kv_block: int, stages: int, alternate: int
) -> None:
    (q, k, v, rows, columns, q_table, kv_table, out, lse), scratch = refs[:9], refs[9:]
    (q_smem, k_smem, v_smem, out_smem, lse_smem), barriers = scratch[:5], scratch[5:]
    q_ready, k_ready, v_ready, k_free, v_free, *turns = barriers
    turns_taken = turns[0] if alternate else None
    b, n = jax.lax.axis_index("batch"), jax.lax.axis_index("head")
    i = q_table.shape[1] - 1 - jax.lax.axis_index("block")  # the longest of causal rows first
    group = jax.lax.axis_index("warpgroup")
    kv_head = n // (q.shape[2] // k.shape[2])
    H = q.shape[3]
    multipliers = gpu_blocks.multipliers(H)

    def queries() -> QueryBlocks:
        return gpu_blocks.query_block(q_table, b, i)

    def walk(step: Any, carry: Any) -> Any:
        def meets(j: jax.Array) -> jax.Array:
            return may_see(queries(), gpu_blocks.key_block(kv_table, b, j))

        begin, end = queries().begin, queries().end
        return gpu_blocks.walk(begin, end, meets, step, carry)

    def copy() -> None:
        gpu_blocks.set_registers(False, H)

        def of(ref: Any, smem: Any) -> Any:
            def copies(j: jax.Array, slot: jax.Array) -> Any:
                tokens = pl.ds(j * kv_block, kv_block)
                return [(ref.at[b, tokens, kv_head], smem.at[slot])]

            return copies

        keys = Stream(of(k, k_smem), k_ready, k_free)
        values = Stream(of(v, v_smem), v_ready, v_free)

        def fetch(turn: jax.Array, j: jax.Array, _: None) -> None:
            keys.fetch(turn, j)
            values.fetch(turn, j)

        turns, _ = walk(fetch, None)
        keys.drain(turns)
        values.drain(turns)

    def pass_turn() -> None:
        """Let the other warpgroup have the tensor cores, and wait until it has done the same."""
        if turns_taken is not None:
            plgpu.barrier_arrive(turns_taken)
            plgpu.barrier_wait(turns_taken)

    def multiply() -> None:
        gpu_blocks.set_registers(True, H)
        tokens = pl.ds((i * multipliers + group) * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(q.at[b, tokens, n], q_smem.at[group], q_ready.at[group])
        factor = gpu_blocks.row_factors(load(rows.at[b, 1, tokens], OF_ROWS), how)
        plgpu.barrier_wait(q_ready.at[group])

        def masked(j: jax.Array, s: jax.Array) -> jax.Array:
            keys = pl.ds(j * kv_block, kv_block)
            return mask(s, rows.at[b, :, tokens], columns.at[b, :, keys], segmented)

        def step(turn: jax.Array, j: jax.Array, carry: Any) -> Any:
            acc, m, total = carry
            slot = jax.lax.rem(turn, jnp.int32(stages))
            plgpu.barrier_wait(k_ready.at[slot])
            s = product((q_smem.at[group], k_smem.at[slot]), meanwhile=pass_turn)
            plgpu.barrier_arrive(k_free.at[slot])
            is_whole = sees_all(queries(), gpu_blocks.key_block(kv_table, b, j))
            s = jax.lax.cond(is_whole, lambda s: s, functools.partial(masked, j), s)
            m_new = jnp.maximum(m, s.max(axis=1) * factor)
            alpha = jnp.exp2(m - m_new)
            p = jnp.exp2(s * across(factor, s.shape) - across(m_new, s.shape))
            total = total * alpha + p.sum(axis=1)
            p = p.astype(v.dtype)
            acc *= across(alpha, acc.shape)
            if turns_taken is not None:  # the weights are made while the other one multiplies
                acc, total, p = jax.lax.optimization_barrier((acc, total, p))
                plgpu.barrier_arrive(turns_taken)
            plgpu.barrier_wait(v_ready.at[slot])
            if turns_taken is not None:
                plgpu.barrier_wait(turns_taken)
            acc = accumulate(acc, p, v_smem.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, m_new, total

        start = (
            filled(0, (ROWS, H), plgpu.Layout.WGMMA),
            filled(NEGATIVE, (ROWS,), OF_ROWS),
            filled(0, (ROWS,), OF_ROWS),
        )
        pl.when(group == 1)(pass_turn)  # half a step behind the first
        _, (acc, m, total) = walk(step, start)
        pl.when(group == 0)(pass_turn)
        acc *= across(jnp.where(total > 0, 1 / total, 0.0), acc.shape)
        lse_smem.at[group][...] = jnp.where(total > 0, (m + jnp.log2(total)) * LN2, NEGATIVE)
        acc = acc.astype(out.dtype)
        staging = (q_smem if out_smem is None else out_smem).at[group]
        width = staging.shape[1]
        for c in range(0, H, width):
            staging[...] = acc[:, c : c + width]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staging, out.at[b, tokens, n, pl.ds(c, width)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.copy_smem_to_gmem(lse_smem.at[group], lse.at[b, n, tokens])
        plgpu.wait_smem_to_gmem(0)

    pl.when(group < multipliers)(multiply)
    pl.when(group == multipliers)(copy)


def forward(x: Inputs, how: Settings, *, out_dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Attend; see `api.chunked_attention`.

    Returns:
        (out_BTNH in out_dtype, lse_BTN float32)
    """
    B, T, N, head_dim = x.q_BTNH.shape
    dtype = x.q_BTNH.dtype
    multipliers = gpu_blocks.multipliers(head_dim)
    default = {"kv_block": 128 if head_dim <= 128 else 64, "stages": 2, "alternate": 1}
    sizes = tuning.lookup("chunked_attention.forward", default, head_dim=head_dim, dtype=dtype.name)
    kv_block, stages = sizes["kv_block"], sizes["stages"]
    sizes["alternate"] *= multipliers > 1
    q_block = ROWS * multipliers
    padded = gpu_blocks.padded(x, q_block, kv_block)
    q, k, v, *_ = padded
    v = gpu_blocks.without_padding(v, padded.kv_positions_BS)
    _, length, _, H = q.shape
    is_same = jnp.dtype(out_dtype) == dtype
    ready = plgpu.Barrier(num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=multipliers, num_barriers=stages)
    kernel = gpu_blocks.kernel(
        functools.partial(_attend, how=how, segmented=x.q_segments_BT is not None, **sizes),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, out_dtype),
            jax.ShapeDtypeStruct((B, N, length), jnp.float32),
        ),
        scratch_types=(
            plgpu.SMEM((multipliers, ROWS, H), dtype),
            plgpu.SMEM((stages, kv_block, H), dtype),
            plgpu.SMEM((stages, kv_block, H), dtype),
            None if is_same else plgpu.SMEM((multipliers, ROWS, 32), out_dtype),
            plgpu.SMEM((multipliers, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=multipliers),
            *(ready, ready, free, free),
            *[plgpu.Barrier(num_arrivals=multipliers)] * sizes["alternate"],
        ),
        grid=(B, N, length // q_block),
        name="chunked_attention",
        warpgroups=multipliers + 1,
        cost=gpu_blocks.cost(x, how, products=2, block=q_block),
    )
    out_BTNH, lse_BNT = kernel(
        *(q, k, v),
        *gpu_blocks.describe(padded, how),
        *gpu_blocks.tables(padded, how, q_block, kv_block),
    )
    return out_BTNH[:, :T, :, :head_dim], lse_BNT[:, :, :T].swapaxes(1, 2)
