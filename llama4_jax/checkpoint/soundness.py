"""Tell whether arrays are worth keeping, and whether they came back as they were."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SHOWN = 3
_PIECE = 1 << 20
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def check_finite(arrays: Mapping[str, jax.Array], *, what: str) -> None:
    """Refuse arrays that hold a number that is not finite.

    Args:
      arrays: by name, of any dtype and sharding; each is read where it lies.
      what: they are together, for the message.

    Raises:
      ValueError: names the arrays.
    """
    found = jax.device_get(_examine(dict(arrays)))
    damaged = [name for name in arrays if not found[name]["is_finite"]]
    if damaged:
        rest = f" and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
        raise ValueError(
            f"{what} is not saved: {', '.join(damaged[:_SHOWN])}{rest} "
            f"{'holds' if len(damaged) == 1 else 'hold'} NaN or infinity"
        )


def check_finite_values(name: str, values: np.ndarray) -> None:
    """Refuse values, about to be written, that hold a number that is not finite.

    Such a number has all bits of the exponent set, which is looked at by pieces: for bfloat16 five
    times as fast as `np.isfinite`, without a mask as long as the values.

    Args:
      name: of the values, for the message.
      values: C-contiguous, float32, float16 or bfloat16.

    Raises:
      ValueError: gives the name.
    """
    words = values.reshape(-1).view(f"u{values.dtype.itemsize}")
    exponent = np.array(np.inf, values.dtype).view(words.dtype)
    for start in range(0, words.size, _PIECE):
        if np.max(words[start : start + _PIECE] & exponent) == exponent:
            raise ValueError(f"{name} holds NaN or infinity, which is not written; mend it first")


def bit_sums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Add up the bits of every array, read as whole numbers, modulo 2**32.

    A changed byte changes the sum, wherever it is and however the array is sharded.
    """
    return {name: int(f["bits"]) for name, f in jax.device_get(_examine(dict(arrays))).items()}


@jax.jit
def _examine(arrays: dict[str, jax.Array]) -> dict[str, dict[str, Any]]:
    def bits(array: jax.Array) -> jax.Array:
        if jnp.issubdtype(array.dtype, jnp.floating):
            array = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize])
        return jnp.sum(array, dtype=jnp.uint32)

    return {
        name: {"is_finite": jnp.isfinite(array).all(), "bits": bits(array)}
        for name, array in arrays.items()
    }
