"""What TPU kernels of several operations share."""

from collections.abc import Sequence
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


def transfers(sources: Sequence[Any], targets: Sequence[Any], arrived: Any, slot: Any) -> list[Any]:
    """Return copies, each with a semaphore of its own, of which there is one for each slot."""
    return [
        pltpu.make_async_copy(source, target, arrived.at[n, slot])
        for n, (source, target) in enumerate(zip(sources, targets, strict=True))
    ]


def start(copies: Sequence[Any]) -> None:
    """Start some copies."""
    for copy in copies:
        copy.start()


def wait(copies: Sequence[Any]) -> None:
    """Wait for some copies."""
    for copy in copies:
        copy.wait()
