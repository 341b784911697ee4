"""Decode attention: what it computes, and the checks that every backend shares."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention.api import settings
from kernels_pallas.backend import Backend, choose, vary_alike
from kernels_pallas.decode.inputs import Inputs

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
            [B, S, K], one for each token and head ([pages, page size, K] with a page table).
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
    (B, T, N, H), (rows, S, K) = q_BTNH.shape, k_BSKH.shape[:3]
    if not 1 <= T <= MAX_QUERIES:
        raise ValueError(
            f"decode_attention takes 1 to {MAX_QUERIES} queries a row, not {T}; "
            "chunked_attention takes any number"
        )
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
    dtype = jnp.dtype(jnp.float32) if return_lse or folds_v else q_BTNH.dtype
    out_BTNH, lse_BTN = choose(backend, "decode", x, how).forward(x, how, out_dtype=dtype)
    if per_channel_v is not None:
        out_BTNH *= jnp.repeat(per_channel_v, N // K, axis=0)
    return (out_BTNH, lse_BTN) if return_lse else out_BTNH.astype(q_BTNH.dtype)


def _split(scale: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """Return scales of channels [K, H] and of tokens [B, S, K], at most one of them."""
    if scale is None:
        return None, None
    scale = scale.astype(jnp.float32)
    return (scale, None) if scale.ndim == 2 else (None, scale)
