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
from kernels_pallas.attention import tpu_sizes
from kernels_pallas.attention.tpu_backward import backward, cuts
from kernels_pallas.attention.tpu_sizes import Holds
from kernels_pallas.attention.tpu_softmax import Softmax
from kernels_pallas.attention.visibility import (
    Inputs,
    Settings,
    may_see,
    sees_all,
    summarize,
)
from kernels_pallas.tpu_primitives import LANES, in_hbm

__all__ = ["backward", "forward", "unsupported_reason"]

# q; out, sum; k, v
_HOLDS = Holds(queries=2, query_sums=2 + 1, rows=2, keys=4, key_sums=0)


def unsupported_reason(x: Inputs, how: Settings) -> str | None:
    """Return why these arrays cannot be taken, or None if they can."""
    dtypes = {x.q_BTNH.dtype, x.k_BSKH.dtype, x.v_BSKH.dtype}
    if len(dtypes) > 1 or dtypes.pop() not in (jnp.bfloat16, jnp.float32):
        return "q, k and v must all be bfloat16 or all float32"
    for s, holds in ((_cut(x), _HOLDS), *cuts(x)):
        needed, most = tpu_sizes.scalar_bytes(s), tpu_sizes.SMEM_BUDGET
        if needed > most:
            return f"the summaries of its blocks take {needed} bytes of SMEM, over {most}"
        reason = tpu_sizes.vmem_reason(s, holds, x.q_BTNH.dtype.itemsize)
        if reason is not None:
            return reason
    return None


def _cut(x: Inputs) -> tpu_sizes.Shape:
    """Choose the blocks: some thousand rows of queries for each copy of a block of keys."""
    return tpu_sizes.cut(x, "forward", q_tile=16, kv_tile=LANES, holds=_HOLDS)


def _kernel(s: tpu_sizes.Shape, how: Settings):
    """Return the kernel for static sizes and settings."""
    p = tpu_sizes.Programs.of(s)

    def kernel(
        q_scalars, kv_scalars, q_marks, q_ref, kv_marks_hbm, k_hbm, v_hbm,
        out_ref, lse_ref,
        columns, factors, softmax, kv_marks, k_buf, v_buf, slot_ref, arrived,
    ):  # fmt: skip
        program, h, i = (pl.program_id(axis) for axis in range(3))
        b = p.row(program)

        def q_at(i):
            return tb.q_at(q_scalars, p.block(program, i))

        q = q_at(i)

        def copies(j, slot):
            keys = pl.ds(j * s.bkv, s.bkv)
            sources = (kv_marks_hbm.at[b, j], k_hbm.at[b, h, keys], v_hbm.at[b, h, keys])
            return tb.copies(sources, (kv_marks, k_buf, v_buf), slot, arrived)

        def attend(slot, is_masked):
            mask = tb.mask(columns, kv_marks[slot]) if is_masked else None

            softmax.add(
                *(q_ref, k_buf.at[slot], v_buf.at[slot]),
                factor=lambda: tb.factor(factors, how, s.bkv),
                mask=mask,
            )

        def visit(j, slot):
            kv = tb.kv_at(kv_scalars, j)
            is_whole = sees_all(q, kv)

            @pl.when(kv.padding > 0)
            def _():
                tb.clear_padding(kv_marks[slot, :1], v_buf.at[slot])

            pl.when(is_whole)(lambda: attend(slot, False))
            pl.when(~is_whole)(lambda: attend(slot, True))

        tb.set_columns(columns, factors, q_marks, how)
        softmax.clear()
        tb.walk(
            i,
            p.blocks,
            bounds=lambda i: (q_at(i).begin, q_at(i).end),
            seen=lambda i, j: may_see(q_at(i), tb.kv_at(kv_scalars, j)),
            copies=copies,
            slot_ref=slot_ref,
            visit=visit,
        )
        softmax.write(out_ref, lse_ref)

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
    p = tpu_sizes.Programs.of(s)
    q_summary, kv_summary = summarize(x, how.chunk_size, s.bq, s.bkv)
    q_marks = tb.marks(x.q_positions_BT, x.q_segments_BT, s.bq)
    kv_marks = tb.marks(x.kv_positions_BS, x.kv_segments_BS, s.bkv)
    k_BKSH, v_BKSH = (tb.padded(a.swapaxes(1, 2), 2, s.bkv) for a in (x.k_BSKH, x.v_BSKH))
    m, q_size, dtype = kv_marks.shape[2], x.q_BTNH.dtype.itemsize, x.q_BTNH.dtype

    q_spec = pl.BlockSpec(
        (None, None, s.G, s.bq, s.H), lambda b, h, i: (p.row(b), h, 0, p.block(b, i), 0)
    )
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    row = (s.bq, LANES)
    out_size = s.B * s.K * s.G * s.T * s.H
    out_BKGTH, lse_BKnGT = pl.pallas_call(
        _kernel(s, how),
        grid=(p.parts * s.B, s.K, p.blocks),
        in_specs=[
            tb.scalars_spec(q_summary, p.row),
            tb.scalars_spec(kv_summary, p.row),
            pl.BlockSpec((None, None, m, s.bq), lambda b, h, i: (p.row(b), p.block(b, i), 0, 0)),
            q_spec,
            hbm,
            hbm,
            hbm,
        ],
        out_specs=[
            q_spec,
            pl.BlockSpec(
                (None, None, None, s.G, s.bq),
                lambda b, h, i: (p.row(b), h, p.block(b, i), 0, 0),
            ),
        ],
        out_shape=[
            backend.like(x.q_BTNH, (s.B, s.K, s.G, s.T, s.H), out_dtype),
            backend.like(x.q_BTNH, (s.B, s.K, s.nq, s.G, s.bq), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((m + 1, *row), jnp.int32),
            pltpu.VMEM(row, jnp.float32),
            Softmax.scratch(s.G, s.bq, s.H),
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
        *map(in_hbm, (kv_marks, k_BKSH, v_BKSH)),
    )  # fmt: skip
    lse_BTN = lse_BKnGT.transpose(0, 2, 4, 1, 3).reshape(s.B, -1, s.K * s.G)[:, : s.T]
    return tb.token_major(out_BKGTH), lse_BTN
