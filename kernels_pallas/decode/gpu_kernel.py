"""The programs of decode attention on Hopper: TMA fills a ring of tiles, wgmma multiplies them.

A program walks its share of a row's blocks of slots. One program takes all query rows of its kv
head, T * N / K of them, as the 64 rows of a wgmma: the tensor cores wait for memory even so. The
probabilities take the place of the keys in shared memory, which are dead by then.

A block that is partly outside of the row's slots is copied whole. Its logits are masked, and its
values set to zero, for they may be NaN, which a weight of zero does not erase.

int8 and float8_e4m3fn come in as stored and become bfloat16 in registers, on the way from one tile
of shared memory to the tile that wgmma reads; values do while the tensor cores are at the keys.
Scales of tokens multiply the columns of logits and of probabilities, in float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention.visibility import NEGATIVE
from kernels_pallas.gpu_primitives import widen

ROWS = 64  # of a wgmma
LOG2E = math.log2(math.e)
_TILE = plgpu.Layout.WGMMA
_ROW, _COLUMN = _TILE.reduce(1), _TILE.reduce(0)  # a value for each row; for each column


class Plan(NamedTuple):
    """What is static in one call.

    Attributes:
        head_dim: H.
        rows: of queries of a kv head, rounded up to 8.
        block: slots of one step.
        page_size: slots of a page, or None.
        splits: programs of one sequence and kv head.
        stages: blocks of the ring.
        dtype: in which wgmma multiplies.
    """

    head_dim: int
    rows: int
    block: int
    page_size: int | None
    splits: int
    stages: int
    dtype: Any

    @property
    def copy(self) -> int:
        """Return how many slots one copy brings, all of one page."""
        return self.block if self.page_size is None else math.gcd(self.block, self.page_size)


class Rows(NamedTuple):
    """Of each query row of a kv head [B, 64]: the slots it sees, and what multiplies its logits."""

    first: jax.Array
    last: jax.Array
    factor: jax.Array


class Arrays(NamedTuple):
    """What the kernel reads; arrays outside of it, references inside.

    Attributes:
        q_BKRH: rows t * G + g of each kv head, 64 of them.
        k_BKSH, v_BKSH: the cache, or pages [pages, K, page size, H].
        rows: what the rows see.
        seen_B2: the slots [begin, end) that some row sees.
        k_scale_BKS, v_scale_BKS: scales of tokens, laid out as k and v; or None.
        page_table_BP: pages of each sequence, or None.
    """

    q_BKRH: Any
    k_BKSH: Any
    v_BKSH: Any
    rows: Rows
    seen_B2: Any
    k_scale_BKS: Any
    v_scale_BKS: Any
    page_table_BP: Any


class _Ring(NamedTuple):
    """Tiles in shared memory, and the barriers that tell when they are filled.

    Attributes:
        q: [64, H].
        k, v: [stages, block, H] as stored.
        k_scale, v_scale: [stages, block], or None.
        k_wide, v_wide: [block, H] in the dtype of q; None if k and v are in it.
        q_ready, k_ready, v_ready: barriers; the last two one per stage.
    """

    q: Any
    k: Any
    v: Any
    k_scale: Any
    v_scale: Any
    k_wide: Any
    v_wide: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any


def _ring(a: Arrays, plan: Plan) -> _Ring:
    block, H, stages = plan.block, plan.head_dim, plan.stages
    tile = plgpu.SMEM((stages, block, H), a.k_BKSH.dtype)
    wide = None if a.k_BKSH.dtype == plan.dtype else plgpu.SMEM((block, H), plan.dtype)

    def scale(scale_BKS):
        return None if scale_BKS is None else plgpu.SMEM((stages, block), scale_BKS.dtype)

    def ready(scale_BKS):
        copies = plan.block // plan.copy * (1 if scale_BKS is None else 2)
        return plgpu.Barrier(num_arrivals=copies, num_barriers=stages)

    return _Ring(
        plgpu.SMEM((ROWS, H), plan.dtype),
        tile,
        tile,
        scale(a.k_scale_BKS),
        scale(a.v_scale_BKS),
        wide,
        wide,
        plgpu.Barrier(),
        ready(a.k_scale_BKS),
        ready(a.v_scale_BKS),
    )


def _across(a_R: jax.Array, width: int) -> jax.Array:
    """Repeat a value for each row over the columns."""
    return lax.broadcast_in_dim(a_R, (ROWS, width), [0])


def _multiply(a_smem: Any, b_smem: Any, meanwhile: Callable[[], None] = lambda: None) -> jax.Array:
    """Compute a @ b of tiles in shared memory, and do something else meanwhile."""

    def run(acc_ref):
        plgpu.wgmma(acc_ref, a_smem, b_smem)
        meanwhile()
        return acc_ref[...]

    return pl.run_scoped(run, plgpu.ACC((a_smem.shape[0], b_smem.shape[1]), jnp.float32))


class _State(NamedTuple):
    """The running softmax of the rows: output parts, maximum (base 2) and sum of weights."""

    parts: tuple[jax.Array, ...]
    top_R: jax.Array
    sum_R: jax.Array


def _walk(a: Arrays, plan: Plan, ring: _Ring) -> _State:
    """Attend to the blocks of this program."""
    block, H, stages, copy = plan.block, plan.head_dim, plan.stages, plan.copy
    width = min(H, 128)
    b, h = lax.axis_index("batch"), lax.axis_index("head")
    begin, end = a.seen_B2[b, 0], a.seen_B2[b, 1]
    base = lax.div(begin, block)
    blocks = lax.div(end + (block - 1), block) - base
    share = lax.div(blocks + (plan.splits - 1), plan.splits)
    before = lax.axis_index("split") * share
    steps = jnp.where(end > begin, jnp.clip(blocks - before, 0, share), 0)

    def source(slot: jax.Array):
        """Return the indices of the page or the sequence, and of the slot there."""
        if plan.page_size is None:
            return b, slot
        size = plan.page_size
        # A block may start before the first page seen and end after the last.
        page = jnp.clip(lax.div(slot, size), lax.div(begin, size), lax.div(end - 1, size))
        return a.page_table_BP[b, page], lax.rem(slot, size)

    def fetch(step: jax.Array) -> None:
        stage = lax.rem(step, stages)
        for offset in range(0, block, copy):
            row, slot = source((base + before + step) * block + offset)
            theirs, ours = (row, h, pl.ds(slot, copy)), (stage, pl.ds(offset, copy))
            plgpu.copy_gmem_to_smem(a.k_BKSH.at[theirs], ring.k.at[ours], ring.k_ready.at[stage])
            if ring.k_scale is not None:
                plgpu.copy_gmem_to_smem(
                    a.k_scale_BKS.at[theirs], ring.k_scale.at[ours], ring.k_ready.at[stage]
                )
            plgpu.copy_gmem_to_smem(a.v_BKSH.at[theirs], ring.v.at[ours], ring.v_ready.at[stage])
            if ring.v_scale is not None:
                plgpu.copy_gmem_to_smem(
                    a.v_scale_BKS.at[theirs], ring.v_scale.at[ours], ring.v_ready.at[stage]
                )

    def scales(scale_smem: Any, stage: jax.Array) -> jax.Array:
        scale_S = plgpu.load(scale_smem.at[stage], layout=_COLUMN, optimized=False)
        return lax.broadcast_in_dim(scale_S.astype(jnp.float32), (ROWS, block), [1])

    def clear_unseen(v_tile: Any, start: jax.Array) -> None:
        slots_SH = plgpu.broadcasted_iota(jnp.int32, (block, width), 0, layout=_TILE) + start
        is_seen_SH = (slots_SH >= begin) & (slots_SH < end)
        for part in range(0, H, width):
            v_SH = plgpu.load(v_tile.at[:, pl.ds(part, width)], layout=_TILE)
            v_tile[:, pl.ds(part, width)] = jnp.where(is_seen_SH, v_SH, jnp.zeros_like(v_SH))

    plgpu.copy_gmem_to_smem(a.q_BKRH.at[b, h], ring.q, ring.q_ready)
    for step in range(stages):
        pl.when(step < steps)(functools.partial(fetch, jnp.int32(step)))
    rows: list[Any] = [ref.at[b] for ref in a.rows]
    first_R, last_R, factor_R = (plgpu.load(ref, layout=_ROW, optimized=False) for ref in rows)
    plgpu.barrier_wait(ring.q_ready)

    def attend(step: jax.Array, state: _State) -> _State:
        stage = lax.rem(step, stages)
        start = (base + before + step) * block
        k_tile, v_tile = ring.k.at[stage], ring.v.at[stage]

        def receive_values() -> None:
            plgpu.barrier_wait(ring.v_ready.at[stage])
            if ring.v_wide is not None:
                widen(ring.v.at[stage], ring.v_wide)

        plgpu.barrier_wait(ring.k_ready.at[stage])
        if ring.k_wide is not None:
            widen(k_tile, ring.k_wide)
            plgpu.commit_smem()
            k_tile, v_tile = ring.k_wide, ring.v_wide
        products_RS = _multiply(ring.q, k_tile.transpose((1, 0)), receive_values)
        x_RS = products_RS * _across(factor_R, block)
        if ring.k_scale is not None:
            x_RS *= scales(ring.k_scale, stage)
        slots_RS = plgpu.broadcasted_iota(jnp.int32, (ROWS, block), 1, layout=_TILE)
        is_seen_RS = (slots_RS >= _across(first_R - start, block)) & (
            slots_RS <= _across(last_R - start, block)
        )
        x_RS = jnp.where(is_seen_RS, x_RS, NEGATIVE)

        # Before its first visible slot a row weighs all of them 1; `decay` erases that later.
        top_R = jnp.maximum(state.top_R, x_RS.max(axis=1))
        decay_R = jnp.exp2(state.top_R - top_R)
        p_RS = jnp.exp2(x_RS - _across(top_R, block))
        sum_R = state.sum_R * decay_R + p_RS.sum(axis=1)

        if ring.v_scale is not None:
            p_RS = jnp.where(is_seen_RS, p_RS * scales(ring.v_scale, stage), 0.0)
        p_tile = k_tile.at[pl.ds(0, ROWS), pl.ds(0, block)]
        p_tile[...] = p_RS.astype(plan.dtype)
        is_partial = (start < begin) | (start + block > end)
        pl.when(is_partial)(functools.partial(clear_unseen, v_tile, start))
        plgpu.commit_smem()
        parts = []
        for i, part in enumerate(state.parts):
            more = _multiply(p_tile, v_tile.at[:, pl.ds(i * width, width)])
            parts.append(lax.optimization_barrier(part * _across(decay_R, width) + more))
        pl.when(step + stages < steps)(lambda: fetch(step + stages))
        return _State(tuple(parts), top_R, sum_R)

    nothing = jnp.zeros((ROWS, width), jnp.float32)
    state = _State(
        tuple(plgpu.layout_cast(nothing, _TILE) for _ in range(0, H, width)),
        plgpu.layout_cast(jnp.full((ROWS,), NEGATIVE, jnp.float32), _ROW),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), _ROW),
    )
    return lax.fori_loop(0, steps, attend, state)


def _write(state: _State, plan: Plan, out_ref: Any, lse_ref: Any) -> None:
    """Write the rows of this program, and their log-sum-exp to base e."""

    def run(out_smem, lse_smem):
        is_seeing_R = state.top_R > 0.5 * NEGATIVE
        inverse_R = jnp.where(is_seeing_R, 1.0 / state.sum_R, 0.0)
        lse_R = (state.top_R + jnp.log2(state.sum_R)) * (1.0 / LOG2E)
        lse_smem[...] = jnp.where(is_seeing_R, lse_R, NEGATIVE)
        width = plan.head_dim // len(state.parts)
        for i, part in enumerate(state.parts):
            out_smem[:, pl.ds(i * width, width)] = part * _across(inverse_R, width)
        plgpu.commit_smem()
        at = tuple(lax.axis_index(name) for name in ("batch", "head", "split"))
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, plan.rows)], out_ref.at[at])
        plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[at])
        plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(
        run,
        plgpu.SMEM((ROWS, plan.head_dim), jnp.float32),
        plgpu.SMEM((ROWS,), jnp.float32),
        collective_axes="warpgroup",
    )


def attend_split(a: Arrays, plan: Plan, out_ref: Any, lse_ref: Any) -> None:
    """Attend to one share of one row's slots for one kv head, and write output and log-sum-exp."""
    state = pl.run_scoped(
        lambda *tiles: _walk(a, plan, _Ring(*tiles)), *_ring(a, plan), collective_axes="warpgroup"
    )
    _write(state, plan, out_ref, lse_ref)
