"""How large the windows and tiles of the TPU kernels of experts are, and what a kernel costs."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend, tuning
from kernels_pallas.experts import tpu_outer as to
from kernels_pallas.experts import tpu_rows as tr
from kernels_pallas.experts.inputs import expected_rows
from kernels_pallas.tpu_primitives import LANES, round_up, tile_rows


def row_cut(
    operation: str, rows: tr.Rows, by: tr.Matrices, outs: list, num_rows: int, num_experts: int
) -> tr.Cut | None:
    """Choose the sizes of a kernel over rows, or None if none fit.

    Args:
        operation: under which sizes are looked up.
        rows, by: its operands; of rows only widths and dtypes matter.
        outs: dtypes of its results.
        num_rows: of all experts together.
        num_experts: that a row may belong to.
    """

    def needed(window: int, tile: int) -> int:
        return tr.buffer_bytes(rows, by, outs, window, tile)

    dtype = rows.left[0].dtype
    stored = str(by.weights[0].dtype)
    return _fit(operation, needed, by.depth, by.width, dtype, stored, num_rows, num_experts)


def outer_cut(x: jax.Array, dy: jax.Array, num_rows: int, num_experts: int) -> tr.Cut | None:
    """Choose the sizes of the kernel of the gradient of matrices, or None if none fit.

    Args:
        x, dy: its operands, of which only widths and dtypes matter.
        num_rows: of all experts together.
        num_experts: that a row may belong to.
    """

    def needed(window: int, tile: int) -> int:
        return to.buffer_bytes(x, dy, window, tile)

    K, M, dtype = x.shape[1], dy.shape[1], x.dtype
    return _fit("backward_weights", needed, K, M, dtype, str(dtype), num_rows, num_experts)


def _fit(
    operation: str,
    needed: Callable[[int, int], int],
    depth: int,
    width: int,
    dtype: jnp.dtype,
    stored: str,
    num_rows: int,
    num_experts: int,
) -> tr.Cut | None:
    """Choose the largest window that fits into VMEM, then the widest tile.

    A tile should not be narrower than the multiplier, nor a chunk shorter, if there are such.
    """
    unit, multiplier = tile_rows(dtype), backend.multiplier()
    default = {
        "window": 1024,
        "chunk": multiplier,
        "tile": tr.TILES[0],
        "cores": backend.num_cores(),
    }
    shape = {"D": depth, "F": width, "E": num_experts, "dtype": stored}
    tuned = tuning.lookup(f"expert_mlp.{operation}", default, **shape)
    cores = tuned["cores"] if width % (tuned["cores"] * LANES) == 0 else 1
    tiles = [n for n in tr.TILES if n <= tuned["tile"] and width % (cores * n) == 0]
    tiles = [n for n in tiles if n >= multiplier] or tiles
    chunk = min(tuned["chunk"], round_up(num_rows, unit))
    while chunk:
        chunks = min(tuned["window"], round_up(num_rows, chunk)) // chunk
        while chunks:
            for tile in tiles:
                if needed(chunks * chunk, tile) <= tr.VMEM_BUDGET:
                    return tr.Cut(chunks * chunk, chunk, tile, unit, cores)
            chunks //= 2
        chunk = chunk // (2 * unit) * unit
    return None


def cost(rows: tr.Rows, by: tr.Matrices, outs: list, num_rows: int, num_experts: int, cut: tr.Cut):
    """Estimate a kernel: weights of the experts that are hit once, rows once for each core."""
    pairs, size, num_rows = len(by.weights), jnp.dtype, expected_rows(num_rows)
    entries = by.depth * by.width * by.weights[0].dtype.itemsize
    if by.stored == "int4":
        entries //= 2
    scales = sum(4 * math.prod(s.shape[1:]) for s in by.scales or ())
    windows = sum(a.shape[1] * a.dtype.itemsize for a in rows.windows()) * cut.cores
    tiles = sum(a.dtype.itemsize for a in rows.tiles) + sum(size(d).itemsize for d in outs)
    hit = min(num_experts, num_rows)
    return pl.CostEstimate(
        flops=2 * num_rows * by.depth * by.width * pairs,
        transcendentals=num_rows * by.width if pairs > 1 else 0,
        bytes_accessed=hit * (pairs * entries + scales) + num_rows * (windows + by.width * tiles),
    )
