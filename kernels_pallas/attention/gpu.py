"""Attention on Hopper GPUs: wgmma on tiles that TMA brings, blocks that cannot meet left out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import tuning
from kernels_pallas.attention import gpu_backward, gpu_blocks, gpu_forward
from kernels_pallas.attention.gpu_blocks import (
    OF_ROWS,
    ROWS,
    Stream,
    load,
    mask,
)
from kernels_pallas.attention.gpu_forward import Tiles
from kernels_pallas.attention.visibility import (
    Inputs,
    QueryBlocks,
    Settings,
    may_see,
    sees_all,
)

unsupported_reason = gpu_blocks.unsupported_reason
backward = gpu_backward.backward


def _attend(
    *refs: Any, how: Settings, segmented: bool, kv_block: int, stages: int, alternate: int
) -> None:
    del stages, alternate
    (q, k, v, rows, columns, q_table, kv_table, out, lse), t = refs[:9], Tiles(*refs[9:])
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

        keys = Stream(of(k, t.k), t.k_ready, t.k_free)
        values = Stream(of(v, t.v), t.v_ready, t.v_free)

        def fetch(turn: jax.Array, j: jax.Array, _: None) -> None:
            keys.fetch(turn, j)
            values.fetch(turn, j)

        turns, _ = walk(fetch, None)
        keys.drain(turns)
        values.drain(turns)

    def multiply() -> None:
        gpu_blocks.set_registers(True, H)
        tokens = pl.ds((i * multipliers + group) * ROWS, ROWS)

        def masked(j: jax.Array, s: jax.Array) -> jax.Array:
            keys = pl.ds(j * kv_block, kv_block)
            return mask(s, rows.at[b, :, tokens], columns.at[b, :, keys], segmented)

        def is_whole(j: jax.Array) -> jax.Array:
            return sees_all(queries(), gpu_blocks.key_block(kv_table, b, j))

        gpu_forward.multiply(
            t,
            gpu_forward.Keys(walk, is_whole, masked),
            (q, out, lse),
            (b, tokens, n),
            group,
            lambda: gpu_blocks.row_factors(load(rows.at[b, 1, tokens], OF_ROWS), how),
        )

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
    q_block = ROWS * multipliers
    padded = gpu_blocks.padded(x, q_block, kv_block)
    q, k, v, *_ = padded
    v = gpu_blocks.without_padding(v, padded.kv_positions_BS)
    _, length, _, H = q.shape
    kernel = gpu_blocks.kernel(
        functools.partial(_attend, how=how, segmented=x.q_segments_BT is not None, **sizes),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, out_dtype),
            jax.ShapeDtypeStruct((B, N, length), jnp.float32),
        ),
        scratch_types=Tiles.types(
            *(H, kv_block, stages),
            dtype=dtype,
            out_dtype=out_dtype,
            alternate=sizes["alternate"],
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
