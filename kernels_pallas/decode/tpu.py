"""Decode attention on TPUs: the schedule of one call, and the call of the kernel.

The cache is given with heads first, as the model keeps it, so the swaps of axes cancel in XLA and
nothing of it is copied. What a row has to read is worked out here, in O(B * T) steps, and handed
to the kernel as scalars. See `tpu_kernel` for the rest.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import backend, tuning
from kernels_pallas.attention.visibility import NEGATIVE, Settings
from kernels_pallas.decode.inputs import Inputs, scales_in_order, slots_seen, slots_seen_by_all
from kernels_pallas.decode.tpu_kernel import attend_row
from kernels_pallas.decode.tpu_queue import TILE, Cache, Row, Scratch, Sizes
from kernels_pallas.tpu_primitives import LANES, in_hbm, round_up

_COPY_BYTES = 2**20  # of one block of keys: enough in flight to hide the latency of HBM
_MAX_BLOCK = 2048
_MAX_HEADS = 32  # the kernel's code repeats itself for every kv head
_WINDOW = 1024  # entries of the page table in SMEM at a time
_VMEM_BYTES = 40 * 2**20  # what 32 heads of 256 in float32 need; see chips.LEAST_VMEM


def unsupported_reason(x: Inputs, how: Settings) -> str | None:
    """Return why the kernel cannot take these shapes and dtypes, or None if it can."""
    del how
    floats = (jnp.bfloat16, jnp.float32)
    if x.q_BTNH.dtype not in floats:
        return f"queries of {x.q_BTNH.dtype} are neither bfloat16 nor float32"
    for dtype in (x.k_BSKH.dtype, x.v_BSKH.dtype):
        if dtype not in (*floats, jnp.int8, jnp.float8_e4m3fn):
            return f"a cache of {dtype} is none of bfloat16, float32, int8 and float8_e4m3fn"
    K, H = x.k_BSKH.shape[2:]
    if H % 8 or H > 256:
        return f"head_dim ({H}) is not a multiple of 8 up to 256"
    if K > _MAX_HEADS:
        return f"{K} kv heads are more than {_MAX_HEADS}"
    if x.page_table_BP is not None and x.k_BSKH.shape[1] % TILE:
        return f"the page size ({x.k_BSKH.shape[1]}) is not a multiple of {TILE}"
    return None


def _sizes(x: Inputs) -> Sizes:
    """Choose the sizes of blocks and copies."""
    B, T, N, H = x.q_BTNH.shape
    K = x.k_BSKH.shape[2]
    itemsize = max(x.k_BSKH.dtype.itemsize, x.v_BSKH.dtype.itemsize)
    fitting = _power_of_two(_COPY_BYTES // (K * round_up(H, LANES) * itemsize))
    default = {
        "kv": min(max(fitting, LANES), _MAX_BLOCK),
        "depth": 3,
        "splits": backend.num_cores(),
    }
    shape = {"head_dim": H, "dtype": str(x.k_BSKH.dtype), "kv_heads": K}
    tuned = tuning.lookup("decode_attention", default, **shape)
    block = piece = min(tuned["kv"], round_up(x.num_slots, LANES))
    page = None if x.page_table_BP is None else x.k_BSKH.shape[1]
    has_scales = x.k_scale_BSK is not None or x.v_scale_BSK is not None
    if page is not None:
        # Copies of scales are whole registers, unless these are put in order before.
        piece = _piece(page, block, LANES if has_scales and page % LANES == 0 else TILE)
        block = piece * _power_of_two(block // piece)
    return Sizes(
        batch=B,
        queries=T,
        kv_heads=K,
        group=N // K,
        slots=x.num_slots if page else round_up(x.num_slots, TILE),
        block=block,
        piece=piece,
        page=page,
        orders_scales=page is not None and has_scales and page % LANES != 0,
        depth=tuned["depth"],
        splits=tuned["splits"],
    )


def _piece(page: int, block: int, unit: int) -> int:
    """Return the largest part of a page, itself a multiple of a unit, that a block holds."""
    parts = range(min(page, block) // unit * unit, 0, -unit)
    return next(part for part in parts if page % part == 0)


def _power_of_two(x: int) -> int:
    """Return the largest power of two up to x, 1 at least."""
    return 1 << (max(x, 1).bit_length() - 1)


def _plan(x: Inputs, how: Settings, sizes: Sizes) -> jax.Array:
    """Return the fields of every `Row`, int32 [splits * batch * fields]."""
    B, splits = sizes.batch, sizes.splits
    begin_B, end_B = slots_seen(x, how)
    clear_begin_B, clear_end_B = slots_seen_by_all(x, how)

    unit = LANES if sizes.page is None else sizes.block
    first_B = begin_B // unit * unit
    whole_blocks_B = pl.cdiv(jnp.minimum(end_B, sizes.whole) - first_B, sizes.block)
    blocks_B = jnp.where(end_B > begin_B, whole_blocks_B + (end_B > sizes.whole), 0)
    share_B = pl.cdiv(blocks_B, splits)
    split_C1 = jnp.arange(splits, dtype=jnp.int32)[:, None]
    blocks_CB = jnp.clip(blocks_B - split_C1 * share_B, 0, share_B)
    first_CB = first_B + split_C1 * share_B * sizes.block
    busy_CB = jnp.where(blocks_CB > 0, jnp.arange(B, dtype=jnp.int32), B)
    busy_CB = jax.lax.cummin(busy_CB, axis=1, reverse=True)
    follow_CB = jnp.pad(busy_CB[:, 1:], ((0, 0), (0, 1)), constant_values=B)
    row = Row(
        first=first_CB,
        blocks=blocks_CB,
        follow=follow_CB,
        begin=begin_B,
        end=end_B,
        clear_begin=clear_begin_B,
        clear_end=clear_end_B,
        kv_start=x.kv_start_B,
        positions=list(x.q_positions_BT.T),
    )
    fields = [jnp.broadcast_to(field, (splits, B)) for field in jax.tree.leaves(row)]
    return jnp.stack(fields, axis=-1).astype(jnp.int32).reshape(-1)


def _heads_first(x: Inputs, how: Settings, sizes: Sizes) -> Cache:
    """Return the cache with slots after heads, held in HBM: XLA would bring a small one into VMEM.

    Without pages, an odd number of slots is padded to whole tiles, which copies the cache: 8 slots,
    or 128 for scales.
    """

    def swap(part: jax.Array, unit: int) -> jax.Array:
        missing = -part.shape[1] % unit if sizes.page is None else 0
        if missing:
            part = jnp.pad(part, [(0, missing) if i == 1 else (0, 0) for i in range(part.ndim)])
        return in_hbm(part.swapaxes(1, 2))

    def scales(scale_BSK: jax.Array | None) -> jax.Array | None:
        if scale_BSK is None or not sizes.orders_scales:
            return None if scale_BSK is None else swap(scale_BSK, LANES)
        scale_BKS = scales_in_order(x, how, scale_BSK, sizes.block)
        assert scale_BKS is not None
        blocks = scale_BKS.reshape(*scale_BKS.shape[:2], -1, sizes.block)
        return in_hbm(blocks.swapaxes(1, 2))

    k, v = swap(x.k_BSKH, TILE), swap(x.v_BSKH, TILE)
    return Cache(k, v, scales(x.k_scale_BSK), scales(x.v_scale_BSK))


def _windows(table_BP: jax.Array | None) -> jax.Array | None:
    """Cut the page table into windows: [B * windows, 1, entries]."""
    if table_BP is None:
        return None
    entries = min(_WINDOW, max(LANES, _power_of_two(2 * table_BP.shape[1] - 1)))
    padded_BP = jnp.pad(table_BP, ((0, 0), (0, -table_BP.shape[1] % entries)))
    return in_hbm(padded_BP.astype(jnp.int32).reshape(-1, 1, entries))


def _cost(
    x: Inputs, how: Settings, sizes: Sizes, cache: Cache, outs: tuple[jax.ShapeDtypeStruct, ...]
) -> pl.CostEstimate:
    """Estimate for rows that are full, since lengths are not known; H is kept in whole vectors."""
    B, T, N, H = x.q_BTNH.shape
    seen = sizes.slots if how.chunk_size is None else min(how.chunk_size, sizes.slots)
    out_bytes = sum(out.size * out.dtype.itemsize for out in outs)
    padded_H = round_up(H, LANES)
    head_bytes = sum(part.dtype.itemsize * padded_H for part in cache[:2])
    head_bytes += sum(part.dtype.itemsize for part in cache[2:] if part is not None)
    return pl.CostEstimate(
        flops=4 * B * T * N * seen * H,
        transcendentals=B * T * N * seen,
        bytes_accessed=B * seen * sizes.kv_heads * head_bytes + x.q_BTNH.nbytes + out_bytes,
    )


def forward(x: Inputs, how: Settings, *, out_dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Attend; see `api.decode_attention`.

    Args:
        x: arrays that `unsupported_reason` does not refuse.
        how: static settings.
        out_dtype: dtype of the output.

    Returns:
        (out_BTNH in out_dtype, lse_BTN float32).
    """
    sizes = _sizes(x)
    B, T, N, H = x.q_BTNH.shape
    K, G, rows, splits = sizes.kv_heads, sizes.group, sizes.rows, sizes.splits
    is_float = x.k_BSKH.dtype in (jnp.bfloat16, jnp.float32)
    compute_dtype = jnp.promote_types(x.q_BTNH.dtype, x.k_BSKH.dtype if is_float else jnp.bfloat16)
    q_BKTGH = x.q_BTNH.astype(compute_dtype).reshape(B, T, K, G, H).swapaxes(1, 2)
    q_BKRH = q_BKTGH.reshape(B, K, T * G, H)
    q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, rows - T * G), (0, 0)))
    cache = _heads_first(x, how, sizes)
    windows = _windows(x.page_table_BP)

    def ring(part: jax.Array, *width: int) -> Any:
        return pltpu.VMEM((sizes.depth, K, sizes.block, *width), part.dtype)

    scratch = Scratch(
        buffers=Cache(
            *(ring(part, H) for part in cache[:2]),
            *(part if part is None else ring(part) for part in cache[2:]),
        ),
        arrived=pltpu.SemaphoreType.DMA((sizes.depth,)),
        cursor=pltpu.SMEM((len(("row", "block", "asked", "attended", "window")),), jnp.int32),
        window=None if windows is None else pltpu.SMEM(windows.shape[1:], jnp.int32),
        window_arrived=None if windows is None else pltpu.SemaphoreType.DMA,
        top=pltpu.VMEM((K, rows, LANES), jnp.float32),
        sum=pltpu.VMEM((K, rows, LANES), jnp.float32),
        acc=pltpu.VMEM((K, rows, H), jnp.float32),
    )
    split_dtype = out_dtype if splits == 1 else jnp.float32
    outs = (
        backend.like(q_BKRH, (splits, B, K, rows, H), split_dtype),
        backend.like(q_BKRH, (splits, B, rows, LANES), jnp.float32),
    )
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    out_CBKRH, lse_CBRK = pl.pallas_call(
        functools.partial(attend_row, sizes=sizes, how=how),
        out_shape=outs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(splits, B),
            in_specs=[
                pl.BlockSpec((None, K, rows, H), lambda c, b, _: (b, 0, 0, 0)),
                jax.tree.map(lambda _: hbm, cache),
                jax.tree.map(lambda _: hbm, windows),
            ],
            out_specs=(
                pl.BlockSpec((None, None, K, rows, H), lambda c, b, _: (c, b, 0, 0, 0)),
                pl.BlockSpec((None, None, rows, LANES), lambda c, b, _: (c, b, 0, 0)),
            ),
            scratch_shapes=[scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        cost_estimate=_cost(x, how, sizes, cache, outs),
        interpret=backend.tpu_interpreter(),
        name="decode_attention",
    )(_plan(x, how, sizes), q_BKRH, cache, windows)

    out_CBKTGH = out_CBKRH[:, :, :, : T * G].reshape(splits, B, K, T, G, H)
    out_CBTNH = out_CBKTGH.swapaxes(2, 3).reshape(splits, B, T, N, H)
    lse_CBTGK = lse_CBRK[:, :, : T * G, :K].reshape(splits, B, T, G, K)
    lse_CBTN = lse_CBTGK.swapaxes(3, 4).reshape(splits, B, T, N)
    if splits == 1:
        return out_CBTNH[0], lse_CBTN[0]
    out_BTNH, lse_BTN = _merge(out_CBTNH, lse_CBTN)
    return out_BTNH.astype(out_dtype), lse_BTN


def _merge(out_CBTNH: jax.Array, lse_CBTN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Merge the splits by their log-sum-exp."""
    top_BTN = lse_CBTN.max(0)
    weight_CBTN = jnp.exp(lse_CBTN - top_BTN)
    sum_BTN = weight_CBTN.sum(0)
    out_BTNH = (out_CBTNH * weight_CBTN[..., None]).sum(0) / sum_BTN[..., None]
    seen_BTN = top_BTN > NEGATIVE / 2
    return out_BTNH, jnp.where(seen_BTN, top_BTN + jnp.log(sum_BTN), NEGATIVE)
