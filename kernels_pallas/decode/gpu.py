"""Decode attention for Hopper GPUs (sm90): flash-decoding in Pallas Mosaic GPU, TMA and wgmma.

A decoding step reads the cache once and computes little, so the kernel is arranged by bytes. The
slots that a row has to read are divided evenly among `splits` programs per sequence and kv head,
enough of them to give every multiprocessor its two; a program walks its blocks of slots through a
ring of shared memory that TMA keeps filling, and no block outside of the row's slots is copied. A
last block that is partly past the end is copied whole; the logits there are masked, and the values
set to zero, since they may be NaN, which a weight of zero does not erase.

One program takes all query rows of its kv head, T * N / K of them, as the 64 rows of a wgmma (the
tensor cores wait for memory even so). The rows of probabilities take the place of the keys, which
are dead by then. A program writes its output and log-sum-exp in float32, and XLA merges them.

TMA wants slots of one head next to each other, so the cache is taken head-major: a cache stored
[B, K, S, H] and passed as its `swapaxes(1, 2)` is read where it lies, the two transpositions
cancel. Any other is transposed first, which copies it. Pages likewise: [pages, K, page size, H].

int8 and float8_e4m3fn come in as stored and become bfloat16 in registers, on the way from one tile
of shared memory to the tile that wgmma reads. Scales of tokens multiply the columns of logits and
of probabilities, in float32.
"""

import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import backend, tuning
from kernels_pallas.attention.visibility import (
    NEGATIVE,
    Settings,
    attention_temperature,
    first_visible,
)
from kernels_pallas.decode.inputs import Inputs, slots_seen

_ROWS = 64  # of a wgmma
_LOG2E = math.log2(math.e)
_MULTIPROCESSORS = 132
_HOPPER = ("H100", "H200", "H800", "H20")  # GH200 contains H200
_SMEM = 225 * 1024  # of one multiprocessor, less what the programs on it have besides the tiles
_TILE = plgpu.Layout.WGMMA
_ROW, _COLUMN = _TILE.reduce(1), _TILE.reduce(0)  # a value for each row; for each column
_TAKES_COST = "cost_estimate" in inspect.signature(plgpu.kernel).parameters


class _Plan(NamedTuple):
    """What is static in one call.

    Attributes:
        num_kv_heads, head_dim: K and H.
        rows: of queries of a kv head, rounded up to 8.
        block: slots of one step.
        page: slots of one copy, a block or less.
        splits: programs of one sequence and kv head.
        stages: blocks of the ring.
        dtype: in which wgmma multiplies.
    """

    batch: int
    num_kv_heads: int
    head_dim: int
    rows: int
    block: int
    page_size: int | None
    splits: int
    stages: int
    dtype: Any

    @property
    def copy(self) -> int:
        """Return how many slots one copy brings."""
        return self.block if self.page_size is None else min(self.block, self.page_size)


