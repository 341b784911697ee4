"""Blocks of queries, each of which walks over the part of the cache that it sees."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention.visibility import Settings
from kernels_pallas.decode.inputs import Inputs, slots_seen, slots_seen_by_all


def in_blocks(x: Inputs, block: int) -> Inputs:
    """Cut queries into blocks, each of which becomes a row with its row's cache.

    Args:
        x: the arrays; without a page table one is made, and pages are shared by rows.
        block: queries of a block; the last one of a row is padded.

    Returns:
        The arrays of rows [B * blocks, block].
    """
    x = x.in_pages()
    B, T = x.q_positions_BT.shape
    blocks = -(-T // block)

    def cut(a_BT: jax.Array, fill: int) -> jax.Array:
        widths = [(0, 0), (0, blocks * block - T), *[(0, 0)] * (a_BT.ndim - 2)]
        padded = jnp.pad(a_BT, widths, constant_values=fill)
        return padded.reshape(B * blocks, block, *a_BT.shape[2:])

    def repeat(a_B: jax.Array) -> jax.Array:
        return jnp.repeat(a_B, blocks, axis=0)

    assert x.page_table_BP is not None
    return x._replace(
        q_BTNH=cut(x.q_BTNH, 0),
        q_positions_BT=cut(x.q_positions_BT, -1),
        lengths_B=repeat(x.lengths_B),
        kv_start_B=repeat(x.kv_start_B),
        page_table_BP=repeat(x.page_table_BP),
    )


class Blocks(NamedTuple):
    """What each block of queries sees; int32 [B, blocks]. Scalars inside a kernel.

    Attributes:
        begin, end: the slots from the first to after the last that some query sees.
        all_begin, all_end: the slots that every query sees; none if there is padding.
        row_begin, row_end: the slots that some query of the row sees.
        start: the position of slot 0.
    """

    begin: Any
    end: Any
    all_begin: Any
    all_end: Any
    row_begin: Any
    row_end: Any
    start: Any

    @staticmethod
    def read(plan_ref: Any, i: Any) -> "Blocks":
        """Read the fields of a block of queries from [fields, blocks]."""
        return Blocks(*(plan_ref[field, i] for field in range(len(Blocks._fields))))

    def bounds(self, size: int) -> tuple[Any, Any]:
        """Return the first block of so many slots that is seen, and one past the last."""
        first = jax.lax.div(self.begin, size)
        return first, jnp.where(self.end > self.begin, jax.lax.div(self.end - 1, size) + 1, first)


def summarize(x: Inputs, how: Settings, block: int) -> Blocks:
    """Return what blocks of so many queries see."""
    B = x.q_BTNH.shape[0]
    rows = in_blocks(x, block)
    begin, end = slots_seen(rows, how)
    all_begin, all_end = slots_seen_by_all(rows, how)
    all_end = jnp.where((rows.q_positions_BT >= 0).all(1), all_end, 0)
    fields = [field.reshape(B, -1) for field in (begin, end, all_begin, all_end)]
    of_rows = (*slots_seen(x, how), x.kv_start_B)
    fields += [jnp.broadcast_to(field[:, None], fields[0].shape) for field in of_rows]
    return Blocks(*fields)
