"""What the TPU kernels of experts share: how large blocks are, and the list of them in SMEM."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend, chips, tuning
from kernels_pallas.experts.dispatch import Block, Blocks
from kernels_pallas.tpu_primitives import LANES, round_up, tile_rows

VMEM_LIMIT = chips.LEAST_VMEM - 12 * 2**20  # the compiler has the rest
VMEM_BUDGET = VMEM_LIMIT - 8 * 2**20  # for buffers; the rest for the products of a chunk
SCALARS_BUDGET = chips.TPU7X.smem // 2  # every TPU has as much SMEM
TILES = (512, 256, 128)


class BlockSizes(NamedTuple):
    """Static sizes.

    Attributes:
        block: rows of an expert that stay in VMEM.
        chunk: rows multiplied at once.
        tile: columns of a step.
        unit: rows of a tile of memory.
        cores: of a device, each of which takes other columns.
    """

    block: int
    chunk: int
    tile: int
    unit: int
    cores: int


def fit(
    operation: str,
    needed: Callable[[int, int], int],
    depth: int,
    width: int,
    dtype: jnp.dtype,
    stored: str,
    num_rows: int,
    num_experts: int,
) -> BlockSizes | None:
    """Choose the largest block that fits into VMEM, then the widest tile, or None if none fit.

    A tile should not be narrower than the multiplier, nor a chunk shorter, if there are such.

    Args:
        operation: under which sizes are looked up.
        needed: from the rows of a block and the columns of a tile, the bytes of buffers.
        depth, width: of a matrix.
        dtype: of rows.
        stored: dtype of matrices.
        num_rows: of all experts together.
        num_experts: that a row may belong to.
    """
    unit, multiplier = tile_rows(dtype), backend.multiplier()
    default = {
        "block": 1024,
        "chunk": multiplier,
        "tile": TILES[0],
        "cores": backend.num_cores(),
    }
    shape = {"D": depth, "F": width, "E": num_experts, "dtype": stored}
    tuned = tuning.lookup(f"expert_mlp.{operation}", default, **shape)
    cores = tuned["cores"] if width % (tuned["cores"] * LANES) == 0 else 1
    tiles = [n for n in TILES if n <= tuned["tile"] and width % (cores * n) == 0]
    tiles = [n for n in tiles if n >= multiplier] or tiles
    chunk = min(tuned["chunk"], round_up(num_rows, unit))
    while chunk:
        chunks = min(tuned["block"], round_up(num_rows, chunk)) // chunk
        while chunks:
            for tile in tiles:
                if needed(chunks * chunk, tile) <= VMEM_BUDGET:
                    return BlockSizes(chunks * chunk, chunk, tile, unit, cores)
            chunks //= 2
        chunk = chunk // (2 * unit) * unit
    return None


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