def _plan(x: Inputs) -> _Plan:
    B, T, N, H = x.q_BTNH.shape
    K, stored = x.k_BSKH.shape[2], x.k_BSKH.dtype
    dtype = jnp.dtype(jnp.bfloat16) if stored.itemsize == 1 else stored
    per_processor = 2 if H <= 128 else 1
    found = tuning.lookup(
        "decode_attention", {"kv": 64, "splits": 0, "stages": 0}, head_dim=H, dtype=stored.name
    )
    block = found["kv"]
    programs = per_processor * _MULTIPROCESSORS // (B * K)
    splits = found["splits"] or max(programs, min(8, B))
    scales = sum(block * s.dtype.itemsize for s in (x.k_scale_BSK, x.v_scale_BSK) if s is not None)
    tiles = _ROWS * H * 2 + (2 * block * H * 2 if stored.itemsize == 1 else 0)
    stages = (_SMEM // per_processor - tiles) // (2 * block * H * stored.itemsize + scales)
    return _Plan(
        batch=B,
        num_kv_heads=K,
        head_dim=H,
        rows=-(-T * N // (K * 8)) * 8,
        block=block,
        page_size=None if x.page_table_BP is None else x.k_BSKH.shape[1],
        splits=min(splits, pl.cdiv(x.num_slots, 4 * block)),
        stages=found["stages"] or min(stages, 8),
        dtype=dtype,
    )


def refusal(x: Inputs, how: Settings) -> str | None:
    """Return why these shapes and dtypes cannot be taken, or None if they can."""
    del how
    _, T, N, H = x.q_BTNH.shape
    K, stored = x.k_BSKH.shape[2], x.k_BSKH.dtype
    kind = backend.device_kind()
    if not backend.gpu_interpreter() and not any(name in kind for name in _HOPPER):
        return f"it needs a Hopper GPU, and this is {kind}"
    if stored not in (jnp.bfloat16, jnp.float16, jnp.int8, jnp.float8_e4m3fn):
        return f"its caches are bfloat16, float16, int8 or float8_e4m3fn, not {stored.name}"
    if x.v_BSKH.dtype != stored:
        return f"keys ({stored.name}) and values ({x.v_BSKH.dtype.name}) differ in dtype"
    if H not in (64, 128, 256):
        return f"its head dims are 64, 128 and 256, not {H}"
    if T * N // K > _ROWS:
        return f"a kv head has {T * N // K} query rows, and it takes {_ROWS}"
    scales = [s for s in (x.k_scale_BSK, x.v_scale_BSK) if s is not None]
    if any(s.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16) for s in scales):
        return "its scales are float32, bfloat16 or float16"
    plan = _plan(x)
    if (page := plan.page_size) is not None:
        if page % 8 or (page % plan.block and plan.block % page):
            return f"pages of {page} slots neither divide its blocks of {plan.block} nor hold them"
        if any(plan.copy * s.dtype.itemsize % 128 for s in scales):
            return f"pages of {page} slots have less than 128 bytes of scales"
    return None


class _Rows(NamedTuple):
    """Of each query row of a kv head [B, 64]: the slots it sees, and what multiplies its logits."""

    first: jax.Array
    last: jax.Array
    factor: jax.Array


def _rows(x: Inputs, how: Settings) -> _Rows:
    """Give the rows t * G + g; rows that are not there see nothing. Logits are to base 2."""
    group = x.q_BTNH.shape[2] // x.k_BSKH.shape[2]
    positions_BT, start_B1 = x.q_positions_BT, x.kv_start_B[:, None]
    factor_BT = jnp.full(positions_BT.shape, how.scale * _LOG2E, jnp.float32)
    if how.temperature is not None:
        factor_BT *= attention_temperature(positions_BT, how.temperature)

    def spread(a_BT: jax.Array, fill: int) -> jax.Array:
        a_BR = jnp.repeat(a_BT, group, axis=1)
        return jnp.pad(a_BR, ((0, 0), (0, _ROWS - a_BR.shape[1])), constant_values=fill)

    return _Rows(
        spread(first_visible(positions_BT, how.chunk_size) - start_B1, 0),
        spread(jnp.minimum(positions_BT - start_B1, x.lengths_B[:, None] - 1), -1),
        spread(factor_BT, 0),
    )


class _Arrays(NamedTuple):
    """What the kernel reads; arrays outside of it, references inside."""

    q_BKRH: Any
    k_BKSH: Any
    v_BKSH: Any
    rows: _Rows
    seen_B2: Any
    k_scale_BKS: Any
    v_scale_BKS: Any
    page_table_BP: Any


def _arrays(x: Inputs, how: Settings, plan: _Plan) -> _Arrays:
    """Put heads before slots, and queries into rows t * G + g of their kv head."""
    B, T, N, H = x.q_BTNH.shape
    q_BKRH = x.q_BTNH.reshape(B, T, plan.num_kv_heads, -1, H).swapaxes(1, 2)
    q_BKRH = q_BKRH.reshape(B, plan.num_kv_heads, -1, H).astype(plan.dtype)
    q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, _ROWS - q_BKRH.shape[2]), (0, 0)))

    def scale(scale_BSK: jax.Array | None) -> jax.Array | None:
        if scale_BSK is None:
            return None
        uneven = -scale_BSK.shape[1] % (16 // scale_BSK.dtype.itemsize)  # TMA: 16 bytes
        return jnp.pad(scale_BSK.swapaxes(1, 2), ((0, 0), (0, 0), (0, uneven)))

    return _Arrays(
        q_BKRH=q_BKRH,
        k_BKSH=x.k_BSKH.swapaxes(1, 2),
        v_BKSH=x.v_BSKH.swapaxes(1, 2),
        rows=_rows(x, how),
        seen_B2=jnp.stack(slots_seen(x, how), 1),
        k_scale_BKS=scale(x.k_scale_BSK),
        v_scale_BKS=scale(x.v_scale_BSK),
        page_table_BP=x.page_table_BP,
    )


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


def _ring(a: _Arrays, plan: _Plan) -> _Ring:
    block, H, stages = plan.block, plan.head_dim, plan.stages
    tile = plgpu.SMEM((stages, block, H), a.k_BKSH.dtype)
    wide = None if a.k_BKSH.dtype == plan.dtype else plgpu.SMEM((block, H), plan.dtype)

    def scale(scale_BKS):
        return None if scale_BKS is None else plgpu.SMEM((stages, block), scale_BKS.dtype)

    def ready(scale_BKS):
        copies = plan.block // plan.copy * (1 if scale_BKS is None else 2)
        return plgpu.Barrier(num_arrivals=copies, num_barriers=stages)

    return _Ring(
        plgpu.SMEM((_ROWS, H), plan.dtype),
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
    return lax.broadcast_in_dim(a_R, (_ROWS, width), [0])


def _multiply(a_smem: Any, b_smem: Any) -> jax.Array:
    """Compute a @ b of tiles in shared memory."""

    def run(acc_ref):
        plgpu.wgmma(acc_ref, a_smem, b_smem)
        return acc_ref[...]

    return pl.run_scoped(run, plgpu.ACC((a_smem.shape[0], b_smem.shape[1]), jnp.float32))


class _State(NamedTuple):
    """The running softmax of the rows: output parts, maximum (base 2) and sum of weights."""

    parts: tuple[jax.Array, ...]
    top_R: jax.Array
    sum_R: jax.Array


def _walk(a: _Arrays, plan: _Plan, ring: _Ring) -> _State:
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

    def widened(tile: Any, wide: Any) -> Any:
        """Return the tile as wgmma can read it."""
        if wide is None:
            return tile

        @pl.loop(0, H // width)
        def _(i):
            at = pl.ds(pl.multiple_of(i * width, width), width)
            values = plgpu.load(tile.at[:, at], layout=_TILE)
            if values.dtype == jnp.float8_e4m3fn:
                values = values.astype(jnp.float32)
            wide[:, at] = values.astype(wide.dtype)

        return wide

    def scales(scale_smem: Any, stage: jax.Array) -> jax.Array:
        scale_S = plgpu.load(scale_smem.at[stage], layout=_COLUMN, optimized=False)
        return lax.broadcast_in_dim(scale_S.astype(jnp.float32), (_ROWS, block), [1])

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
        plgpu.barrier_wait(ring.k_ready.at[stage])
        k_tile = widened(ring.k.at[stage], ring.k_wide)
        if ring.k_wide is not None:
            plgpu.commit_smem()
        x_RS = _multiply(ring.q, k_tile.transpose((1, 0))) * _across(factor_R, block)
        if ring.k_scale is not None:
            x_RS *= scales(ring.k_scale, stage)
        slots_RS = plgpu.broadcasted_iota(jnp.int32, (_ROWS, block), 1, layout=_TILE)
        is_seen_RS = (slots_RS >= _across(first_R - start, block)) & (
            slots_RS <= _across(last_R - start, block)
        )
        x_RS = jnp.where(is_seen_RS, x_RS, NEGATIVE)

        # Before its first visible slot a row weighs all of them 1; `decay` erases that later.
        top_R = jnp.maximum(state.top_R, x_RS.max(axis=1))
        decay_R = jnp.exp2(state.top_R - top_R)
        p_RS = jnp.exp2(x_RS - _across(top_R, block))
        sum_R = state.sum_R * decay_R + p_RS.sum(axis=1)

        plgpu.barrier_wait(ring.v_ready.at[stage])
        if ring.v_scale is not None:
            p_RS = jnp.where(is_seen_RS, p_RS * scales(ring.v_scale, stage), 0.0)
        p_tile = k_tile.at[pl.ds(0, _ROWS), pl.ds(0, block)]
        p_tile[...] = p_RS.astype(plan.dtype)
        v_tile = widened(ring.v.at[stage], ring.v_wide)
        is_partial = (start < begin) | (start + block > end)
        pl.when(is_partial)(functools.partial(clear_unseen, v_tile, start))
        plgpu.commit_smem()
        parts = []
        for i, part in enumerate(state.parts):
            more = _multiply(p_tile, v_tile.at[:, pl.ds(i * width, width)])
            parts.append(lax.optimization_barrier(part * _across(decay_R, width) + more))
        pl.when(step + stages < steps)(lambda: fetch(step + stages))
        return _State(tuple(parts), top_R, sum_R)

    nothing = jnp.zeros((_ROWS, width), jnp.float32)
    state = _State(
        tuple(plgpu.layout_cast(nothing, _TILE) for _ in range(0, H, width)),
        plgpu.layout_cast(jnp.full((_ROWS,), NEGATIVE, jnp.float32), _ROW),
        plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), _ROW),
    )
    return lax.fori_loop(0, steps, attend, state)


def _write(state: _State, plan: _Plan, out_ref: Any, lse_ref: Any) -> None:
    """Write the rows of this program, and their log-sum-exp to base e."""

    def run(out_smem, lse_smem):
        is_seeing_R = state.top_R > 0.5 * NEGATIVE
        inverse_R = jnp.where(is_seeing_R, 1.0 / state.sum_R, 0.0)
        lse_R = (state.top_R + jnp.log2(state.sum_R)) * (1.0 / _LOG2E)
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
        plgpu.SMEM((_ROWS, plan.head_dim), jnp.float32),
        plgpu.SMEM((_ROWS,), jnp.float32),
        collective_axes="warpgroup",
    )


