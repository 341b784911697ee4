"""The attention operations: what they compute, and the checks that every backend shares."""

import functools
import math
from types import ModuleType

import jax
import jax.numpy as jnp

from kernels_pallas.attention.visibility import NEGATIVE, Inputs, Settings
from kernels_pallas.backend import Backend, choose, vary_alike


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
    backend: Backend | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attend by position: causally, and inside fixed chunks if `chunk_size` is given.

    A query at position p sees a key at position t iff 0 <= t <= p, both have the same segment, and,
    with a chunk size, t // chunk_size == p // chunk_size. Query head n reads kv head n // (N / K).
    Equal positions everywhere make it non-causal attention. Reverse-mode differentiable in q, k
    and v, through the log-sum-exp too.

    Args:
        q_BTNH: queries.
        k_BSKH: keys; N must be a multiple of K.
        v_BSKH: values.
        q_positions_BT: int32 positions of the queries, 0-based; negative is padding, whose q, k and
            v may hold anything, NaN included.
        kv_positions_BS: int32 positions of the keys; negative is padding, which nothing sees.
        q_segments_BT: int32 segment of each query in a packed row.
        kv_segments_BS: int32 segment of each key; given iff the queries' are.
        chunk_size: tokens in a chunk.
        temperature: (floor, coefficient) of the factor 1 + coefficient * ln((p + 1) // floor + 1)
            on the float32 logits.
        scale: factor on the logits; 1 / sqrt(H) by default.
        return_lse: also return the log-sum-exp of the logits, for `merge_attention`.
        backend: "tpu", "gpu" or "reference"; None is the best that takes these shapes here.

    Returns:
        out_BTNH in the dtype of q, zero for queries that see nothing. With `return_lse`, the pair
        (out_BTNH, lse_BTN) in float32; lse is -1e30 where nothing is seen.

    Raises:
        ValueError: shapes disagree, segments are given on one side only, or a number is not
            positive.
        NotImplementedError: the named backend cannot compute this here; the message says why.
    """
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    expected = {
        "k_BSKH": (k_BSKH.shape, (B, S, K, H)),
        "v_BSKH": (v_BSKH.shape, (B, S, K, H)),
        "q_positions_BT": (q_positions_BT.shape, (B, T)),
        "kv_positions_BS": (kv_positions_BS.shape, (B, S)),
    }
    if (q_segments_BT is None) != (kv_segments_BS is None):
        raise ValueError("give q_segments_BT and kv_segments_BS together or not at all")
    if q_segments_BT is not None and kv_segments_BS is not None:
        expected["q_segments_BT"] = (q_segments_BT.shape, (B, T))
        expected["kv_segments_BS"] = (kv_segments_BS.shape, (B, S))
    for name, (shape, wanted) in expected.items():
        if shape != wanted:
            raise ValueError(f"{name} has shape {shape}; q_BTNH {q_BTNH.shape} asks for {wanted}")
    how = settings(N, K, H, chunk_size, temperature, scale)
    x = Inputs(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        jnp.asarray(q_positions_BT, jnp.int32),
        jnp.asarray(kv_positions_BS, jnp.int32),
        None if q_segments_BT is None else jnp.asarray(q_segments_BT, jnp.int32),
        None if kv_segments_BS is None else jnp.asarray(kv_segments_BS, jnp.int32),
    )
    x = vary_alike(x)
    dtype = jnp.dtype(jnp.float32) if return_lse else q_BTNH.dtype
    if B * T * S:
        out_BTNH, lse_BTN = _attend(choose(backend, "attention", x, how), how, dtype, x)
    else:  # nobody sees anything
        out_BTNH = jnp.zeros_like(x.q_BTNH, dtype)
        lse_BTN = jnp.full_like(x.q_BTNH, NEGATIVE, jnp.float32, shape=(B, T, N))
    return (out_BTNH, lse_BTN) if return_lse else out_BTNH


def settings(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    chunk_size: int | None,
    temperature: tuple[int, float] | None,
    scale: float | None,
) -> Settings:
    """Check the static arguments of an attention operation and fill in the scale.

    Raises:
        ValueError: the heads do not divide, or a number is not positive.
    """
    if num_heads % num_kv_heads:
        raise ValueError(
            f"query heads ({num_heads}) must be a multiple of kv heads ({num_kv_heads})"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size ({chunk_size}) must be at least 1, or None for no chunks")
    if temperature is not None and temperature[0] < 1:
        raise ValueError(f"the floor of temperature ({temperature[0]}) must be at least 1")
    return Settings(chunk_size, temperature, 1 / math.sqrt(head_dim) if scale is None else scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
    chosen: ModuleType, how: Settings, dtype: jnp.dtype, x: Inputs
) -> tuple[jax.Array, jax.Array]:
    """Return out_BTNH in the dtype, and lse_BTN in float32."""
    return chosen.forward(x, how, out_dtype=dtype)


def _attend_fwd(chosen: ModuleType, how: Settings, dtype: jnp.dtype, x: Inputs):
    out_BTNH, lse_BTN = chosen.forward(x, how, out_dtype=dtype)
    return (out_BTNH, lse_BTN), (x, out_BTNH, lse_BTN)


def _attend_bwd(
    chosen: ModuleType,
    how: Settings,
    dtype: jnp.dtype,
    saved: tuple[Inputs, jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[Inputs]:
    dq, dk, dv = chosen.backward(saved[0], how, *saved[1:], *cotangents)
    return (Inputs(dq, dk, dv, None, None, None, None),)  # type: ignore[arg-type]


_attend.defvjp(_attend_fwd, _attend_bwd)


def merge_attention(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Combine attention over disjoint sets of keys into attention over their union, exactly.

    Args:
        outs: [shards, ..., H] float32 outputs of `chunked_attention(return_lse=True)` or
            `decode_attention(return_lse=True)`.
        lses: [shards, ...] float32 log-sum-exps.

    Returns:
        (out [..., H], lse [...]) float32.

    Raises:
        ValueError: the shapes disagree.
    """
    if outs.shape[:-1] != lses.shape:
        raise ValueError(f"outs {outs.shape} less its last axis must match lses {lses.shape}")
    top = jax.lax.stop_gradient(lses.max(0))
    weights = jnp.exp(lses - top)
    total = weights.sum(0)
    out = (outs * weights[..., None]).sum(0) / total[..., None]
    return out, jnp.where(top > NEGATIVE / 2, top + jnp.log(total), NEGATIVE)
