"""Prefill attention: what it computes."""

import jax

from kernels_pallas.backend import Backend
from kernels_pallas.decode.inputs import attend_to_cache


def prefill_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    lengths_B: jax.Array,
    q_positions_BT: jax.Array,
    chunk_size: int | None = None,
    temperature: tuple[int, float] | None = None,
    scale: float | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    kv_start_B: jax.Array | None = None,
    page_table_BP: jax.Array | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attend a piece of each row, of any length, to the row's cache, which holds it already.

    The same function as `decode_attention`, made for many queries: who sees what, how the cache is
    stored and scaled, padding and results are as there. What queries do not see is not read but for
    the rest of a block of slots, and the cache is never copied. Not differentiable.

    Args:
        q_BTNH: queries, any number of each row; those of a block should stand near each other.
        k_BSKH: cached keys, or pages of them [pages, page size, K, H].
        v_BSKH: cached values, likewise.
        lengths_B: int32 slots of each row that hold a token, the new ones included.
        q_positions_BT: int32 positions of the queries; negative is padding.
        chunk_size: tokens in a chunk.
        temperature: (floor, coefficient), see `chunked_attention`.
        scale: factor on the logits; 1 / sqrt(H) by default.
        k_scale: what stored keys are to be multiplied with, see `decode_attention`.
        v_scale: the same for values.
        kv_start_B: int32 position of slot 0 of each row; 0 by default.
        page_table_BP: int32 pages of each row. Entries of pages that no query sees may hold
            anything.
        return_lse: also return the log-sum-exp of the logits, for `merge_attention`.
        backend: "tpu", "gpu" or "reference"; None is the best that takes these shapes here.

    Returns:
        out_BTNH in the dtype of q, zero for queries that see nothing. With `return_lse`, the pair
        (out_BTNH, lse_BTN) in float32; lse is -1e30 where nothing is seen.

    Raises:
        ValueError: shapes or dtypes disagree, or a number is out of range.
        NotImplementedError: the named backend cannot compute this here; the message says why.
    """
    if not q_BTNH.size:
        raise ValueError(f"q_BTNH has shape {q_BTNH.shape}; prefill_attention needs a query")
    return attend_to_cache(
        "prefill",
        q_BTNH,
        k_BSKH,
        v_BSKH,
        lengths_B=lengths_B,
        q_positions_BT=q_positions_BT,
        kv_start_B=kv_start_B,
        page_table_BP=page_table_BP,
        k_scale=k_scale,
        v_scale=v_scale,
        chunk_size=chunk_size,
        temperature=temperature,
        scale=scale,
        return_lse=return_lse,
        backend=backend,
    )
