"""The arrays of one decode attention call, and which slots of the cache it has to read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention.visibility import Settings, first_visible


class Inputs(NamedTuple):
    """The arrays of one call; see `api.decode_attention`.

    With a page table, k and v are pages [pages, page size, K, H], the scales of their tokens
    [pages, page size, K], and slot s of row b is slot s % page size of page table[b, s // page
    size]. Scales of channels are folded away before a backend sees them.
    """

    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    lengths_B: jax.Array
    q_positions_BT: jax.Array
    kv_start_B: jax.Array
    k_scale_BSK: jax.Array | None
    v_scale_BSK: jax.Array | None
    page_table_BP: jax.Array | None

    @property
    def num_slots(self) -> int:
        """Return how many slots a row has, pages counted in full."""
        if self.page_table_BP is None:
            return self.k_BSKH.shape[1]
        return self.page_table_BP.shape[1] * self.k_BSKH.shape[1]


def slots_seen(x: Inputs, how: Settings) -> tuple[jax.Array, jax.Array]:
    """Return the slots [begin, end) of each row that some query sees; begin == end for none.

    Slot s holds the token at position kv_start + s and is seen by the queries at or past it, in its
    chunk, if s < length.
    """
    real_BT = x.q_positions_BT >= 0
    lo_BT = first_visible(x.q_positions_BT, how.chunk_size)
    lo_B = jnp.where(real_BT, lo_BT, 2**30).min(1)
    begin_B = jnp.maximum(lo_B - x.kv_start_B, 0)
    end_B = jnp.minimum(x.lengths_B, x.q_positions_BT.max(1) - x.kv_start_B + 1)
    end_B = jnp.clip(end_B, 0, x.num_slots)
    return jnp.minimum(begin_B, end_B), end_B
