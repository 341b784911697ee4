"""Attention in plain XLA: exact, differentiable, and no work on blocks that nobody sees.

Small problems are one dense block. Larger ones are cut into blocks of queries and of keys: for each
block of queries a loop walks the blocks of keys that it may see, its bounds known only at run time,
and merges what they add by the online softmax. Memory is O(T x block); chunk-local attention costs
what its chunks cost. The gradient recomputes the probabilities of a block from the log-sum-exp, in
the same walk.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.attention.visibility import (
    NEGATIVE,
    Inputs,
    QueryBlocks,
    Settings,
    attention_temperature,
    summarize,
    visible,
)

BLOCK = 256
MAX_DENSE = 1 << 21  # scores of all rows and heads, 8 MB


def dot_f32(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply into float32.

    XLA:CPU has no product of bfloat16 into float32 for some layouts; there the operands are
    widened first, which gives the same result.
    """

    def widened(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x.astype(jnp.float32), y.astype(jnp.float32))

    def direct(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)

    return jax.lax.platform_dependent(x, y, cpu=widened, default=direct)


class _Keys(NamedTuple):
    """A block of keys of one row."""

    k_KSH: jax.Array
    v_KSH: jax.Array
    positions_S: jax.Array
    segments_S: jax.Array


class _Queries(NamedTuple):
    """A block of queries of one row, with what the gradient knows of them."""

    q_KGTH: jax.Array
    positions_T: jax.Array
    segments_T: jax.Array
    lse_KGT: jax.Array
    dout_KGTH: jax.Array
    delta_KGT: jax.Array


def _logits(q: _Queries, keys: _Keys, how: Settings) -> tuple[jax.Array, jax.Array]:
    """Return float32 logits [K, G, T, S], NEGATIVE where nothing is seen, and scale [T] of each."""
    scale_T = jnp.full(q.positions_T.shape, how.scale, jnp.float32)
    if how.temperature is not None:
        scale_T *= attention_temperature(q.positions_T, how.temperature)
    mask_TS = visible(
        q.positions_T[:, None],
        keys.positions_S[None],
        q.segments_T[:, None],
        keys.segments_S[None],
        how.chunk_size,
    )
    logits_KGTS = dot_f32("KGTH,KSH->KGTS", q.q_KGTH, keys.k_KSH) * scale_T[:, None]
    return jnp.where(mask_TS, logits_KGTS, NEGATIVE), scale_T


class Partial(NamedTuple):
    """Attention over some of the keys by the online softmax: not yet divided by the weights' sum.

    Attributes:
        sum_KGTH: values times their weights.
        top_KGT: largest logit so far, which the weights are relative to.
        weight_KGT: sum of the weights.
    """

    sum_KGTH: jax.Array
    top_KGT: jax.Array
    weight_KGT: jax.Array

    @staticmethod
    def nothing(K: int, G: int, T: int, H: int) -> "Partial":
        """Return attention over no keys."""
        top_KGT = jnp.full((K, G, T), NEGATIVE, jnp.float32)
        return Partial(jnp.zeros((K, G, T, H), jnp.float32), top_KGT, jnp.zeros_like(top_KGT))

    def add(self, logits_KGTS: jax.Array, weigh: Callable[[jax.Array], jax.Array]) -> "Partial":
        """See more keys.

        Args:
            logits_KGTS: of the keys, NEGATIVE where one is not seen.
            weigh: adds up the keys' values under given weights KGTS; returns KGTH.
        """
        top_KGT = jnp.maximum(self.top_KGT, logits_KGTS.max(-1))
        # What is not seen has weight 0 even where nothing has been seen and top is NEGATIVE itself.
        seen_KGTS = logits_KGTS > NEGATIVE / 2
        weights_KGTS = jnp.where(seen_KGTS, jnp.exp(logits_KGTS - top_KGT[..., None]), 0.0)
        fade_KGT = jnp.exp(self.top_KGT - top_KGT)
        return Partial(
            self.sum_KGTH * fade_KGT[..., None] + weigh(weights_KGTS),
            top_KGT,
            self.weight_KGT * fade_KGT + weights_KGTS.sum(-1),
        )

    def finish(self) -> tuple[jax.Array, jax.Array]:
        """Return out_KGTH, zero where nothing was seen, and lse_KGT, NEGATIVE there."""
        weight_KGT = jnp.where(self.weight_KGT > 0, self.weight_KGT, 1.0)
        return self.sum_KGTH / weight_KGT[..., None], self.top_KGT + jnp.log(weight_KGT)


def _add_keys(seen: Partial, q: _Queries, keys: _Keys, how: Settings) -> Partial:
    def weigh(weights_KGTS: jax.Array) -> jax.Array:
        return dot_f32("KGTS,KSH->KGTH", weights_KGTS.astype(keys.v_KSH.dtype), keys.v_KSH)

    return seen.add(_logits(q, keys, how)[0], weigh)


