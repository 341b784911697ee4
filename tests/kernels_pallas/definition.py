"""What the attention operations compute, in float64 numpy with the whole mask written out."""

import numpy as np

NEGATIVE = -1e30


def mask_of(q_pos, kv_pos, q_seg, kv_seg, chunk):
    """[B, T, S]: same segment, not in the future, same chunk, and no padding."""
    q, kv = q_pos[:, :, None], kv_pos[:, None, :]
    seen = (kv >= 0) & (kv <= q)
    if chunk is not None:
        seen &= kv // chunk == q // chunk
    if q_seg is not None:
        seen &= q_seg[:, :, None] == kv_seg[:, None, :]
    return seen


def probabilities(q, k, mask, q_pos, temperature, scale):
    """Probabilities and scaled logits' factor [B, N, T, S], log-sum-exps [B, T, N]."""
    N, K, H = q.shape[2], k.shape[2], q.shape[3]
    factor = np.full(q_pos.shape, H**-0.5 if scale is None else scale)
    if temperature is not None:
        floor, coefficient = temperature
        factor = factor * (1 + coefficient * np.log(np.maximum(q_pos + 1, 0) // floor + 1))
    k = np.repeat(k, N // K, axis=2)
    logits = np.einsum("BTNH,BSNH->BNTS", q, k) * factor[:, None, :, None]
    logits = np.where(mask[:, None], logits, -np.inf)
    top = logits.max(-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    p = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, top + np.log(total), NEGATIVE)[..., 0]
    return p, factor, lse.transpose(0, 2, 1)


def attention(q, k, v, mask, q_pos, temperature=None, scale=None):
    """(out_BTNH, lse_BTN)."""
    p, _, lse = probabilities(q, k, mask, q_pos, temperature, scale)
    v = np.repeat(v, q.shape[2] // v.shape[2], axis=2)
    return np.einsum("BNTS,BSNH->BTNH", p, v), lse


def gradient(q, k, v, mask, q_pos, dout, dlse, temperature=None, scale=None):
    """(dq, dk, dv) of sum(out * dout) + sum(lse * dlse)."""
    (B, _, N, H), (S, K) = q.shape, k.shape[1:3]
    p, factor, _ = probabilities(q, k, mask, q_pos, temperature, scale)
    wide_k, wide_v = (np.repeat(a, N // K, axis=2) for a in (k, v))
    dp = np.einsum("BTNH,BSNH->BNTS", dout, wide_v)
    mean = (p * dp).sum(-1, keepdims=True)
    ds = p * (dp - mean + dlse.transpose(0, 2, 1)[..., None]) * factor[:, None, :, None]
    dk = np.einsum("BNTS,BTNH->BSNH", ds, q).reshape(B, S, K, N // K, H).sum(3)
    dv = np.einsum("BNTS,BTNH->BSNH", p, dout).reshape(B, S, K, N // K, H).sum(3)
    return np.einsum("BNTS,BSNH->BTNH", ds, wide_k), dk, dv
