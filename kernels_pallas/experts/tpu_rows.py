"""The TPU kernel that takes sorted rows through their experts' matrices.

A program owns a block of rows of one expert, up to a window of about a thousand, and keeps them in
VMEM while the expert's matrices stream past in tiles of columns: each is read once if the expert's
rows fit into a window. The rows of the next block arrive meanwhile. What is done to the products
(SwiGLU, its derivative) is an epilogue in float32.

All rows go through the same chunk of code, of a fixed number of rows: what becomes of a row cannot
depend on where it stands. A chunk has as many rows as keep the multiplier busy while the next
weights are shifted in; fewer would take the same time. Where a device is two cores, each takes
half of the columns, so both work at one token and whatever the balance of the experts.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import backend, chips
from kernels_pallas.experts.dispatch import Block, Blocks
from kernels_pallas.experts.inputs import INT4_GROUP
from kernels_pallas.experts.quantize import FP8_MAX, ROW_MAX
from kernels_pallas.tpu_primitives import LANES, dot

VMEM_LIMIT = chips.LEAST_VMEM - 12 * 2**20  # the compiler has the rest
VMEM_BUDGET = VMEM_LIMIT - 8 * 2**20  # for buffers; the rest for the products of a chunk
TILES = (512, 256, 128)
SCALARS_BUDGET = chips.TPU7X.smem // 2  # every TPU has as much SMEM


class Table(NamedTuple):
    """The blocks that a kernel walks over: the fields of each in turn, and how many they are."""

    fields: jax.Array
    count: jax.Array

    @staticmethod
    def of(blocks: Blocks, least: int = 1) -> "Table":
        """Lay a list out for SMEM: a block at least, of so many rows, if only empty places."""
        fields = blocks.fields._replace(rows=jnp.maximum(blocks.fields.rows, least))
        return Table(jnp.stack(fields, axis=1).reshape(-1), jnp.maximum(blocks.total, 1))


def read_block(table: Any, i: jax.Array, unit: int) -> Block:
    """Read entry i of a table in SMEM; its rows are rounded up to whole tiles of memory."""
    block = Block(*(table[len(Block._fields) * i + n] for n in range(len(Block._fields))))
    rows = jax.lax.div(block.rows + (unit - 1), unit) * unit
    start = pl.multiple_of(block.start, unit)
    return block._replace(start=start, rows=pl.multiple_of(rows, unit))


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
        return self.weights[0].shape[2 if self.is_transposed else 1] * (
            2 if self.stored == "int4" else 1
        )

    @property
    def width(self) -> int:
        """Return M."""
        return self.weights[0].shape[1 if self.is_transposed else 2]


class Cut(NamedTuple):
    """Static sizes: rows in VMEM, rows multiplied at once, columns of a step, rows of a tile."""

    window: int
    chunk: int
    tile: int
    unit: int
    cores: int


class Rows(NamedTuple):
    """Arrays by place.

    Attributes:
        left: one or two [P, K], which are multiplied.
        column: float32 [P, 128], a number for each row, or None.
        tiles: of [P, M], which the epilogue takes along with the products.
    """

    left: Sequence[jax.Array]
    column: jax.Array | None = None
    tiles: Sequence[jax.Array] = ()

    def windows(self) -> list[jax.Array]:
        """Return what is kept in VMEM for a block."""
        return [*self.left, *([] if self.column is None else [self.column])]


def buffer_bytes(rows: Rows, by: Matrices, outs: Sequence[Any], window: int, tile: int) -> int:
    """Return how much VMEM the buffers take."""
    windows = sum(a.shape[1] * a.dtype.itemsize for a in rows.windows())
    windows += 2 * LANES if by.stored == "fp8" else 0
    tiles = sum(a.dtype.itemsize for a in rows.tiles) + sum(jnp.dtype(d).itemsize for d in outs)
    entry = by.weights[0].dtype.itemsize * by.weights[0].shape[1] * by.weights[0].shape[2]
    weights = entry // by.width * 2 + (0 if by.scales is None else 2 * by.depth)
    return 2 * window * (windows + tiles * tile) + len(by.weights) * weights * tile


def _widen(w_ref: Any, wide: Any, stored: str) -> None:
    """Write integers or float8s as bfloat16, which is exact.

    A vector register of bfloat16s holds rows 2r and 2r + 1 in the halves of one word, and those
    are the two nibbles of an int4 byte: the words are put together as integers.
    """
    if stored != "int4":
        wide[...] = w_ref[...].astype(jnp.float32).astype(jnp.bfloat16)
        return
    packed = w_ref[...].astype(jnp.int32)

    def bits(nibble: jax.Array) -> jax.Array:
        return pltpu.bitcast(nibble.astype(jnp.float32), jnp.int32)

    low = bits(jax.lax.shift_right_arithmetic(jax.lax.shift_left(packed, 28), 28))
    high = bits(jax.lax.shift_right_arithmetic(packed, 4))
    word = jax.lax.shift_right_logical(low, 16) | high
    wide[...] = pltpu.bitcast(word, jnp.bfloat16)


def _round_to_fp8(x: jax.Array) -> jax.Array:
    """Round float32s within +-448 to the nearest float8_e4m3fn, ties to even.

    That is to 3 bits of fraction, and below 2^-6 to a multiple of 2^-9. Older TPUs cannot convert.
    """
    bits = pltpu.bitcast(x, jnp.int32)
    is_odd = jax.lax.shift_right_logical(bits, 20) & 1
    normal = pltpu.bitcast((bits + is_odd + 0x7FFFF) & -0x100000, jnp.float32)
    unit = 1.5 * 2.0 ** (23 - 9)  # beside it, what is less than 2^-9 is rounded off
    return jnp.where(jnp.abs(x) < 2.0**-6, (x + unit) - unit, normal)


def _quantize_rows(window: Any, row_scales: Any, count: jax.Array, unit: int) -> None:
    """Round a block of rows to float8s, in place, and keep their scales."""

    def quantize(n: jax.Array, _: None) -> None:
        rows = pl.ds(pl.multiple_of(n * unit, unit), unit)
        x = window[rows].astype(jnp.float32)
        scale = jnp.clip(jnp.abs(x).max(1, keepdims=True), 1e-12, ROW_MAX) / FP8_MAX
        rounded = _round_to_fp8(jnp.clip(x / scale, -FP8_MAX, FP8_MAX))
        window[rows] = rounded.astype(window.dtype)
        row_scales[rows] = jnp.broadcast_to(scale, (unit, LANES))

    jax.lax.fori_loop(0, jax.lax.div(count, unit), quantize, None)


def _multiply(x: jax.Array, w_ref: Any, scale_ref: Any, by: Matrices) -> jax.Array:
    """Multiply a chunk of rows by a tile of columns; float32."""
    if by.stored != "int4":
        product = dot(x, w_ref[...].astype(x.dtype), (1, 1 if by.is_transposed else 0))
        return product if scale_ref is None else product * scale_ref[...]
    product = jnp.zeros((x.shape[0], w_ref.shape[1]), jnp.float32)
    for n in range(by.depth // INT4_GROUP):
        part = slice(n * INT4_GROUP, (n + 1) * INT4_GROUP)
        scale = scale_ref[pl.ds(n, 1), :]
        product += dot(x[:, part], w_ref[part].astype(x.dtype), (1, 0)) * scale
    return product


class _Refs(NamedTuple):
    """The arguments of the kernel."""

    windows: list[Any]
    tiles: list[Any]
    weights: list[Any]
    scales: list[Any]
    outs: list[Any]
    window_buffers: list[Any]
    tile_buffers: list[Any]
    out_buffers: list[Any]
    wide: list[Any]
    row_scales: list[Any]
    window_arrived: Any
    tile_arrived: Any
    out_left: Any

    @staticmethod
    def of(refs: Sequence[Any], counts: Sequence[int]) -> "_Refs":
        """Split the flat arguments."""
        parts, at = [], 0
        for count in counts:
            parts.append(list(refs[at : at + count]))
            at += count
        return _Refs(*parts, *refs[at:])


def _kernel(by: Matrices, cut: Cut, steps: int, counts: Sequence[int], num_left: int, epilogue):
    """Return the kernel for static sizes."""

    def kernel(_, table, *flat):
        refs = _Refs.of(flat, counts)
        c, i, j = (pl.program_id(axis) for axis in range(3))
        number = pl.num_programs(1)
        at = i * steps + j
        block = read_block(table, i, cut.unit)
        chunks = pl.cdiv(block.rows, cut.chunk)

        def transfers(sources, targets, semaphores, slot):
            return [
                pltpu.make_async_copy(source, target, semaphores.at[n, slot])
                for n, (source, target) in enumerate(zip(sources, targets, strict=True))
            ]

        def window_copies(i):
            block, slot = read_block(table, i, cut.unit), jax.lax.rem(i, 2)
            sources = [w.at[pl.ds(block.start, block.rows)] for w in refs.windows]
            targets = [b.at[slot, pl.ds(0, block.rows)] for b in refs.window_buffers]
            return transfers(sources, targets, refs.window_arrived, slot)

        def tile_copies(at, *, is_out):
            slot = jax.lax.rem(at, 2)
            block = read_block(table, jax.lax.div(at, steps), cut.unit)
            first = pl.multiple_of((c * steps + jax.lax.rem(at, steps)) * cut.tile, cut.tile)
            arrays, buffers = (
                (refs.outs, refs.out_buffers) if is_out else (refs.tiles, refs.tile_buffers)
            )
            in_hbm = [a.at[pl.ds(block.start, block.rows), pl.ds(first, cut.tile)] for a in arrays]
            in_vmem = [b.at[slot, pl.ds(0, block.rows)] for b in buffers]
            if is_out:
                return transfers(in_vmem, in_hbm, refs.out_left, slot)
            return transfers(in_hbm, in_vmem, refs.tile_arrived, slot)

        def start(copies):
            for copy in copies:
                copy.start()

        def wait(copies):
            for copy in copies:
                copy.wait()

        @pl.when(j == 0)
        def _():
            pl.when(i == 0)(lambda: start(window_copies(i)))
            wait(window_copies(i))
            pl.when(i + 1 < number)(lambda: start(window_copies(i + 1)))
            for row_scales in refs.row_scales:
                left = refs.window_buffers[0].at[jax.lax.rem(i, 2)]
                _quantize_rows(left, row_scales, block.rows, cut.unit)

        pl.when(at == 0)(lambda: start(tile_copies(at, is_out=False)))
        wait(tile_copies(at, is_out=False))
        pl.when(at + 1 < number * steps)(lambda: start(tile_copies(at + 1, is_out=False)))
        pl.when(at >= 2)(lambda: wait(tile_copies(at - 2, is_out=True)))

        for w_ref, wide in zip(refs.weights, refs.wide, strict=False):
            _widen(w_ref, wide, by.stored)
        weights = refs.wide or refs.weights
        scales = refs.scales or [None] * len(weights)
        slot, window_slot = jax.lax.rem(at, 2), jax.lax.rem(i, 2)

        def compute(n, _):
            rows = pl.ds(pl.multiple_of(n * cut.chunk, cut.chunk), cut.chunk)
            read = [buffer[window_slot, rows] for buffer in refs.window_buffers]
            left = read[:num_left] * (len(weights) // num_left)
            products = [
                _multiply(x, w, scale, by)
                for x, w, scale in zip(left, weights, scales, strict=True)
            ]
            for row_scales in refs.row_scales:
                products = [product * row_scales[rows][:, :1] for product in products]
            column = read[num_left][:, :1] if len(read) > num_left else None
            tiles = [buffer[slot, rows].astype(jnp.float32) for buffer in refs.tile_buffers]
            results = epilogue(products, column, tiles)
            for buffer, result in zip(refs.out_buffers, results, strict=True):
                buffer[slot, rows] = result.astype(buffer.dtype)

        if cut.window == cut.chunk:  # without a loop, widening overlaps with the products
            compute(0, None)
        else:
            jax.lax.fori_loop(0, chunks, compute, None)
        start(tile_copies(at, is_out=True))

        @pl.when(at == number * steps - 1)
        def _():
            pl.when(at > 0)(lambda: wait(tile_copies(at - 1, is_out=True)))
            wait(tile_copies(at, is_out=True))

    return kernel


def grouped_rows(
    rows: Rows,
    by: Matrices,
    table: Table,
    cut: Cut,
    epilogue: Callable[[list[jax.Array], jax.Array | None, list[jax.Array]], Sequence[jax.Array]],
    out_dtypes: Sequence[Any],
    *,
    name: str,
    cost: pl.CostEstimate,
) -> list[jax.Array]:
    """Multiply each row by its expert's matrices, and apply the epilogue.

    Args:
        rows: the arrays by place. With two matrices and one left array, both take that one.
        by: the matrices.
        table: the list of blocks, of cut.window rows.
        cut: static sizes.
        epilogue: from the float32 products of a chunk, its column [chunk, 1] and its tiles, the
            outputs.
        out_dtypes: of the outputs.
        name: of the kernel.
        cost: what it costs.

    Returns:
        Arrays [P, M]. Places beyond the blocks keep what they held.
    """
    windows, (P, _) = rows.windows(), rows.left[0].shape
    steps = by.width // (cut.tile * cut.cores)
    is_wide = by.stored != "float"

    def tile_spec(array: jax.Array) -> pl.BlockSpec:
        if by.is_transposed:
            return pl.BlockSpec(
                (None, cut.tile, array.shape[2]),
                lambda c, i, j, first, table: (
                    first[0] + table[len(Block._fields) * i],
                    c * steps + j,
                    0,
                ),
            )
        return pl.BlockSpec(
            (None, array.shape[1], cut.tile),
            lambda c, i, j, first, table: (
                first[0] + table[len(Block._fields) * i],
                0,
                c * steps + j,
            ),
        )

    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    scales = [s if s.ndim == 3 else s[:, None] for s in by.scales or ()]
    scales = [pltpu.with_memory_space_constraint(s, pltpu.HBM) for s in scales]
    counts = [
        len(windows), len(rows.tiles), len(by.weights), len(scales), len(out_dtypes), len(windows),
        len(rows.tiles), len(out_dtypes), len(by.weights) if is_wide else 0,
        int(by.stored == "fp8"),
    ]  # fmt: skip
    semaphores = [pltpu.SemaphoreType.DMA((max(n, 1), 2)) for n in counts[:2]]
    kernel = _kernel(by, cut, steps, counts, len(rows.left), epilogue)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cut.cores, table.count, steps),
            in_specs=[
                *[in_hbm] * (len(windows) + len(rows.tiles)),
                *[tile_spec(w) for w in by.weights],
                *[tile_spec(scale) for scale in scales],
            ],
            out_specs=[in_hbm] * len(out_dtypes),
            scratch_shapes=[
                *[pltpu.VMEM((2, cut.window, a.shape[1]), a.dtype) for a in windows],
                *[pltpu.VMEM((2, cut.window, cut.tile), a.dtype) for a in rows.tiles],
                *[pltpu.VMEM((2, cut.window, cut.tile), d) for d in out_dtypes],
                *[pltpu.VMEM((by.depth, cut.tile), jnp.bfloat16) for _ in by.weights if is_wide],
                *[pltpu.VMEM((cut.window, LANES), jnp.float32)] * counts[-1],
                *semaphores,
                pltpu.SemaphoreType.DMA((len(out_dtypes), 2)),
            ],
        ),
        out_shape=[backend.like(rows.left[0], (P, by.width), d) for d in out_dtypes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=cost,
        interpret=backend.tpu_interpreter(),
        name=name,
    )(by.first.reshape(1), table.fields, *windows, *rows.tiles, *by.weights, *scales)
