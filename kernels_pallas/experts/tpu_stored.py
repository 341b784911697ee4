"""Stored matrices on TPUs: rows made ready for them, their tiles widened, products scaled.

int8 is widened to bfloat16 by conversion, int4 by `tpu_widen.nibbles`: its input channels come in
another order within each group of 128, in which the multiplier puts the rows' once for a block, and
with 136 added, which times the sum of a row's group is taken off the product. float8s go to the
multiplier as they are; NaN makes its column NaN.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend, tpu_widen
from kernels_pallas.experts.inputs import INT4_GROUP
from kernels_pallas.experts.quantize import FP8_MAX, ROW_MAX
from kernels_pallas.tpu_primitives import LANES, dot

_DEPTH = 256  # input channels that are widened and multiplied at once, but for int4


def wide_dtype(stored: str) -> jnp.dtype:
    """Return the dtype in which tiles are multiplied."""
    return jnp.dtype(backend.tpu().float8 if stored == "fp8" else jnp.bfloat16)


def beside_width(stored: str, depth: int) -> int:
    """Return how many float32s are kept for a row: the scale of float8s, sums of int4's groups."""
    return -(-depth // (INT4_GROUP * LANES)) * LANES if stored == "int4" else LANES


def make_ready(rows_ref: Any, beside: Any, chunks: jax.Array, chunk: int, stored: str) -> None:
    """Round a block of rows to float8s, or bring their columns into the order of int4, in place."""

    few = math.gcd(chunk, 64)  # float32s of a whole chunk can be too many for VMEM

    def round_rows(n: jax.Array, _: None) -> None:
        rows = pl.ds(pl.multiple_of(n * few, few), few)
        x = rows_ref[rows].astype(jnp.float32)
        scale = jnp.clip(jnp.abs(x).max(1, keepdims=True), 1e-12, ROW_MAX) / FP8_MAX
        rounded = tpu_widen.round_to_fp8(jnp.clip(x / scale, -FP8_MAX, FP8_MAX))
        rows_ref[rows] = rounded.astype(rows_ref.dtype)
        beside[rows] = jnp.broadcast_to(scale, (few, LANES))

    def shuffle(n: jax.Array, _: None) -> None:
        rows = pl.ds(pl.multiple_of(n * chunk, chunk), chunk)
        order = tpu_widen.permutation(INT4_GROUP, rows_ref.dtype)
        lane = jax.lax.broadcasted_iota(jnp.int32, (chunk, beside.shape[1]), 1)
        sums = jnp.zeros(lane.shape, jnp.float32)
        for group in range(rows_ref.shape[1] // INT4_GROUP):
            part = pl.ds(group * INT4_GROUP, INT4_GROUP)
            x = rows_ref[rows, part]
            sums += jnp.where(lane == group, x.astype(jnp.float32).sum(1, keepdims=True), 0)
            rows_ref[rows, part] = dot(x, order, (1, 0)).astype(rows_ref.dtype)
        beside[rows] = sums

    if stored in ("fp8", "int4"):
        times, make = (chunk // few, round_rows) if stored == "fp8" else (1, shuffle)
        jax.lax.fori_loop(0, chunks * times, make, None)


def parts(stored: str, depth: int, *, is_wide: bool) -> list[slice]:
    """Cut input channels into those that are multiplied at once: widened before, or on the way."""
    size = INT4_GROUP if stored == "int4" else depth if is_wide else _DEPTH
    return [slice(at, min(at + size, depth)) for at in range(0, depth, size)]


def widened(w_ref: Any, part: slice, stored: str) -> tuple[jax.Array, jax.Array | None]:
    """Return a part of a tile as it is multiplied, and words in which `tpu_widen` finds NaN.

    Args:
        w_ref: a tile as stored.
        part: input channels, whole groups.
        stored: how.
    """
    if stored == "int4":
        return tpu_widen.nibbles(w_ref[part.start // 2 : part.stop // 2]), None
    if stored == "int8":
        return w_ref[part].astype(jnp.float32).astype(jnp.bfloat16), None
    if wide_dtype(stored) == w_ref.dtype:
        return w_ref[part], None
    tile, words = tpu_widen.float8s(w_ref[part], backend.tpu().float8)
    lines = INT4_GROUP // 4  # of words: as many for every part
    found = words[:lines]
    for at in range(lines, len(words), lines):
        found |= words[at : at + lines]
    return tile, found


def multiply(
    x: jax.Array,
    tile: Callable[[slice], tuple[jax.Array, jax.Array | None]],
    scale_ref: Any,
    beside: jax.Array,
    stored: str,
    *,
    is_wide: bool,
) -> jax.Array:
    """Multiply a chunk of rows by a tile of columns; float32.

    Args:
        x: rows, made ready.
        tile: gives a part of the tile; see `widened`.
        scale_ref: scales of its columns, of each group of int4.
        beside: what `make_ready` kept for the rows.
        stored: how matrices are stored.
        is_wide: whether the tile was widened before.
    """
    product, nan = jnp.zeros((x.shape[0], scale_ref.shape[1]), jnp.float32), None
    x = x.astype(jnp.bfloat16) if stored == "fp8" else x  # float8s are exact in it
    for part in parts(stored, x.shape[1], is_wide=is_wide):
        w, words = tile(part)
        term = dot(x[:, part], w if stored == "fp8" else w.astype(x.dtype), (1, 0))
        if stored == "int4":
            group = part.start // INT4_GROUP
            term -= beside[:, group : group + 1] * tpu_widen.NIBBLE_OFFSET
            term *= scale_ref[pl.ds(group, 1), :]
        product += term
        if words is not None:
            nan = words if nan is None else nan | words
    if stored == "int4":
        return product
    if nan is not None:
        product = jnp.where(tpu_widen.has_nan(nan), jnp.nan, product * 16)
    return product * scale_ref[...] * (beside[:, :1] if stored == "fp8" else 1)