def _gradient(q: _Queries, keys: _Keys, how: Settings) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what one pair of blocks adds to dq_KGTH, dk_KSH, dv_KSH, in float32.

    With p = exp(logit - lse): dv = p^T dout, ds = p (dout v^T - delta), and the logits' scale
    belongs to ds.
    """
    logits_KGTS, scale_T = _logits(q, keys, how)
    seen_KGTS = logits_KGTS > NEGATIVE / 2
    p_KGTS = jnp.where(seen_KGTS, jnp.exp(logits_KGTS - q.lse_KGT[..., None]), 0.0)
    dtype = keys.k_KSH.dtype
    dv_KHS = dot_f32("KGTH,KGTS->KHS", q.dout_KGTH, p_KGTS.astype(dtype))
    dp_KGTS = dot_f32("KGTH,KSH->KGTS", q.dout_KGTH, keys.v_KSH)
    ds_KGTS = p_KGTS * (dp_KGTS - q.delta_KGT[..., None]) * scale_T[:, None]
    ds_KGTS = ds_KGTS.astype(dtype)
    dq_KGTH = dot_f32("KGTS,KSH->KGTH", ds_KGTS, keys.k_KSH)
    dk_KHS = dot_f32("KGTH,KGTS->KHS", q.q_KGTH, ds_KGTS)
    return dq_KGTH, dk_KHS.swapaxes(1, 2), dv_KHS.swapaxes(1, 2)


class _Blocks(NamedTuple):
    """A problem in blocks: queries [B * blocks, ...], keys of rows [B, ...], and who meets."""

    queries: _Queries
    keys: _Keys
    met: QueryBlocks
    row: jax.Array
    q_block: int
    kv_block: int

    def block(self, row: jax.Array, j: jax.Array) -> _Keys:
        """Return block j of the keys of a row."""

        def part(x: jax.Array) -> jax.Array:
            start, sizes = self.place(x, row, j)
            return jax.lax.dynamic_slice(x, start, sizes)[0]

        return jax.tree.map(part, self.keys)

    def place(self, x: jax.Array, row: jax.Array, j: jax.Array) -> tuple[tuple, tuple]:
        """Return where block j of a row lies in an array [B, S] or [B, K, S, H], and its sizes."""
        first = j * self.kv_block
        if x.ndim == 2:
            return (row, first), (1, self.kv_block)
        _, K, _, H = x.shape
        return (row, 0, first, 0), (1, K, self.kv_block, H)


def _pad(x_BT: jax.Array, block: int, fill: int = 0) -> jax.Array:
    """Fill rows up to whole blocks."""
    widths = [(0, 0), (0, -x_BT.shape[1] % block)] + [(0, 0)] * (x_BT.ndim - 2)
    return jnp.pad(x_BT, widths, constant_values=fill)


def _cut(
    x: Inputs,
    how: Settings,
    lse_BTN: jax.Array | None = None,
    dout_BTNH: jax.Array | None = None,
    delta_BTN: jax.Array | None = None,
) -> _Blocks:
    """Cut a problem into blocks; padding becomes zeros, which no product can turn into NaN."""
    (B, T, N, H), (S, K) = x.q_BTNH.shape, x.k_BSKH.shape[1:3]
    is_dense = B * N * T * S <= MAX_DENSE
    q_block, kv_block = (T, S) if is_dense else (min(T, BLOCK), min(S, BLOCK))

    def rows(x_BT: jax.Array, fill: int = 0) -> jax.Array:
        padded = _pad(x_BT, q_block, fill)
        return padded.reshape(-1, q_block, *x_BT.shape[2:])

    def real_rows(x_BTNH: jax.Array) -> jax.Array:
        clean = jnp.where(x.q_positions_BT[..., None, None] >= 0, x_BTNH, 0)
        return rows(clean).reshape(-1, q_block, K, N // K, H).transpose(0, 2, 3, 1, 4)

    def per_query(x_BTN: jax.Array | None) -> jax.Array:
        if x_BTN is None:
            x_BTN = jnp.zeros((B, T, N), jnp.float32)
        return rows(x_BTN).reshape(-1, q_block, K, N // K).transpose(0, 2, 3, 1)

    def real_keys(x_BSKH: jax.Array) -> jax.Array:
        clean = jnp.where(x.kv_positions_BS[..., None, None] >= 0, x_BSKH, 0)
        return _pad(clean, kv_block).swapaxes(1, 2)

    q_segments, kv_segments = x.q_segments_BT, x.kv_segments_BS
    if q_segments is None or kv_segments is None:
        q_segments, kv_segments = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
    queries = _Queries(
        real_rows(x.q_BTNH),
        rows(x.q_positions_BT, -1),
        rows(q_segments),
        per_query(lse_BTN),
        real_rows(jnp.zeros_like(x.q_BTNH) if dout_BTNH is None else dout_BTNH),
        per_query(delta_BTN),
    )
    keys = _Keys(
        real_keys(x.k_BSKH),
        real_keys(x.v_BSKH),
        _pad(x.kv_positions_BS, kv_block, -1),
        _pad(kv_segments, kv_block),
    )
    met, _ = summarize(x, how.chunk_size, q_block, kv_block)
    met = jax.tree.map(lambda a: a.reshape(-1), met)
    row = jnp.repeat(jnp.arange(B), len(met.begin) // B)
    return _Blocks(queries, keys, met, row, q_block, kv_block)


def _join(blocks: jax.Array, like_BTNH: jax.Array) -> jax.Array:
    """Turn blocks of queries [B * blocks, K, G, T, ...] back into rows [B, T, N, ...]."""
    B, T, N, _ = like_BTNH.shape
    return jnp.moveaxis(blocks, 3, 1).reshape(B, -1, N, *blocks.shape[4:])[:, :T]


def unsupported_reason(x: Inputs, how: Settings) -> None:
    """Refuse nothing."""


def forward(x: Inputs, how: Settings, *, out_dtype: jax.typing.DTypeLike):
    """Attend. Returns out_BTNH in out_dtype and lse_BTN in float32."""
    cut = _cut(x, how)

    def attend(q: _Queries, row: jax.Array, begin: jax.Array, end: jax.Array):
        def add(j: jax.Array, seen: Partial) -> Partial:
            return _add_keys(seen, q, cut.block(row, j), how)

        return finish(jax.lax.fori_loop(begin, end, add, Partial.nothing(*q.q_KGTH.shape)))

    def whole(q: _Queries, keys: _Keys) -> tuple[jax.Array, jax.Array]:
        return finish(_add_keys(Partial.nothing(*q.q_KGTH.shape), q, keys, how))

    def finish(seen: Partial) -> tuple[jax.Array, jax.Array]:
        out_KGTH, lse_KGT = seen.finish()
        return out_KGTH.astype(out_dtype), lse_KGT

    with jax.named_scope("chunked_attention"):
        if cut.q_block == x.q_BTNH.shape[1] and cut.kv_block == x.k_BSKH.shape[1]:
            out, lse = jax.vmap(whole)(cut.queries, cut.keys)
        else:
            blocks = (cut.queries, cut.row, cut.met.begin, cut.met.end)
            out, lse = jax.lax.map(lambda block: attend(*block), blocks)
    return _join(out, x.q_BTNH), _join(lse, x.q_BTNH)


def backward(
    x: Inputs,
    how: Settings,
    out_BTNH: jax.Array,
    lse_BTN: jax.Array,
    dout_BTNH: jax.Array,
    dlse_BTN: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return dq, dk, dv for the cotangents of `forward`'s results."""
    is_real_BT1 = x.q_positions_BT[..., None] >= 0
    products_BTNH = out_BTNH.astype(jnp.float32) * dout_BTNH.astype(jnp.float32)
    delta_BTN = jnp.where(is_real_BT1, products_BTNH.sum(-1) - dlse_BTN, 0)
    cut = _cut(x, how, lse_BTN, dout_BTNH.astype(x.q_BTNH.dtype), delta_BTN)
    k_shape = cut.keys.k_KSH.shape

    def attend(sums: tuple[jax.Array, jax.Array], block):
        q, row, begin, end = block

        def add(j: jax.Array, so_far):
            dq_KGTH, sums = so_far
            more_q, *more = _gradient(q, cut.block(row, j), how)

            def grow(total: jax.Array, part: jax.Array) -> jax.Array:
                start, sizes = cut.place(total, row, j)
                part = jax.lax.dynamic_slice(total, start, sizes) + part[None]
                return jax.lax.dynamic_update_slice(total, part, start)

            return dq_KGTH + more_q, tuple(map(grow, sums, more))

        nothing = jnp.zeros(q.q_KGTH.shape, jnp.float32)
        dq_KGTH, sums = jax.lax.fori_loop(begin, end, add, (nothing, sums))
        return sums, dq_KGTH.astype(x.q_BTNH.dtype)

    with jax.named_scope("chunked_attention_backward"):
        if cut.q_block == x.q_BTNH.shape[1] and cut.kv_block == x.k_BSKH.shape[1]:
            dq, dk, dv = jax.vmap(lambda q, keys: _gradient(q, keys, how))(cut.queries, cut.keys)
        else:
            nothing = jnp.zeros(k_shape, jnp.float32)
            blocks = (cut.queries, cut.row, cut.met.begin, cut.met.end)
            (dk, dv), dq = jax.lax.scan(attend, (nothing, nothing), blocks)
    S = x.k_BSKH.shape[1]
    dk_BSKH, dv_BSKH = (d.swapaxes(1, 2)[:, :S].astype(x.k_BSKH.dtype) for d in (dk, dv))
    return _join(dq, x.q_BTNH).astype(x.q_BTNH.dtype), dk_BSKH, dv_BSKH
