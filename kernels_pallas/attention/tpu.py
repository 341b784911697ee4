"""Chunked attention on TPUs: one program for the query heads of a kv head and a block of queries.

A program keeps its queries in VMEM and walks over the blocks of keys that they see, with the online
softmax in base 2. The heads of a group share each copy of keys and values, and the mask, which is
only computed where a block is seen in part. Running sums stay separate in each lane until the end:
a sum across lanes for each block would cost more than the additions.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import backend
from kernels_pallas.attention import tpu_blocks as tb
from kernels_pallas.attention.tpu_backward import backward
from kernels_pallas.attention.visibility import (
    NEGATIVE,
    Inputs,
    Settings,
    may_see,
    sees_all,
    summarize,
)
from kernels_pallas.tpu_primitives import LANES, dot

__all__ = ["backward", "forward", "refusal"]


def refusal(x: Inputs, how: Settings) -> str | None:
    """Return why these arrays cannot be taken, or None if they can."""
    dtypes = {x.q_BTNH.dtype, x.k_BSKH.dtype, x.v_BSKH.dtype}
    if len(dtypes) > 1 or dtypes.pop() not in (jnp.bfloat16, jnp.float32):
        return "q, k and v must all be bfloat16 or all float32"
    needed = tb.scalar_bytes(_cut(x))
    if needed > tb.SMEM_BUDGET:
        return f"the summaries of its blocks take {needed} bytes of SMEM, over {tb.SMEM_BUDGET}"
    return None


def _cut(x: Inputs) -> tb.Shape:
    """Choose the blocks: some thousand rows of queries for each copy of a block of keys."""
    return tb.cut(x, "forward", q=tb.query_block(x), kv=512, q_tile=16, kv_tile=LANES)


def _kernel(s: tb.Shape, how: Settings):
    """Return the kernel for static sizes and settings."""

    def kernel(
        q_scalars, kv_scalars, q_marks, q_ref, kv_marks_hbm, k_hbm, v_hbm,
        out_ref, lse_ref,
        columns, factors, acc, top, total, kv_marks, k_buf, v_buf, slot_ref, arrived,
    ):  # fmt: skip
        b, h, i = (pl.program_id(axis) for axis in range(3))
        q = tb.q_at(q_scalars, i)

        def copies(j, slot):
            keys = pl.ds(j * s.bkv, s.bkv)
            sources = (kv_marks_hbm.at[b, j], k_hbm.at[b, h, keys], v_hbm.at[b, h, keys])
            return tb.copies(sources, (kv_marks, k_buf, v_buf), slot, arrived)

        def attend(slot, is_masked):
            mask = tb.mask(columns, kv_marks[slot]) if is_masked else None

            def begin(g):
                logits = dot(q_ref[g], k_buf[slot], (1, 1))
                logits *= tb.factor(factors, how, s.bkv)
                return logits if mask is None else jnp.where(mask, logits, tb.HIDDEN)

            def finish(g, logits):
                new_top = jnp.maximum(top[g], logits.max(1, keepdims=True))
                weights = jnp.exp2(logits - tb.wide(new_top, s.bkv))
                shrink = jnp.exp2(top[g] - new_top)
                lanes = [weights[:, n : n + LANES] for n in range(0, s.bkv, LANES)]
                total[g] = total[g] * shrink + sum(lanes[1:], lanes[0])
                seen = dot(weights.astype(v_buf.dtype), v_buf[slot], (1, 0))
                acc[g] = acc[g] * tb.wide(shrink, s.H) + seen
                top[g] = new_top

            tb.heads_ahead(s.G, begin, finish)

        def visit(j, slot):
            kv = tb.kv_at(kv_scalars, j)
            is_whole = sees_all(q, kv)

            @pl.when(kv.padding > 0)
            def _():
                tb.clear_padding(kv_marks[slot, :1], v_buf.at[slot])

            pl.when(is_whole)(lambda: attend(slot, False))
            pl.when(~is_whole)(lambda: attend(slot, True))

        def finish(g):
            sum_ = total[g].sum(1, keepdims=True)
            is_seen = sum_ > 0
            out_ref[g] = (acc[g] * jnp.where(is_seen, 1.0 / sum_, 0.0)).astype(out_ref.dtype)
            lse = jnp.where(is_seen, top[g] * tb.LN_2 + jnp.log(sum_), NEGATIVE)
            lse_ref[pl.ds(g, 1)] = lse.T[:1]

        tb.set_columns(columns, factors, q_marks, how)
        acc[...] = jnp.zeros_like(acc)
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, NEGATIVE)
        tb.walk(
            i,
            s.nq,
            bounds=lambda i: (tb.q_at(q_scalars, i).begin, tb.q_at(q_scalars, i).end),
            seen=lambda i, j: may_see(tb.q_at(q_scalars, i), tb.kv_at(kv_scalars, j)),
            copies=copies,
            slot_ref=slot_ref,
            visit=visit,
        )
        tb.heads(s.G, finish)

    return kernel


def forward(x: Inputs, how: Settings, *, out_dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Attend.

    Args:
        x: the arrays.
        how: the static arguments.
        out_dtype: of the output.

    Returns:
        out_BTNH in out_dtype, and lse_BTN float32.
    """
    s = _cut(x)
    q_summary, kv_summary = summarize(x, how.chunk_size, s.bq, s.bkv)
    q_marks = tb.marks(x.q_positions_BT, x.q_segments_BT, s.bq)
    kv_marks = tb.marks(x.kv_positions_BS, x.kv_segments_BS, s.bkv)
    k_BKSH = tb.padded(x.k_BSKH.swapaxes(1, 2), 2, s.bkv)
    v_BKSH = tb.padded(x.v_BSKH.swapaxes(1, 2), 2, s.bkv)
    m, q_size, dtype = kv_marks.shape[2], x.q_BTNH.dtype.itemsize, x.q_BTNH.dtype

    q_spec = pl.BlockSpec((None, None, s.G, s.bq, s.H), lambda b, h, i: (b, h, 0, i, 0))
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    row = (s.bq, LANES)
    out_size = s.B * s.K * s.G * s.T * s.H
    out_BKGTH, lse_BKnGT = pl.pallas_call(
        _kernel(s, how),
        grid=(s.B, s.K, s.nq),
        in_specs=[
            tb.scalars_spec(q_summary),
            tb.scalars_spec(kv_summary),
            pl.BlockSpec((None, None, m, s.bq), lambda b, h, i: (b, i, 0, 0)),
            q_spec,
            in_hbm,
            in_hbm,
            in_hbm,
        ],
        out_specs=[
            q_spec,
            pl.BlockSpec((None, None, None, s.G, s.bq), lambda b, h, i: (b, h, i, 0, 0)),
        ],
        out_shape=[
            backend.like(x.q_BTNH, (s.B, s.K, s.G, s.T, s.H), out_dtype),
            backend.like(x.q_BTNH, (s.B, s.K, s.nq, s.G, s.bq), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((m + 1, *row), jnp.int32),
            pltpu.VMEM(row, jnp.float32),
            pltpu.VMEM((s.G, s.bq, s.H), jnp.float32),
            pltpu.VMEM((s.G, *row), jnp.float32),
            pltpu.VMEM((s.G, *row), jnp.float32),
            pltpu.VMEM((2, m, s.bkv), jnp.int32),
            pltpu.VMEM((2, s.bkv, s.H), dtype),
            pltpu.VMEM((2, s.bkv, s.H), dtype),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA((3, 2)),
        ],
        compiler_params=tb.params(),
        cost_estimate=tb.cost(
            s,
            how,
            products=2,
            owned=out_size * (q_size + jnp.dtype(out_dtype).itemsize),
            walked=s.bkv * (2 * s.H * q_size + 4 * m),
        ),
        interpret=backend.tpu_interpreter(),
        name="chunked_attention_forward",
    )(
        tb.scalars(q_summary), tb.scalars(kv_summary), q_marks, tb.head_major(x.q_BTNH, s.K),
        kv_marks, k_BKSH, v_BKSH,
    )  # fmt: skip
    lse_BTN = lse_BKnGT.transpose(0, 2, 4, 1, 3).reshape(s.B, -1, s.K * s.G)[:, : s.T]
    return tb.token_major(out_BKGTH), lse_BTN
