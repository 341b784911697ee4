"""The TPU kernel of the gradient of experts' matrices: the sum of x^T dy over an expert's rows.

A step owns one expert and a tile of columns of its matrix, summed in float32 over blocks of rows.
The rows of x stay in VMEM while the tiles follow each other; if they fit into one block, x and dy
are read once and the matrix is written once. An expert without rows has a block without rows, which
writes zeros.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import backend
from kernels_pallas.experts.tpu_blocks import VMEM_LIMIT, BlockSizes, Table, fit, read_block
from kernels_pallas.tpu_primitives import dot, in_hbm

_PIECE = 512  # rows of the matrix that are summed at once


def outer_sizes(x: jax.Array, dy: jax.Array, num_rows: int, num_experts: int) -> BlockSizes | None:
    """Choose the sizes of the kernel, or None if none fit; see `tpu_blocks.fit`.

    Args:
        x, dy: its operands, of which only widths and dtypes matter.
        num_rows: of all experts together.
        num_experts: that a row may belong to.
    """
    K, M, dtype = x.shape[1], dy.shape[1], x.dtype

    def needed(block: int, tile: int) -> int:
        return 2 * block * (K + tile) * dtype.itemsize + K * tile * (4 + 2 * dtype.itemsize)

    return fit("backward_weights", needed, K, M, dtype, str(dtype), num_rows, num_experts)


class _Item(NamedTuple):
    """A step: a block of rows, and which of its expert's; a tile of columns."""

    number: Any
    block: Any
    column: Any


def _item(table: Any, at: Any, steps: int, unit: int) -> _Item:
    """Find step `at`: experts one after the other, in each its tiles, in each its blocks."""
    some = read_block(table, jax.lax.div(at, steps), unit)
    first = jax.lax.div(at, steps) - some.number
    local = at - first * steps
    column = jax.lax.div(local, some.count)
    number = first + local - column * some.count
    return _Item(number, read_block(table, number, unit), column)


def _kernel(sizes: BlockSizes, steps: int, K: int, is_transposed: bool):
    """Return the kernel for static sizes."""

    def kernel(_, table, x_hbm, dy_hbm, *flat):
        dw, x_buffer, dy_buffer, acc, x_slot_ref, x_arrived, dy_arrived = flat[-7:]
        c, at = pl.program_id(0), pl.program_id(1)
        item = _item(table, at, steps, sizes.unit)
        slot = jax.lax.rem(at, 2)

        def is_new(at):
            before = _item(table, jnp.maximum(at - 1, 0), steps, sizes.unit)
            return (at == 0) | (before.number != _item(table, at, steps, sizes.unit).number)

        def x_copy(item, slot):
            rows = pl.ds(item.block.start, item.block.rows)
            target = x_buffer.at[slot, pl.ds(0, item.block.rows)]
            return pltpu.make_async_copy(x_hbm.at[rows], target, x_arrived.at[slot])

        def dy_copy(item, slot):
            rows = pl.ds(item.block.start, item.block.rows)
            first = pl.multiple_of((c * steps + item.column) * sizes.tile, sizes.tile)
            target = dy_buffer.at[slot, pl.ds(0, item.block.rows)]
            source = dy_hbm.at[rows, pl.ds(first, sizes.tile)]
            return pltpu.make_async_copy(source, target, dy_arrived.at[slot])

        def start(at, x_slot):
            item = _item(table, at, steps, sizes.unit)

            @pl.when(item.block.rows > 0)
            def _():
                dy_copy(item, jax.lax.rem(at, 2)).start()
                pl.when(is_new(at))(lambda: x_copy(item, x_slot).start())

        def clear_rest(buffer, slot):
            """Zero the last chunk's rows that were not copied: they may hold anything."""
            rows, width = item.block.rows, buffer.shape[2]

            def clear(n, _):
                rest = pl.ds(pl.multiple_of(n * sizes.unit, sizes.unit), sizes.unit)
                buffer[slot, rest] = jnp.zeros((sizes.unit, width), buffer.dtype)

            begin, end = jax.lax.div(rows, sizes.unit), pl.cdiv(rows, sizes.chunk) * sizes.chunk
            jax.lax.fori_loop(begin, jax.lax.div(end, sizes.unit), clear, None)

        @pl.when(at == 0)
        def _():
            x_slot_ref[0] = 0
            start(at, 0)

        @pl.when((at > 0) & is_new(at))
        def _():
            x_slot_ref[0] = 1 - x_slot_ref[0]

        x_slot = x_slot_ref[0]
        pl.when(at + 1 < pl.num_programs(1))(lambda: start(at + 1, 1 - x_slot))

        @pl.when(item.block.rows > 0)
        def _():
            @pl.when(is_new(at))
            def _():
                x_copy(item, x_slot).wait()
                clear_rest(x_buffer, x_slot)

            dy_copy(item, slot).wait()
            clear_rest(dy_buffer, slot)

        @pl.when(item.block.number == 0)
        def _():
            acc[...] = jnp.zeros_like(acc)

        def add(n, _):
            rows = pl.ds(pl.multiple_of(n * sizes.chunk, sizes.chunk), sizes.chunk)
            dy = dy_buffer[slot, rows]
            size = math.gcd(K, _PIECE)
            for first in range(0, K, size):
                piece = pl.ds(first, size)
                x = x_buffer[x_slot, rows, piece]
                if is_transposed:
                    acc[:, piece] += dot(dy, x, (0, 0))
                else:
                    acc[piece] += dot(x, dy, (0, 0))

        jax.lax.fori_loop(0, pl.cdiv(item.block.rows, sizes.chunk), add, None)

        @pl.when(item.block.number == item.block.count - 1)
        def _():
            dw[...] = acc[...].astype(dw.dtype)

    return kernel


