"""What GPU kernels of several operations share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Each thread has eight columns of a line: reading bytes and writing bfloat16s meet no conflicts.
LINES = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 64), (4, 64), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
PART = 64  # columns that this layout covers
_SLICE = 32  # lines at a time, as many as registers hold


def widen(stored: Any, wide: Any) -> None:
    """Write a tile of int8 or float8 as the dtype of another, in shared memory both.

    Args:
        stored: [lines, columns], a multiple of 32 by one of 64.
        wide: the same shape.
    """
    lines, columns = stored.shape
    for column in range(0, columns, PART):
        for line in range(0, lines, _SLICE):
            at = pl.ds(line, _SLICE), pl.ds(column, PART)
            tile: jax.Array = plgpu.load(stored.at[at], layout=LINES)
            if tile.dtype == jnp.float8_e4m3fn:
                tile = tile.astype(jnp.float32)
            wide[at] = tile.astype(wide.dtype)


def clear_lines(tile: Any, begin: jax.Array, end: jax.Array) -> None:
    """Zero the lines of a tile in shared memory outside of [begin, end); shapes as for `widen`."""
    lines, columns = tile.shape
    for column in range(0, columns, PART):
        for line in range(0, lines, _SLICE):
            at = pl.ds(line, _SLICE), pl.ds(column, PART)
            number = plgpu.broadcasted_iota(jnp.int32, (_SLICE, PART), 0, layout=LINES) + line
            value = plgpu.load(tile.at[at], layout=LINES)
            is_kept = (number >= begin) & (number < end)
            tile[at] = jnp.where(is_kept, value, jnp.zeros_like(value))
