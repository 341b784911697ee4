"""The TPU kernel that takes sorted rows through their experts' matrices.

A program owns a block of rows of one expert, up to about a thousand, and keeps them in VMEM while
the expert's matrices stream past in tiles of columns: each is read once if the expert's rows fit
into a block. The rows of the next block arrive meanwhile. What is done to the products (SwiGLU, its
derivative) is an epilogue in float32.

All rows go through the same chunk of code, of a fixed number of rows: what becomes of a row cannot
depend on where it stands. A chunk has as many rows as keep the multiplier busy while the next
weights are shifted in; fewer would take the same time. Where a device is two cores, each takes
half of the columns, so both work at one token and whatever the balance of the experts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import backend
from kernels_pallas.experts import tpu_stored
from kernels_pallas.experts.dispatch import Block
from kernels_pallas.experts.inputs import expected_rows
from kernels_pallas.experts.tpu_blocks import VMEM_LIMIT, BlockSizes, Table, fit, read_block
from kernels_pallas.tpu_primitives import dot, in_hbm, start, transfers, wait

Epilogue = Callable[[list[jax.Array], jax.Array | None, list[jax.Array]], Sequence[jax.Array]]


class Matrices(NamedTuple):
    """Matrices that rows are multiplied by, and how.

    Attributes:
        weights: one or two arrays [N, K, M], [N, M, K] if transposed, [N, K / 2, M] if int4.
        scales: float32 [N, M], or [N, K / 128, M] if int4; None for floats.
        is_transposed: whether columns of the product are rows of a matrix.
        stored: how they are stored. Rows are rounded to float8s too where these are.
        first: number of expert 0's matrices.
    """

    weights: Sequence[jax.Array]
    scales: Sequence[jax.Array] | None
    is_transposed: bool
    stored: str
    first: jax.Array

    @property
    def depth(self) -> int:
        """Return K."""
        stored = self.weights[0].shape[2 if self.is_transposed else 1]
        return 2 * stored if self.stored == "int4" else stored

    @property
    def width(self) -> int:
        """Return M."""
        return self.weights[0].shape[1 if self.is_transposed else 2]


class RowOperands(NamedTuple):
    """Arrays by place.

    Attributes:
        left: one or two [P, K], which are multiplied.
        column: float32 [P, 128], a number for each row, or None.
        tiles: of [P, M], which the epilogue takes along with the products.
    """

    left: Sequence[jax.Array]
    column: jax.Array | None = None
    tiles: Sequence[jax.Array] = ()

    def resident(self) -> list[jax.Array]:
        """Return what is kept in VMEM for a block."""
        return [*self.left, *([] if self.column is None else [self.column])]


def row_sizes(
    operation: str, rows: RowOperands, by: Matrices, outs: list, num_rows: int, num_experts: int
) -> BlockSizes | None:
    """Choose the sizes of a kernel, or None if none fit; see `tpu_blocks.fit`.

    Args:
        operation: under which sizes are looked up.
        rows, by: its operands; of rows only widths and dtypes matter.
        outs: dtypes of its results.
        num_rows: of all experts together.
        num_experts: that a row may belong to.
    """
    resident = sum(a.shape[1] * a.dtype.itemsize for a in rows.resident())
    resident += 2 * tpu_stored.beside_width(by.stored, by.depth)
    tiles = sum(a.dtype.itemsize for a in rows.tiles) + sum(jnp.dtype(d).itemsize for d in outs)
    _, *sides = by.weights[0].shape
    column = math.prod(sides) * by.weights[0].dtype.itemsize // by.width * 2
    column += 0 if by.scales is None else 2 * by.depth

    def needed(block: int, tile: int) -> int:
        return 2 * block * (resident + tiles * tile) + len(by.weights) * column * tile

    dtype, stored = rows.left[0].dtype, str(by.weights[0].dtype)
    return fit(operation, needed, by.depth, by.width, dtype, stored, num_rows, num_experts)


def row_cost(
    rows: RowOperands, by: Matrices, outs: list, num_rows: int, num_experts: int, cores: int
) -> pl.CostEstimate:
    """Estimate a kernel: weights of the experts that are hit once, rows once for each core."""
    pairs, num_rows = len(by.weights), expected_rows(num_rows)
    entries = by.depth * by.width * by.weights[0].dtype.itemsize
    if by.stored == "int4":
        entries //= 2
    scales = sum(4 * math.prod(s.shape[1:]) for s in by.scales or ())
    resident = sum(a.shape[1] * a.dtype.itemsize for a in rows.resident()) * cores
    tiles = sum(a.dtype.itemsize for a in rows.tiles) + sum(jnp.dtype(d).itemsize for d in outs)
    hit = min(num_experts, num_rows)
    return pl.CostEstimate(
        flops=2 * num_rows * by.depth * by.width * pairs,
        transcendentals=num_rows * by.width if pairs > 1 else 0,
        bytes_accessed=hit * (pairs * entries + scales) + num_rows * (resident + by.width * tiles),
    )


class _Given(NamedTuple):
    """What the kernel reads: see `RowOperands` and `Matrices`."""

    resident: list[Any]
    tiles: list[Any]
    weights: list[Any]
    scales: list[Any]


class _Scratch(NamedTuple):
    """Two buffers for each array of rows, widened tiles, numbers of rows, and semaphores."""

    resident: list[Any]
    tiles: list[Any]
    outs: list[Any]
    wide: list[Any]
    beside: list[Any]
    resident_arrived: Any
    tiles_arrived: Any
    outs_left: Any


class _Copies(NamedTuple):
    """The copies of one core: of blocks, and of tiles of their columns by number of the step."""

    table: Any
    given: _Given
    outs: list[Any]
    scratch: _Scratch
    sizes: BlockSizes
    steps: int

    def resident(self, i: jax.Array) -> list[Any]:
        """Return those of block i."""
        block, slot = read_block(self.table, i, self.sizes.unit), jax.lax.rem(i, 2)
        sources = [a.at[pl.ds(block.start, block.rows)] for a in self.given.resident]
        targets = [b.at[slot, pl.ds(0, block.rows)] for b in self.scratch.resident]
        return transfers(sources, targets, self.scratch.resident_arrived, slot)

    def _tile(self, at: jax.Array, arrays: list[Any], buffers: list[Any]) -> tuple[list, list]:
        block = read_block(self.table, jax.lax.div(at, self.steps), self.sizes.unit)
        step = pl.program_id(0) * self.steps + jax.lax.rem(at, self.steps)
        columns = pl.ds(pl.multiple_of(step * self.sizes.tile, self.sizes.tile), self.sizes.tile)
        in_memory = [a.at[pl.ds(block.start, block.rows), columns] for a in arrays]
        return in_memory, [b.at[jax.lax.rem(at, 2), pl.ds(0, block.rows)] for b in buffers]

    def tiles(self, at: jax.Array) -> list[Any]:
        """Return those of the tiles that a step reads."""
        sources, targets = self._tile(at, self.given.tiles, self.scratch.tiles)
        return transfers(sources, targets, self.scratch.tiles_arrived, jax.lax.rem(at, 2))

    def results(self, at: jax.Array) -> list[Any]:
        """Return those of the tiles that a step writes."""
        targets, sources = self._tile(at, self.outs, self.scratch.outs)
        return transfers(sources, targets, self.scratch.outs_left, jax.lax.rem(at, 2))


def _stored_tiles(weights: list[Any], wide: list[Any], by: Matrices) -> list[Callable]:
    """Return what gives parts of each tile, widened: now, if they are kept, or when asked for."""
    if not wide:
        return [lambda part, w=w: tpu_stored.widened(w, part, by.stored) for w in weights]
    found = []
    for w_ref, wide_ref in zip(weights, wide, strict=True):
        words = None
        for part in tpu_stored.parts(by.stored, by.depth, is_wide=False):
            wide_ref[part], more = tpu_stored.widened(w_ref, part, by.stored)
            words = more if words is None or more is None else words | more
        found.append(
            lambda part, ref=wide_ref, words=words: (ref[part], words if part.start == 0 else None)
        )
    return found


def _kernel(by: Matrices, sizes: BlockSizes, steps: int, num_left: int, epilogue: Epilogue):
    """Return the kernel for static sizes."""

    def kernel(_, table: Any, given: _Given, *outs_and_scratch: Any) -> None:
        *outs, scratch = outs_and_scratch
        i, j, number = pl.program_id(1), pl.program_id(2), pl.num_programs(1)
        at = i * steps + j
        copies = _Copies(table, given, outs, scratch, sizes, steps)
        block = read_block(table, i, sizes.unit)
        slot, block_slot = jax.lax.rem(at, 2), jax.lax.rem(i, 2)

        @pl.when(j == 0)
        def _():
            pl.when(i == 0)(lambda: start(copies.resident(i)))
            wait(copies.resident(i))
            pl.when(i + 1 < number)(lambda: start(copies.resident(i + 1)))
            if by.stored != "float":
                left, chunks = scratch.resident[0].at[block_slot], pl.cdiv(block.rows, sizes.chunk)
                tpu_stored.make_ready(left, scratch.beside[0], chunks, sizes.chunk, by.stored)

        pl.when(at == 0)(lambda: start(copies.tiles(at)))
        wait(copies.tiles(at))
        pl.when(at + 1 < number * steps)(lambda: start(copies.tiles(at + 1)))
        pl.when(at >= 2)(lambda: wait(copies.results(at - 2)))

        tiles_of = _stored_tiles(given.weights, scratch.wide, by)

        def multiply(x: jax.Array, n: int, rows: Any) -> jax.Array:
            if by.stored == "float":
                return dot(x, given.weights[n][...], (1, 1 if by.is_transposed else 0))
            beside, scale = scratch.beside[0][rows], given.scales[n]
            is_wide = bool(scratch.wide)
            return tpu_stored.multiply(x, tiles_of[n], scale, beside, by.stored, is_wide=is_wide)

        def compute(n: Any, _: None) -> None:
            rows = pl.ds(pl.multiple_of(n * sizes.chunk, sizes.chunk), sizes.chunk)
            read = [buffer[block_slot, rows] for buffer in scratch.resident]
            left = read[:num_left] * (len(given.weights) // num_left)
            products = [multiply(x, n, rows) for n, x in enumerate(left)]
            column = read[num_left][:, :1] if len(read) > num_left else None
            tiles = [buffer[slot, rows].astype(jnp.float32) for buffer in scratch.tiles]
            results = epilogue(products, column, tiles)
            for buffer, result in zip(scratch.outs, results, strict=True):
                buffer[slot, rows] = result.astype(buffer.dtype)

        if sizes.block == sizes.chunk:
            compute(0, None)
        else:
            jax.lax.fori_loop(0, pl.cdiv(block.rows, sizes.chunk), compute, None)
        start(copies.results(at))

        @pl.when(at == number * steps - 1)
        def _():
            pl.when(at > 0)(lambda: wait(copies.results(at - 1)))
            wait(copies.results(at))

    return kernel


def grouped_rows(
    rows: RowOperands,
    by: Matrices,
    table: Table,
    sizes: BlockSizes,
    epilogue: Epilogue,
    out_dtypes: Sequence[Any],
    *,
    name: str,
    cost: pl.CostEstimate,
) -> list[jax.Array]:
    """Multiply each row by its expert's matrices, and apply the epilogue.

    Args:
        rows: the arrays by place. With two matrices and one left array, both take that one.
        by: the matrices.
        table: the list of blocks, of sizes.block rows.
        sizes: static sizes.
        epilogue: from the float32 products of a chunk, its column [chunk, 1] and its tiles, the
            outputs.
        out_dtypes: of the outputs.
        name: of the kernel.
        cost: what it costs.

    Returns:
        Arrays [P, M]. Places beyond the blocks keep what they held.
    """
    steps = by.width // (sizes.tile * sizes.cores)
    scales = [s if s.ndim == 3 else s[:, None] for s in by.scales or ()]
    given = _Given(rows.resident(), list(rows.tiles), list(by.weights), scales)
    given = jax.tree.map(in_hbm, given)
    # A single chunk widens on the way; several do it once before.
    is_wide = by.stored != "float" and sizes.block > sizes.chunk
    whole = pl.BlockSpec(memory_space=pltpu.HBM)
    wide, beside = tpu_stored.wide_dtype(by.stored), tpu_stored.beside_width(by.stored, by.depth)

    def tile_spec(array: jax.Array) -> pl.BlockSpec:
        _, lines, columns = array.shape
        shape = (sizes.tile, columns) if by.is_transposed else (lines, sizes.tile)

        def place(c: Any, i: Any, j: Any, first: Any, table: Any) -> tuple[Any, Any, Any]:
            expert, column = first[0] + table[len(Block._fields) * i], c * steps + j
            return (expert, column, 0) if by.is_transposed else (expert, 0, column)

        return pl.BlockSpec((None, *shape), place)

    def buffers(arrays: Sequence[Any], *width: int) -> list[Any]:
        return [pltpu.VMEM((2, sizes.block, *(width or a.shape[1:])), a.dtype) for a in arrays]

    semaphore = pltpu.SemaphoreType.DMA
    outs = [backend.like(rows.left[0], (rows.left[0].shape[0], by.width), d) for d in out_dtypes]
    scratch = _Scratch(
        buffers(given.resident),
        buffers(given.tiles, sizes.tile),
        buffers(outs, sizes.tile),
        [pltpu.VMEM((by.depth, sizes.tile), wide)] * (len(by.weights) * is_wide),
        [pltpu.VMEM((sizes.block, beside), jnp.float32)] * (by.stored != "float"),
        *(semaphore((max(len(arrays), 1), 2)) for arrays in (given.resident, given.tiles, outs)),
    )
    return pl.pallas_call(
        _kernel(by, sizes, steps, len(rows.left), epilogue),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(sizes.cores, table.count, steps),
            in_specs=[
                _Given(
                    [whole] * len(given.resident),
                    [whole] * len(given.tiles),
                    [tile_spec(w) for w in given.weights],
                    [tile_spec(scale) for scale in given.scales],
                )
            ],
            out_specs=[whole] * len(outs),
            scratch_shapes=[scratch],
        ),
        out_shape=outs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=cost,
        interpret=backend.tpu_interpreter(),
        name=name,
    )(by.first.reshape(1), table.fields, given)