def grouped_outer_places(
    x_PK: jax.Array,
    dy_PM: jax.Array,
    table: Table,
    sizes: BlockSizes,
    *,
    first: jax.Array,
    num_experts: int,
    like: Any,
    is_transposed: bool,
    name: str,
    cost: pl.CostEstimate,
) -> jax.Array:
    """Sum x^T dy over the rows of each expert, or dy^T x.

    Args:
        x_PK: rows by place, of which a block is kept in VMEM.
        dy_PM: rows by place, of which tiles of columns follow each other. Of the two, one is zero
            in empty places and the other finite.
        table: the list of blocks, of sizes.block rows, with one for each expert at least.
        sizes: static sizes.
        first: number of expert 0's matrix.
        num_experts: E.
        like: the matrices [N, K, M], an array if some of them are no expert's; those are zero.
        is_transposed: whether the matrices are [N, M, K].
        name: of the kernel.
        cost: what it costs.

    Returns:
        dw_NKM, or dw_NMK, in the dtype of the matrices.
    """
    K, M = x_PK.shape[1], dy_PM.shape[1]
    steps = M // (sizes.tile * sizes.cores)
    others = [] if like.shape[0] == num_experts else [jnp.zeros_like(like)]
    operands = [in_hbm(array) for array in (x_PK, dy_PM, *others)]

    tile = (sizes.tile, K) if is_transposed else (K, sizes.tile)

    def place(c, at, first, table):
        item = _item(table, at, steps, sizes.unit)
        column = c * steps + item.column
        return first[0] + item.block.expert, *((column, 0) if is_transposed else (0, column))

    return pl.pallas_call(
        _kernel(sizes, steps, K, is_transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(sizes.cores, table.count * steps),
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)] * len(operands),
            out_specs=pl.BlockSpec((None, *tile), place),
            scratch_shapes=[
                pltpu.VMEM((2, sizes.block, K), x_PK.dtype),
                pltpu.VMEM((2, sizes.block, sizes.tile), dy_PM.dtype),
                pltpu.VMEM(tile, jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=backend.like(x_PK, like.shape, like.dtype),
        input_output_aliases={4: 0} if others else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=cost,
        interpret=backend.tpu_interpreter(),
        name=name,
    )(first.reshape(1), table.fields, *operands)
