"""Blocks of queries: the unit that walks over the cache, as a row of its own."""

import jax
import jax.numpy as jnp

from kernels_pallas.decode.inputs import Inputs


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