def _cost(x: Inputs, how: Settings, plan: _Plan) -> pl.CostEstimate:
    """Estimate as if all slots, or a whole chunk, were filled."""
    B, T, N, H = x.q_BTNH.shape
    slots = min(x.num_slots, how.chunk_size or x.num_slots)
    scales = sum(s.dtype.itemsize for s in (x.k_scale_BSK, x.v_scale_BSK) if s is not None)
    cached = B * slots * plan.num_kv_heads * (2 * H * x.k_BSKH.dtype.itemsize + scales)
    written = B * plan.num_kv_heads * plan.splits * (plan.rows * H + _ROWS) * 4
    return pl.CostEstimate(
        flops=4 * B * T * N * H * slots,
        bytes_accessed=cached + written + x.q_BTNH.size * 2,
        transcendentals=B * T * N * slots,
    )


def forward(x: Inputs, how: Settings, *, out_dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Attend to the cache.

    Args:
        x: arrays; k and v best as `swapaxes(1, 2)` of arrays [B, K, S, H], which copies nothing.
        how: static settings.
        out_dtype: of the output.

    Returns:
        out_BTNH in out_dtype and lse_BTN in float32; zeros and NEGATIVE where nothing is seen.
    """
    B, T, N, H = x.q_BTNH.shape
    plan = _plan(x)
    a = _arrays(x, how, plan)
    leaves, tree = jax.tree.flatten(a)

    def decode_attention(*refs):
        refs, (out_ref, lse_ref) = jax.tree.unflatten(tree, refs[:-2]), refs[-2:]
        ring = _ring(a, plan)
        state = pl.run_scoped(
            lambda *tiles: _walk(refs, plan, _Ring(*tiles)), *ring, collective_axes="warpgroup"
        )
        _write(state, plan, out_ref, lse_ref)

    shape = (B, plan.num_kv_heads, plan.splits)
    cost: dict[str, Any] = {"cost_estimate": _cost(x, how, plan)} if _TAKES_COST else {}
    out_BKARH, lse_BKAR = plgpu.kernel(
        decode_attention,
        out_type=(
            jax.ShapeDtypeStruct((*shape, plan.rows, H), jnp.float32),
            jax.ShapeDtypeStruct((*shape, _ROWS), jnp.float32),
        ),
        grid=shape,
        grid_names=("batch", "head", "split"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=backend.gpu_interpreter(),
        **cost,
    )(*leaves)
    return _merge(out_BKARH, lse_BKAR, x.q_BTNH.shape, out_dtype)


def _merge(
    out_BKARH: jax.Array, lse_BKAR: jax.Array, shape: tuple[int, ...], out_dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Merge the programs of a head: outputs weigh exp(lse); A counts programs."""
    B, T, N, H = shape
    K = out_BKARH.shape[1]
    rows = T * N // K
    lse_BKAR, out_BKARH = lse_BKAR[..., :rows], out_BKARH[..., :rows, :]
    top_BKR = lse_BKAR.max(2)
    weight_BKAR = jnp.exp(lse_BKAR - top_BKR[:, :, None])
    sum_BKR = weight_BKAR.sum(2)
    out_BKRH = (out_BKARH * weight_BKAR[..., None]).sum(2) / sum_BKR[..., None]
    lse_BKR = top_BKR + jnp.log(sum_BKR)
    out_BTNH = out_BKRH.reshape(B, K, T, -1, H).swapaxes(1, 2).reshape(shape)
    lse_BTN = lse_BKR.reshape(B, K, T, -1).swapaxes(1, 2).reshape(B, T, N)
    return out_BTNH.astype(out_dtype), lse_BTN
