"""The gradient of chunked attention on TPUs: one kernel for queries, one for keys and values.

Both make the weights anew from the log-sum-exp. With w the weights, ds = w * (dout v' - delta),
where delta = sum(out * dout) - dlse, dq = ds k and dk = ds' q, both times the factor on the logits,
and dv = w' dout. Two kernels because each sum then stays in VMEM: the one for queries is the
forward kernel with another sum, and the one for keys works on transposed logits [keys, queries], so
that what belongs to a query (lse, delta, positions) is a lane row as it comes from HBM.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import backend
from kernels_pallas.attention import tpu_blocks as tb
from kernels_pallas.attention import tpu_sizes
from kernels_pallas.attention.tpu_sizes import Holds
from kernels_pallas.attention.visibility import (
    Inputs,
    Settings,
    attention_temperature,
    first_visible,
    may_see,
    sees_all,
    summarize,
)
from kernels_pallas.tpu_primitives import LANES, dot, in_hbm

# q, dout, dq; k, v
_HOLD_QUERIES = Holds(queries=6, query_sums=1, rows=2, keys=4, key_sums=0)
# q, dout; k, v, dk, dv
_HOLD_KEYS = Holds(queries=4, query_sums=0, rows=0, keys=8, key_sums=2)


def _cut_queries(x: Inputs) -> tpu_sizes.Shape:
    return tpu_sizes.cut(x, "backward_dq", q_tile=16, kv_tile=LANES, holds=_HOLD_QUERIES)


def _cut_keys(x: Inputs) -> tpu_sizes.Shape:
    return tpu_sizes.cut(x, "backward_dkv", q_tile=LANES, kv_tile=16, holds=_HOLD_KEYS)


def cuts(
    x: Inputs,
) -> tuple[tuple[tpu_sizes.Shape, tpu_sizes.Holds], tuple[tpu_sizes.Shape, tpu_sizes.Holds]]:
    """Return the blocks of both kernels, and how many of them each holds."""
    return (_cut_queries(x), _HOLD_QUERIES), (_cut_keys(x), _HOLD_KEYS)


def _queries_kernel(s: tpu_sizes.Shape, how: Settings):
    """Return the kernel for dq for static sizes and settings."""

    def kernel(
        q_scalars, kv_scalars, q_marks, rows, q_ref, dout_ref, kv_marks_hbm, k_hbm, v_hbm,
        dq_ref,
        columns, factors, row_columns, acc, kv_marks, k_buf, v_buf, slot_ref, arrived,
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
                if mask is not None:
                    logits = jnp.where(mask, logits, tb.HIDDEN)
                return logits, dot(dout_ref[g], v_buf[slot], (1, 1))

            def finish(g, begun):
                logits, dweights = begun
                weights = jnp.exp2(logits - tb.wide(row_columns[g], s.bkv))
                dlogits = weights * (dweights - tb.wide(row_columns[s.G + g], s.bkv))
                acc[g] += dot(dlogits.astype(k_buf.dtype), k_buf[slot], (1, 0))

            tb.heads_ahead(s.G, begin, finish)

        def visit(j, slot):
            kv = tb.kv_at(kv_scalars, j)
            is_whole = sees_all(q, kv)

            @pl.when(kv.padding > 0)
            def _():
                tb.clear_padding(kv_marks[slot, :1], k_buf.at[slot], v_buf.at[slot])

            pl.when(is_whole)(lambda: attend(slot, False))
            pl.when(~is_whole)(lambda: attend(slot, True))

        def begin(g):
            row_columns[g] = tb.column(rows[pl.ds(g, 1)])
            row_columns[s.G + g] = tb.column(rows[pl.ds(s.G + g, 1)])

        def finish(g):
            dq = acc[g] * (tb.factor(factors, how, s.H) * tb.LN_2)
            is_real = tb.wide(columns[1], s.H) >= 0
            dq_ref[g] = jnp.where(is_real, dq, 0.0).astype(dq_ref.dtype)

        tb.set_columns(columns, factors, q_marks, how)
        acc[...] = jnp.zeros_like(acc)
        tb.heads(s.G, begin)
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


def _keys_kernel(s: tpu_sizes.Shape, how: Settings):
    """Return the kernel for dk and dv for static sizes and settings."""

    def kernel(
        q_scalars, kv_scalars, kv_marks, k_ref, v_ref, q_marks_hbm, rows_hbm, q_hbm, dout_hbm,
        dk_ref, dv_ref,
        columns, dk, dv, q_marks, rows, q_buf, dout_buf, slot_ref, arrived,
    ):  # fmt: skip
        b, h, j = (pl.program_id(axis) for axis in range(3))
        kv = tb.kv_at(kv_scalars, j)

        def copies(i, slot):
            queries = pl.ds(i * s.bq, s.bq)
            sources = (
                q_marks_hbm.at[b, i],
                rows_hbm.at[b, h, i],
                q_hbm.at[b, h, :, queries],
                dout_hbm.at[b, h, :, queries],
            )
            return tb.copies(sources, (q_marks, rows, q_buf, dout_buf), slot, arrived)

        def mask_of(slot):
            hi = q_marks[slot, :1]
            positions = tb.wide(columns[0], s.bq)
            mask = (positions >= first_visible(hi, how.chunk_size)) & (positions <= hi)
            if q_marks.shape[1] == 2:
                mask &= tb.wide(columns[1], s.bq) == q_marks[slot, 1:]
            return mask

        def attend(slot, is_masked):
            mask = mask_of(slot) if is_masked else None
            factor = how.scale
            if how.temperature is not None:
                factor *= attention_temperature(q_marks[slot, :1], how.temperature)

            def head(g):
                logits = dot(k_ref[...], q_buf[slot, g], (1, 1)) * (factor * tb.LOG2_E)
                if mask is not None:
                    logits = jnp.where(mask, logits, tb.HIDDEN)
                weights = jnp.exp2(logits - rows[slot, pl.ds(g, 1)])
                dv[...] += dot(weights.astype(dout_buf.dtype), dout_buf[slot, g], (1, 0))
                dweights = dot(v_ref[...], dout_buf[slot, g], (1, 1))
                dlogits = weights * (dweights - rows[slot, pl.ds(s.G + g, 1)])
                if how.temperature is not None:
                    dlogits *= factor
                dk[...] += dot(dlogits.astype(q_buf.dtype), q_buf[slot, g], (1, 0))

            tb.heads(s.G, head)

        def visit(i, slot):
            q = tb.q_at(q_scalars, i)
            is_whole = sees_all(q, kv)

            @pl.when(q.hi_min < 0)
            def _():
                def clear(g):
                    refs = q_buf.at[slot, g], dout_buf.at[slot, g]
                    tb.clear_padding(q_marks[slot, :1], *refs)

                tb.heads(s.G, clear)

            pl.when(is_whole)(lambda: attend(slot, False))
            pl.when(~is_whole)(lambda: attend(slot, True))

        for n in range(kv_marks.shape[0]):
            columns[n] = tb.column(kv_marks[n : n + 1])
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)
        tb.walk(
            j,
            s.nkv,
            bounds=lambda j: (tb.kv_at(kv_scalars, j).begin, tb.kv_at(kv_scalars, j).end),
            seen=lambda j, i: may_see(tb.q_at(q_scalars, i), tb.kv_at(kv_scalars, j)),
            copies=copies,
            slot_ref=slot_ref,
            visit=visit,
        )
        is_real = tb.wide(columns[0], s.H) >= 0
        dk_scale = how.scale if how.temperature is None else 1.0
        dk_ref[...] = jnp.where(is_real, dk[...] * dk_scale, 0.0).astype(dk_ref.dtype)
        dv_ref[...] = jnp.where(is_real, dv[...], 0.0).astype(dv_ref.dtype)

    return kernel


def _rows(lse_BTN: jax.Array, delta_BTN: jax.Array, s: tpu_sizes.Shape) -> jax.Array:
    """Return lane rows [B, K, blocks, 2 G, bq]: of each head lse in base 2, then delta."""
    rows = [tb.head_rows(x, s.K, s.bq) for x in (lse_BTN * tb.LOG2_E, delta_BTN)]
    return jnp.concatenate(rows, axis=3)


def _backward_queries(
    x: Inputs, how: Settings, lse_BTN: jax.Array, delta_BTN: jax.Array, dout_BTNH: jax.Array
) -> jax.Array:
    """Return dq_BTNH."""
    s = _cut_queries(x)
    q_summary, kv_summary = summarize(x, how.chunk_size, s.bq, s.bkv)
    q_marks = tb.marks(x.q_positions_BT, x.q_segments_BT, s.bq)
    kv_marks = tb.marks(x.kv_positions_BS, x.kv_segments_BS, s.bkv)
    m, dtype = kv_marks.shape[2], x.q_BTNH.dtype

    q_spec = pl.BlockSpec((None, None, s.G, s.bq, s.H), lambda b, h, i: (b, h, 0, i, 0))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    row = (s.bq, LANES)
    dq_BKGTH = pl.pallas_call(
        _queries_kernel(s, how),
        grid=(s.B, s.K, s.nq),
        in_specs=[
            tb.scalars_spec(q_summary),
            tb.scalars_spec(kv_summary),
            pl.BlockSpec((None, None, m, s.bq), lambda b, h, i: (b, i, 0, 0)),
            pl.BlockSpec((None, None, None, 2 * s.G, s.bq), lambda b, h, i: (b, h, i, 0, 0)),
            q_spec,
            q_spec,
            hbm,
            hbm,
            hbm,
        ],
        out_specs=q_spec,
        out_shape=backend.like(x.q_BTNH, (s.B, s.K, s.G, s.T, s.H), dtype),
        scratch_shapes=[
            pltpu.VMEM((m + 1, *row), jnp.int32),
            pltpu.VMEM(row, jnp.float32),
            pltpu.VMEM((2 * s.G, *row), jnp.float32),
            pltpu.VMEM((s.G, s.bq, s.H), jnp.float32),
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
            products=3,
            owned=3 * x.q_BTNH.size * dtype.itemsize,
            walked=s.bkv * (2 * s.H * dtype.itemsize + 4 * m),
        ),
        interpret=backend.tpu_interpreter(),
        name="chunked_attention_backward_dq",
    )(
        tb.scalars(q_summary), tb.scalars(kv_summary), q_marks, _rows(lse_BTN, delta_BTN, s),
        tb.head_major(x.q_BTNH, s.K), tb.head_major(dout_BTNH, s.K), in_hbm(kv_marks),
        *(in_hbm(tb.padded(a.swapaxes(1, 2), 2, s.bkv)) for a in (x.k_BSKH, x.v_BSKH)),
    )  # fmt: skip
    return tb.token_major(dq_BKGTH)


def _backward_keys(
    x: Inputs, how: Settings, lse_BTN: jax.Array, delta_BTN: jax.Array, dout_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return dk_BSKH and dv_BSKH."""
    s = _cut_keys(x)
    q_summary, kv_summary = summarize(x, how.chunk_size, s.bq, s.bkv)
    q_marks = tb.marks(x.q_positions_BT, x.q_segments_BT, s.bq)
    kv_marks = tb.marks(x.kv_positions_BS, x.kv_segments_BS, s.bkv)
    m, dtype = kv_marks.shape[2], x.q_BTNH.dtype

    kv_spec = pl.BlockSpec((None, None, s.bkv, s.H), lambda b, h, j: (b, h, j, 0))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    kv_shape = backend.like(x.k_BSKH, (s.B, s.K, s.S, s.H), dtype)
    dk_BKSH, dv_BKSH = pl.pallas_call(
        _keys_kernel(s, how),
        grid=(s.B, s.K, s.nkv),
        in_specs=[
            tb.scalars_spec(q_summary),
            tb.scalars_spec(kv_summary),
            pl.BlockSpec((None, None, m, s.bkv), lambda b, h, j: (b, j, 0, 0)),
            kv_spec,
            kv_spec,
            hbm,
            hbm,
            hbm,
            hbm,
        ],
        out_specs=[kv_spec, kv_spec],
        out_shape=[kv_shape, kv_shape],
        scratch_shapes=[
            pltpu.VMEM((m, s.bkv, LANES), jnp.int32),
            pltpu.VMEM((s.bkv, s.H), jnp.float32),
            pltpu.VMEM((s.bkv, s.H), jnp.float32),
            pltpu.VMEM((2, m, s.bq), jnp.int32),
            pltpu.VMEM((2, 2 * s.G, s.bq), jnp.float32),
            pltpu.VMEM((2, s.G, s.bq, s.H), dtype),
            pltpu.VMEM((2, s.G, s.bq, s.H), dtype),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA((4, 2)),
        ],
        compiler_params=tb.params(),
        cost_estimate=tb.cost(
            s,
            how,
            products=4,
            owned=4 * x.k_BSKH.size * dtype.itemsize,
            walked=s.bq * (2 * s.G * s.H * dtype.itemsize + 8 * s.G + 4 * m),
        ),
        interpret=backend.tpu_interpreter(),
        name="chunked_attention_backward_dkv",
    )(
        tb.scalars(q_summary), tb.scalars(kv_summary), kv_marks, x.k_BSKH.swapaxes(1, 2),
        x.v_BSKH.swapaxes(1, 2), in_hbm(q_marks), in_hbm(_rows(lse_BTN, delta_BTN, s)),
        *(in_hbm(tb.padded(tb.head_major(a, s.K), 3, s.bq)) for a in (x.q_BTNH, dout_BTNH)),
    )  # fmt: skip
    return dk_BKSH.swapaxes(1, 2), dv_BKSH.swapaxes(1, 2)


def backward(
    x: Inputs,
    how: Settings,
    out_BTNH: jax.Array,
    lse_BTN: jax.Array,
    dout_BTNH: jax.Array,
    dlse_BTN: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Differentiate.

    Args:
        x: the arrays.
        how: the static arguments.
        out_BTNH: what `forward` returned.
        lse_BTN: what `forward` returned.
        dout_BTNH: the gradient of out.
        dlse_BTN: the gradient of lse.

    Returns:
        dq_BTNH, dk_BSKH and dv_BSKH in the dtypes of q, k and v.
    """
    delta_BTN = (out_BTNH.astype(jnp.float32) * dout_BTNH.astype(jnp.float32)).sum(-1) - dlse_BTN
    delta_BTN = jnp.where((x.q_positions_BT >= 0)[:, :, None], delta_BTN, 0.0)
    dout_BTNH = dout_BTNH.astype(x.q_BTNH.dtype)
    dq_BTNH = _backward_queries(x, how, lse_BTN, delta_BTN, dout_BTNH)
    dk_BSKH, dv_BSKH = _backward_keys(x, how, lse_BTN, delta_BTN, dout_BTNH)
    return dq_BTNH, dk_BSKH, dv_BSKH
