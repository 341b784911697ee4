"""Decode attention for Hopper GPUs (sm90) in Pallas Mosaic GPU: flash-decoding, split over keys.

A decoding step reads the cache once and computes little, so all is arranged by bytes. The slots
that a row has to read are divided evenly among `splits` programs per sequence and kv head, enough
of them to give every multiprocessor its two; no block outside of the row's slots is copied. The
programs (`gpu_kernel`) write outputs and log-sum-exps in float32, and XLA merges them.

TMA wants slots of one head next to each other, so the cache is taken head-major: a cache stored
[B, K, S, H] and passed as its `swapaxes(1, 2)` is read where it lies, the two transpositions
cancel. Any other is transposed first, which copies it. Pages likewise: [pages, K, page size, H].
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import backend, chips, tuning
from kernels_pallas.attention.visibility import Settings, attention_temperature, first_visible
from kernels_pallas.decode.gpu_kernel import LOG2E, ROWS, Arrays, Plan, Rows, attend_split
from kernels_pallas.decode.inputs import Inputs, slots_seen

_BESIDES = 2 * 1024  # bytes of shared memory that programs have besides the tiles
_TAKES_COST = "cost_estimate" in inspect.signature(plgpu.kernel).parameters


def _plan(x: Inputs) -> Plan:
    B, T, N, H = x.q_BTNH.shape
    K, stored = x.k_BSKH.shape[2], x.k_BSKH.dtype
    dtype = jnp.dtype(jnp.bfloat16) if stored.itemsize == 1 else stored
    per_processor = 2 if H <= 128 else 1
    found = tuning.lookup(
        "decode_attention", {"kv": 64, "splits": 0, "stages": 0}, head_dim=H, dtype=stored.name
    )
    block = min(found["kv"], H)  # probabilities [64, block] must fit where keys [block, H] were
    programs = per_processor * backend.gpu().multiprocessors // (B * K)
    splits = found["splits"] or max(programs, min(8, B))
    scales = sum(block * s.dtype.itemsize for s in (x.k_scale_BSK, x.v_scale_BSK) if s is not None)
    tiles = ROWS * H * 2 + (2 * block * H * 2 if stored.itemsize == 1 else 0)
    smem = (backend.gpu().smem - _BESIDES) // per_processor
    stages = (smem - tiles) // (2 * block * H * stored.itemsize + scales)
    return Plan(
        head_dim=H,
        rows=-(-T * N // (K * 8)) * 8,
        block=block,
        page_size=None if x.page_table_BP is None else x.k_BSKH.shape[1],
        splits=min(splits, pl.cdiv(x.num_slots, 4 * block)),
        stages=found["stages"] or min(stages, 8),
        dtype=dtype,
    )


def unsupported_reason(x: Inputs, how: Settings) -> str | None:
    """Return why these shapes and dtypes cannot be taken, or None if they can."""
    del how
    _, T, N, H = x.q_BTNH.shape
    K, stored = x.k_BSKH.shape[2], x.k_BSKH.dtype
    kind = backend.device_kind()
    if not backend.gpu_interpreter() and not chips.is_hopper(kind):
        return f"it needs a Hopper GPU, and this is {kind}"
    if stored not in (jnp.bfloat16, jnp.float16, jnp.int8, jnp.float8_e4m3fn):
        return f"its caches are bfloat16, float16, int8 or float8_e4m3fn, not {stored.name}"
    if x.v_BSKH.dtype != stored:
        return f"keys ({stored.name}) and values ({x.v_BSKH.dtype.name}) differ in dtype"
    if H not in (64, 128, 256):
        return f"its head dims are 64, 128 and 256, not {H}"
    if T * N // K > ROWS:
        return f"a kv head has {T * N // K} query rows, and it takes {ROWS}"
    scales = [s for s in (x.k_scale_BSK, x.v_scale_BSK) if s is not None]
    if any(s.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16) for s in scales):
        return "its scales are float32, bfloat16 or float16"
    plan = _plan(x)
    if x.q_BTNH.dtype != plan.dtype:
        return (
            f"queries of a cache of {stored.name} are {plan.dtype.name}, not {x.q_BTNH.dtype.name}"
        )
    if (page := plan.page_size) is not None:
        if page % 8:
            return f"pages of {page} slots are not a multiple of 8"
        if any(plan.copy * s.dtype.itemsize % 128 for s in scales):
            return f"pages of {page} slots have less than 128 bytes of scales"
    elif x.num_slots % 8:
        return f"its caches have a multiple of 8 slots, not {x.num_slots}"  # rows of a TMA tile
    return None


def _rows(x: Inputs, how: Settings) -> Rows:
    """Give the rows t * G + g; rows that are not there see nothing. Logits are to base 2."""
    group = x.q_BTNH.shape[2] // x.k_BSKH.shape[2]
    positions_BT, start_B1 = x.q_positions_BT, x.kv_start_B[:, None]
    factor_BT = jnp.full(positions_BT.shape, how.scale * LOG2E, jnp.float32)
    if how.temperature is not None:
        factor_BT *= attention_temperature(positions_BT, how.temperature)

    def spread(a_BT: jax.Array, fill: int) -> jax.Array:
        a_BR = jnp.repeat(a_BT, group, axis=1)
        return jnp.pad(a_BR, ((0, 0), (0, ROWS - a_BR.shape[1])), constant_values=fill)

    return Rows(
        spread(first_visible(positions_BT, how.chunk_size) - start_B1, 0),
        spread(jnp.minimum(positions_BT - start_B1, x.lengths_B[:, None] - 1), -1),
        spread(factor_BT, 0),
    )


def _arrays(x: Inputs, how: Settings) -> Arrays:
    """Put heads before slots, and queries into rows t * G + g of their kv head."""
    (B, T, _, H), K = x.q_BTNH.shape, x.k_BSKH.shape[2]
    q_BKRH = x.q_BTNH.reshape(B, T, K, -1, H).swapaxes(1, 2)
    q_BKRH = q_BKRH.reshape(B, K, -1, H)
    q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, ROWS - q_BKRH.shape[2]), (0, 0)))

    def heads_first(x_BSK_: jax.Array | None) -> jax.Array | None:
        return None if x_BSK_ is None else x_BSK_.swapaxes(1, 2)

    return Arrays(
        q_BKRH=q_BKRH,
        k_BKSH=heads_first(x.k_BSKH),
        v_BKSH=heads_first(x.v_BSKH),
        rows=_rows(x, how),
        seen_B2=jnp.stack(slots_seen(x, how), 1),
        k_scale_BKS=heads_first(x.k_scale_BSK),
        v_scale_BKS=heads_first(x.v_scale_BSK),
        page_table_BP=x.page_table_BP,
    )


def _cost(x: Inputs, how: Settings, plan: Plan) -> pl.CostEstimate:
    """Estimate as if all slots, or a whole chunk, were filled."""
    B, T, N, H = x.q_BTNH.shape
    slots = min(x.num_slots, how.chunk_size or x.num_slots)
    scales = sum(s.dtype.itemsize for s in (x.k_scale_BSK, x.v_scale_BSK) if s is not None)
    cached = B * slots * x.k_BSKH.shape[2] * (2 * H * x.k_BSKH.dtype.itemsize + scales)
    written = B * x.k_BSKH.shape[2] * plan.splits * (plan.rows * H + ROWS) * 4
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
    B, H, K = x.q_BTNH.shape[0], x.q_BTNH.shape[3], x.k_BSKH.shape[2]
    plan = _plan(x)
    a = _arrays(x, how)
    leaves, tree = jax.tree.flatten(a)

    def decode_attention(*refs):
        attend_split(jax.tree.unflatten(tree, refs[:-2]), plan, *refs[-2:])

    shape = (B, K, plan.splits)
    cost: dict[str, Any] = {"cost_estimate": _cost(x, how, plan)} if _TAKES_COST else {}
    out_BKARH, lse_BKAR = plgpu.kernel(
        decode_attention,
        out_type=(
            backend.like(x.q_BTNH, (*shape, plan.rows, H), jnp.float32),
            backend.like(x.q_BTNH, (*shape, ROWS), jnp.float32),
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
