"""The arrays of attention to a cache, what is checked of them, and which slots have to be read."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention.api import settings
from kernels_pallas.attention.visibility import Settings, first_visible
from kernels_pallas.backend import Backend, choose, vary_alike


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

    def in_pages(self) -> "Inputs":
        """Return the same with a page table: a row of a cache without pages is one page."""
        if self.page_table_BP is not None:
            return self
        return self._replace(page_table_BP=jnp.arange(self.q_BTNH.shape[0])[:, None])


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


def slots_seen_by_all(x: Inputs, how: Settings) -> tuple[jax.Array, jax.Array]:
    """Return the slots [begin, end) of each row that every query sees, padding left out."""
    real_BT = x.q_positions_BT >= 0
    lo_BT = first_visible(x.q_positions_BT, how.chunk_size)
    begin_B = jnp.where(real_BT, lo_BT, 0).max(1) - x.kv_start_B
    last_B = jnp.where(real_BT, x.q_positions_BT, jnp.iinfo(jnp.int32).max).min(1)
    _, end_B = slots_seen(x, how)
    return begin_B, jnp.minimum(last_B - x.kv_start_B, end_B - 1) + 1


def scales_in_order(
    x: Inputs, how: Settings, scale_PSK: jax.Array | None, block: int
) -> jax.Array | None:
    """Return the scales of tokens in the order of rows, [B, K, slots] in whole blocks.

    They are 3 % of the cache. Those of slots that nobody sees are 0.
    """
    if scale_PSK is None:
        return None
    assert x.page_table_BP is not None
    scale_BPKS = scale_PSK.swapaxes(1, 2).at[x.page_table_BP].get(mode="clip")
    B, _, K, _ = scale_BPKS.shape
    scale_BKS = scale_BPKS.swapaxes(1, 2).reshape(B, K, x.num_slots)
    begin_B, end_B = (bound[:, None, None] for bound in slots_seen(x, how))
    slots = jnp.arange(x.num_slots)
    scale_BKS = jnp.where((slots >= begin_B) & (slots < end_B), scale_BKS, 0)
    return jnp.pad(scale_BKS, ((0, 0), (0, 0), (0, -x.num_slots % block)))


def attend_to_cache(
    operation: str,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    lengths_B: jax.Array,
    q_positions_BT: jax.Array,
    kv_start_B: jax.Array | None,
    page_table_BP: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    chunk_size: int | None,
    temperature: tuple[int, float] | None,
    scale: float | None,
    return_lse: bool,
    backend: Backend | None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Check the arguments of `decode_attention` and its kin, and let a backend attend.

    Args:
        operation: the package whose backends do it.
        (others): see `api.decode_attention`.
    """
    (B, T, N, H), (rows, S, K) = q_BTNH.shape, k_BSKH.shape[:3]
    if page_table_BP is None and rows != B:
        raise ValueError(f"the cache has {rows} rows and q_BTNH {B}; only pages may differ")
    expected: dict[str, tuple[tuple, tuple]] = {
        "k_BSKH": (k_BSKH.shape, (rows, S, K, H)),
        "v_BSKH": (v_BSKH.shape, (rows, S, K, H)),
        "lengths_B": (lengths_B.shape, (B,)),
        "q_positions_BT": (q_positions_BT.shape, (B, T)),
    }
    if kv_start_B is not None:
        expected["kv_start_B"] = (kv_start_B.shape, (B,))
    if page_table_BP is not None:
        expected["page_table_BP"] = (page_table_BP.shape, (B, *page_table_BP.shape[1:2]))
    for name, (shape, wanted) in expected.items():
        if shape != wanted:
            raise ValueError(f"{name} has shape {shape}; q_BTNH {q_BTNH.shape} asks for {wanted}")
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scales is not None and scales.shape not in ((K, H), (rows, S, K)):
            raise ValueError(
                f"{name} has shape {scales.shape}; give one scale a channel {(K, H)} or one a "
                f"token and head {(rows, S, K)}"
            )
    if k_BSKH.dtype != v_BSKH.dtype:
        raise ValueError(f"keys are {k_BSKH.dtype} and values {v_BSKH.dtype}; store both alike")
    how = settings(N, K, H, chunk_size, temperature, scale)
    per_channel_k, k_scale_BSK = _split(k_scale)
    per_channel_v, v_scale_BSK = _split(v_scale)
    q = q_BTNH
    if per_channel_k is not None:  # (q . (k s)) = ((q s) . k)
        q = (q * jnp.repeat(per_channel_k, N // K, axis=0)).astype(q_BTNH.dtype)
    x = Inputs(
        q,
        k_BSKH,
        v_BSKH,
        jnp.asarray(lengths_B, jnp.int32),
        jnp.asarray(q_positions_BT, jnp.int32),
        jnp.zeros((B,), jnp.int32) if kv_start_B is None else jnp.asarray(kv_start_B, jnp.int32),
        k_scale_BSK,
        v_scale_BSK,
        None if page_table_BP is None else jnp.asarray(page_table_BP, jnp.int32),
    )
    x, folds_v = vary_alike(x), per_channel_v is not None
    dtype: Any = jnp.dtype(jnp.float32) if return_lse or folds_v else q_BTNH.dtype
    out_BTNH, lse_BTN = choose(backend, operation, x, how).forward(x, how, out_dtype=dtype)
    if per_channel_v is not None:
        out_BTNH *= jnp.repeat(per_channel_v, N // K, axis=0)
    return (out_BTNH, lse_BTN) if return_lse else out_BTNH.astype(q_BTNH.dtype)


def _split(scale: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """Return scales of channels [K, H] and of tokens [B, S, K], at most one of them."""
    if scale is None:
        return None, None
    scale = scale.astype(jnp.float32)
    return (scale, None) if scale.ndim == 2 else (None, scale)
