"""Bytes and nibbles on their way to a TPU's multiplier, by few instructions of the vector unit.

A register holds words of 32 bits, and a word holds two rows of bfloat16, four of bytes, or eight of
nibbles. Words of nibbles become words of bfloat16 by shifts and masks, where they lie: row r of
piece j, of four, has what was 8 * (r // 2) + 4 * (r % 2) + j. So the rows of a matrix come in
another order, and what it multiplies has to come in that order, too. Bytes of float8 go to the
multiplier as they are.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

FLOAT8_ROWS = 32  # of a tile of bytes
NIBBLE_OFFSET = 136  # is added to each nibble


def nibbles(packed: jax.Array) -> jax.Array:
    """Return int4s plus `NIBBLE_OFFSET` in bfloat16, shuffled: twice the rows of the bytes.

    A level plus 8, put into the last bits of 128 as a bfloat16, is 128 + 8 + level.

    Args:
        packed: int8, a multiple of 32 rows; the low nibble of a byte comes first.
    """
    words = pltpu.bitcast(packed, jnp.int32)
    shifted = [jax.lax.shift_right_logical(words, 4 * j) if j else words for j in range(4)]
    pieces = [(each & 0x000F000F) ^ 0x43084308 for each in shifted]
    return jnp.concatenate([pltpu.bitcast(piece, jnp.bfloat16) for piece in pieces], axis=0)


def permutation(rows: int, dtype: jnp.dtype) -> jax.Array:
    """Return the matrix [rows, rows] that brings columns into the order of shuffled rows."""
    before, place = (jax.lax.broadcasted_iota(jnp.int32, (rows, rows), axis) for axis in (0, 1))
    piece, inside = jax.lax.div(place, rows // 4), jax.lax.rem(place, rows // 4)
    shuffled = 8 * jax.lax.div(inside, 2) + 4 * jax.lax.rem(inside, 2) + piece
    return (before == shuffled).astype(jnp.float32).astype(dtype)


def float8s(stored: jax.Array, taken: str) -> tuple[jax.Array, jax.Array]:
    """Return float8_e4m3fns as the multiplier takes them, and words with a high bit for each NaN.

    A float8_e4m3b11fnuz has the same bits, subnormals too, but stands for a sixteenth. It has no
    negative zero, whose code means NaN there, and for NaN it has another 480 / 16.

    Args:
        stored: a multiple of 32 rows.
        taken: name of the dtype.
    """
    words = pltpu.bitcast(stored, jnp.int32)
    magnitudes = words & 0x7F7F7F7F
    # Adding 127 to what is not zero sets the high bit of its byte, adding 1 that of NaN.
    signs = (magnitudes + 0x7F7F7F7F) | 0x7F7F7F7F
    return pltpu.bitcast(words & signs, jnp.dtype(taken)), magnitudes + 0x01010101


def has_nan(words: jax.Array) -> jax.Array:
    """Return in which columns `float8s` found a NaN, [1, columns]."""
    high = words & jnp.int32(-0x7F7F7F80)
    return (high != 0).astype(jnp.int32).max(0, keepdims=True) > 0


def float8_unit(taken: str) -> int:
    """Return what 1 of the float8s that the multiplier takes stands for."""
    return {"float8_e4m3fn": 1, "float8_e4m3b11fnuz": 16}[taken]


def holds_nan(stored: Iterable[jax.Array]) -> jax.Array:
    """Return whether there is a NaN among float8_e4m3fns, each of a multiple of 32 rows."""
    found: jax.Array | int = 0
    for each in stored:
        _, words = float8s(each, each.dtype.name)
        while len(words) % 16 == 0:
            words = words[: len(words) // 2] | words[len(words) // 2 :]
        found = words | found
    return has_nan(jnp.asarray(found)).astype(jnp.float32).max() > 0


def round_to_fp8(x: jax.Array) -> jax.Array:
    """Round float32s within +-448 to the nearest float8_e4m3fn, ties to even.

    That is to 3 bits of fraction, and below 2^-6 to a multiple of 2^-9. Older TPUs cannot convert.
    """
    bits = pltpu.bitcast(x, jnp.int32)
    is_odd = jax.lax.shift_right_logical(bits, 20) & 1
    normal = pltpu.bitcast((bits + is_odd + 0x7FFFF) & -0x100000, jnp.float32)
    unit = 1.5 * 2.0 ** (23 - 9)  # beside it, what is less than 2^-9 is rounded off
    return jnp.where(jnp.abs(x) < 2.0**-6, (x + unit) - unit, normal)
