"""The attention operations: what they compute, and the checks that every backend shares."""

import jax

from kernels_pallas.attention import reference


def chunked_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    q_segments_BT: jax.Array | None = None,
    kv_segments_BS: jax.Array | None = None,
    chunk_size: int | None = None,
    temperature: tuple[int, float] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attend by position: causally, and inside fixed chunks if `chunk_size` is given.

    A query at position p sees a key at position t iff 0 <= t <= p, both have the same segment, and,
    with a chunk size, t // chunk_size == p // chunk_size. Query head n reads kv head n // (N / K).
    Equal positions everywhere make it non-causal attention.

    Args:
        q_BTNH: queries.
        k_BSKH: keys; N must be a multiple of K.
        v_BSKH: values.
        q_positions_BT: int32 positions of the queries, 0-based; negative is padding.
        kv_positions_BS: int32 positions of the keys; negative is padding, which nothing sees.
        q_segments_BT: int32 segment of each query in a packed row.
        kv_segments_BS: int32 segment of each key; given iff the queries' are.
        chunk_size: tokens in a chunk.
        temperature: (floor, coefficient) of the factor 1 + coefficient * ln((p + 1) // floor + 1)
            on the float32 logits.
        scale: factor on the logits; 1 / sqrt(H) by default.
        return_lse: also return the log-sum-exp of the logits, for `merge_attention`.

    Returns:
        out_BTNH in the dtype of q, zero for queries that see nothing. With `return_lse`, the pair
        (out_BTNH, lse_BTN) in float32; lse is -1e30 where nothing is seen.

    Raises:
        ValueError: shapes disagree, or segments are given on one side only.
    """
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    expected = {
        "k_BSKH": (k_BSKH.shape, (B, S, K, H)),
        "v_BSKH": (v_BSKH.shape, (B, S, K, H)),
        "q_positions_BT": (q_positions_BT.shape, (B, T)),
        "kv_positions_BS": (kv_positions_BS.shape, (B, S)),
    }
    for name, (shape, wanted) in expected.items():
        if shape != wanted:
            raise ValueError(f"{name} has shape {shape}; q_BTNH {q_BTNH.shape} asks for {wanted}")
    if N % K:
        raise ValueError(f"query heads ({N}) must be a multiple of kv heads ({K})")
    if (q_segments_BT is None) != (kv_segments_BS is None):
        raise ValueError("give q_segments_BT and kv_segments_BS together or not at all")
    return reference.chunked_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        q_positions_BT=q_positions_BT,
        kv_positions_BS=kv_positions_BS,
        q_segments_BT=q_segments_BT,
        kv_segments_BS=kv_segments_BS,
        chunk_size=chunk_size,
        temperature=temperature,
        scale=scale,
        return_lse=return_lse,
    )


def merge_attention(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Combine attention over disjoint sets of keys into attention over their union, exactly.

    Args:
        outs: [shards, ..., H] float32 outputs of `chunked_attention(return_lse=True)`.
        lses: [shards, ...] float32 log-sum-exps.

    Returns:
        (out [..., H], lse [...]) float32.
    """
    if outs.shape[:-1] != lses.shape:
        raise ValueError(f"outs {outs.shape} less its last axis must match lses {lses.shape}")
    return reference.merge_attention(outs, lses)
