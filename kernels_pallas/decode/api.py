"""Decode attention: what it computes."""

import jax

from kernels_pallas.backend import Backend
from kernels_pallas.decode.inputs import attend_to_cache

MAX_QUERIES = 8


def decode_attention(
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
    """Attend a few new tokens of each row to the row's cache, which holds them already.

    Slot s of row b holds the token at position kv_start[b] + s, and is seen by the queries at or
    past that position, in the same chunk if there are chunks, iff s < lengths[b]. Slots that no
    query of the row sees are not read, whatever they hold. Not differentiable.

    The cache is best stored with heads before slots, [B, K, S, H], and passed as its
    `swapaxes(1, 2)`: kernels read it so, and the two swaps cancel. Else it is copied first.

    Args:
        q_BTNH: queries, T from 1 to 8.
        k_BSKH: cached keys, in any float type, int8 or float8_e4m3fn; the latter two are read as
            they are stored. With a page table: pages [pages, page size, K, H].
        v_BSKH: cached values, likewise.
        lengths_B: int32 slots of each row that hold a token, the new ones included.
        q_positions_BT: int32 positions of the queries; negative is padding.
        chunk_size: tokens in a chunk.
        temperature: (floor, coefficient), see `chunked_attention`.
        scale: factor on the logits; 1 / sqrt(H) by default.
        k_scale: what stored keys are to be multiplied with: [K, H], one for each channel, or
            [B, S, K], one for each token and head ([pages, page size, K] with a page table, and
            pages of 128 slots or a multiple if they are to be read in place on TPUs).
        v_scale: the same for values.
        kv_start_B: int32 position of slot 0 of each row; 0 by default. A device that holds a part
            of a long cache gives its part's first position, and `merge_attention` joins the parts;
            a cache of the last chunk alone gives that chunk's first position.
        page_table_BP: int32; slot s of row b is slot s % page size of page
            page_table[b, s // page size]. Entries past the length may hold anything.
        return_lse: also return the log-sum-exp of the logits, for `merge_attention`.
        backend: "tpu", "gpu" or "reference"; None is the best that takes these shapes here.

    Returns:
        out_BTNH in the dtype of q, zero for queries that see nothing. With `return_lse`, the pair
        (out_BTNH, lse_BTN) in float32; lse is -1e30 where nothing is seen.

    Raises:
        ValueError: shapes or dtypes disagree, or a number is out of range.
        NotImplementedError: the named backend cannot compute this here; the message says why.
    """
    T = q_BTNH.shape[1]
    if not 1 <= T <= MAX_QUERIES:
        raise ValueError(
            f"decode_attention takes 1 to {MAX_QUERIES} queries a row, not {T}; "
            "prefill_attention takes any number"
        )
    return attend_to_cache(
        "decode",
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
