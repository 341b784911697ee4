"""What TPU kernels of several operations share."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # of a vector register


def tile_rows(dtype: jnp.dtype) -> int:
    """Return the rows of a tile of memory: 8 of float32, 16 of bfloat16, 32 of bytes."""
    return 32 // jnp.dtype(dtype).itemsize


def round_up(n: int, unit: int) -> int:
    """Return the next multiple of a unit."""
    return -(-n // unit) * unit


def in_hbm(x: jax.Array) -> jax.Array:
    """Keep an operand that a kernel copies from HBM there: XLA may bring it into VMEM before.

    Copies from there would wait for each other, and on v4 they read zeros (jax-ml/jax#39744).
    """
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Multiply matrices into float32; float32 operands in full precision."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        y,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def widen(stored: Any, wide: Any, *, are_nibbles: bool = False) -> None:
    """Write integers or float8s as bfloat16, which is exact.

    A vector register of bfloat16s holds rows 2r and 2r + 1 in the halves of one word, and those
    are the two nibbles of an int4 byte: the words are put together as integers.

    Args:
        stored: [rows, columns], int8 or float8_e4m3fn.
        wide: the same shape, or twice the rows of nibbles.
        are_nibbles: whether a byte is two int4, the first of them the low one.
    """
    if not are_nibbles:
        wide[...] = stored[...].astype(jnp.float32).astype(jnp.bfloat16)
        return
    packed = stored[...].astype(jnp.int32)

    def bits(nibble: jax.Array) -> jax.Array:
        return pltpu.bitcast(nibble.astype(jnp.float32), jnp.int32)

    low = bits(jax.lax.shift_right_arithmetic(jax.lax.shift_left(packed, 28), 28))
    high = bits(jax.lax.shift_right_arithmetic(packed, 4))
    word = jax.lax.shift_right_logical(low, 16) | high
    wide[...] = pltpu.bitcast(word, jnp.bfloat16)


def round_to_fp8(x: jax.Array) -> jax.Array:
    """Round float32s within +-448 to the nearest float8_e4m3fn, ties to even.

    That is to 3 bits of fraction, and below 2^-6 to a multiple of 2^-9. Older TPUs cannot convert.
    """
    bits = pltpu.bitcast(x, jnp.int32)
    is_odd = jax.lax.shift_right_logical(bits, 20) & 1
    normal = pltpu.bitcast((bits + is_odd + 0x7FFFF) & -0x100000, jnp.float32)
    unit = 1.5 * 2.0 ** (23 - 9)  # beside it, what is less than 2^-9 is rounded off
    return jnp.where(jnp.abs(x) < 2.0**-6, (x + unit) - unit, normal)
