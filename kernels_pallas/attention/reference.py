"""Attention in plain XLA: exact, differentiable, scores of one block alive at a time."""

import math

import jax
import jax.numpy as jnp

QUERY_BLOCK = 512
KEY_BLOCK = 8192
NEGATIVE = -1e30


def visible(
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    q_segments_BT: jax.Array | None,
    kv_segments_BS: jax.Array | None,
    chunk_size: int | None,
) -> jax.Array:
    """Return the mask [B, T, S]: same segment, not in the future, same chunk if there are chunks.

    A negative position marks padding, which no query sees.
    """
    q_BT1, kv_B1S = q_positions_BT[:, :, None], kv_positions_BS[:, None, :]
    mask_BTS = (kv_B1S >= 0) & (kv_B1S <= q_BT1)
    if chunk_size is not None:
        mask_BTS &= kv_B1S // chunk_size == q_BT1 // chunk_size
    if q_segments_BT is not None and kv_segments_BS is not None:
        mask_BTS &= q_segments_BT[:, :, None] == kv_segments_BS[:, None, :]
    return mask_BTS


def attention_temperature(positions: jax.Array, temperature: tuple[int, float]) -> jax.Array:
    """Compute s(p) = 1 + coefficient * ln(floor((p + 1) / floor) + 1) in float32.

    Positions stay integers until the floor is taken: in bfloat16 the steps would move.
    """
    floor, coefficient = temperature
    steps = (jnp.maximum(positions, 0) + 1) // floor
    return 1.0 + coefficient * jnp.log1p(steps.astype(jnp.float32))


def _dot_f32(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply into float32.

    XLA:CPU has no product of bfloat16 into float32 for some layouts; there the operands are
    widened first, which gives the same result.
    """

    def widened(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x.astype(jnp.float32), y.astype(jnp.float32))

    def direct(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)

    return jax.lax.platform_dependent(x, y, cpu=widened, default=direct)


def _attend_block(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    logit_scale_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Attend one block of queries to all keys; one that sees nothing gets zeros and lse -1e30."""
    scores_BKGTS = _dot_f32("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH)
    scores_BKGTS *= logit_scale_BT[:, None, None, :, None]
    mask_B11TS = mask_BTS[:, None, None]
    scores_BKGTS = jnp.where(mask_B11TS, scores_BKGTS, NEGATIVE)
    top_BKGT1 = jax.lax.stop_gradient(scores_BKGTS.max(-1, keepdims=True))
    weights_BKGTS = jnp.where(mask_B11TS, jnp.exp(scores_BKGTS - top_BKGT1), 0.0)
    sum_BKGT1 = weights_BKGTS.sum(-1, keepdims=True)
    probs_BKGTS = weights_BKGTS / jnp.maximum(sum_BKGT1, 1e-37)
    out_BTKGH = _dot_f32("BKGTS,BSKH->BTKGH", probs_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    lse_BKGT = jnp.where(
        sum_BKGT1 > 0, top_BKGT1 + jnp.log(jnp.maximum(sum_BKGT1, 1e-37)), NEGATIVE
    )[..., 0]
    return out_BTKGH, lse_BKGT


def _merge_two(
    one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Combine (out_BTKGH, lse_BKGT) over two disjoint sets of keys."""
    out_2BTKGH, lse_2BKGT = (jnp.stack(pair) for pair in zip(one, other, strict=True))
    out_BTKGH, lse_BTKG = merge_attention(out_2BTKGH, lse_2BKGT.transpose(0, 1, 4, 2, 3))
    return out_BTKGH, lse_BTKG.transpose(0, 2, 3, 1)


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
    """Attend causally by position, inside chunks if there are. See `api.chunked_attention`."""
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    scale = 1.0 / math.sqrt(H) if scale is None else scale
    logit_scale_BT = jnp.full((B, T), scale, jnp.float32)
    if temperature is not None:
        logit_scale_BT *= attention_temperature(q_positions_BT, temperature)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)

    def block(start: jax.Array | int, size: int) -> tuple[jax.Array, jax.Array]:
        def rows(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

        def against(begin: jax.Array | int, count: int) -> tuple[jax.Array, jax.Array]:
            # The last block of keys starts early enough to be whole.
            first = jnp.minimum(begin, S - count)

            def columns(x: jax.Array) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(x, first, count, axis=1)

            mask_BTS = visible(
                rows(q_positions_BT),
                columns(kv_positions_BS),
                None if q_segments_BT is None else rows(q_segments_BT),
                None if kv_segments_BS is None else columns(kv_segments_BS),
                chunk_size,
            )
            mask_BTS &= first + jnp.arange(count) >= begin
            k, v = columns(k_BSKH), columns(v_BSKH)
            return _attend_block(rows(q_BTKGH), k, v, mask_BTS, rows(logit_scale_BT))

        if size * S <= QUERY_BLOCK * KEY_BLOCK or S <= KEY_BLOCK:
            return against(0, S)

        @jax.checkpoint
        def add_keys(
            seen: tuple[jax.Array, jax.Array], begin: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            return _merge_two(seen, against(begin, KEY_BLOCK)), None

        nothing = (
            jnp.zeros((B, size, K, N // K, H), jnp.float32),
            jnp.full((B, K, N // K, size), NEGATIVE, jnp.float32),
        )
        return jax.lax.scan(add_keys, nothing, jnp.arange(0, S, KEY_BLOCK))[0]

    with jax.named_scope("chunked_attention"):
        if T <= QUERY_BLOCK:
            out_BTKGH, lse_BKGT = block(0, T)
        else:
            # The last block starts early enough to be whole, and rewrites rows it shares.
            starts = jnp.minimum(jnp.arange(0, T, QUERY_BLOCK), T - QUERY_BLOCK)

            @jax.checkpoint
            def step(_: None, start: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
                return None, block(start, QUERY_BLOCK)

            _, (outs, lses) = jax.lax.scan(step, None, starts)
            whole = T // QUERY_BLOCK
            rest = T - whole * QUERY_BLOCK

            def join(blocks: jax.Array, axis: int) -> jax.Array:
                parts = [blocks[i] for i in range(whole)]
                if rest:
                    start = QUERY_BLOCK - rest
                    parts.append(jax.lax.slice_in_dim(blocks[-1], start, None, axis=axis))
                return jnp.concatenate(parts, axis)

            out_BTKGH, lse_BKGT = join(outs, 1), join(lses, 3)
    out_BTNH = out_BTKGH.reshape(B, T, N, H)
    if not return_lse:
        return out_BTNH.astype(q_BTNH.dtype)
    return out_BTNH, lse_BKGT.transpose(0, 3, 1, 2).reshape(B, T, N)


def merge_attention(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Combine attention over disjoint sets of keys. See `api.merge_attention`."""
    top = jax.lax.stop_gradient(lses.max(0))
    weights = jnp.exp(lses - top)
    total = jnp.maximum(weights.sum(0), 1e-37)
    out = (outs * weights[..., None]).sum(0) / total[..., None]
    return out, jnp.where(top > NEGATIVE / 2, top + jnp.log(total), NEGATIVE)
