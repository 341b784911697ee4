"""Gradients of attention on Hopper GPUs: one kernel for dq, another for dk and dv.

Neither the products nor the weights were kept: both kernels compute them again from the
log-sum-exp, p = exp(s - lse), and with dp = dout v^T and delta = sum(out dout) - dlse have
ds = p (dp - delta). The first is built like the forward pass, with dq = ds k in the place of the
output. The second holds keys and values and walks over the queries of all heads that read them, so
that dk = ds^T q and dv = p^T dout stay in registers; its tiles are transposed, keys by queries.

Two warpgroups multiply. In the second kernel each has 64 keys of its own up to a head of 128; a
head of 256 leaves no registers for that, and each has one half of the columns of the same 64 keys.
Its two accumulators take more registers than a block with a third warpgroup for the copies could
give, so there the first warpgroup starts the copies as well.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import tuning
from kernels_pallas.attention import gpu_blocks
from kernels_pallas.attention.gpu_blocks import (
    LN2,
    LOG2E,
    OF_COLUMNS,
    OF_ROWS,
    ROWS,
    Stream,
    accumulate,
    across,
    down,
    filled,
    load,
    mask,
    product,
)
from kernels_pallas.attention.visibility import (
    Inputs,
    KeyBlocks,
    QueryBlocks,
    Settings,
    may_see,
    sees_all,
)

_MULTIPLIERS = 2  # warpgroups that multiply; one more copies
_LONG = ROWS * _MULTIPLIERS
_FACTOR, _LSE, _DELTA = range(3)  # what is known of a query: see `_numbers`


def _dq(*refs: Any, segmented: bool, kv_block: int, stages: int) -> None:
    (q, k, v, do, numbers, rows, columns, q_table, kv_table, dq), scratch = refs[:10], refs[10:]
    q_smem, do_smem, k_smem, v_smem, q_ready, kv_ready, kv_free = scratch
    b, n = jax.lax.axis_index("batch"), jax.lax.axis_index("head")
    i = q_table.shape[1] - 1 - jax.lax.axis_index("block")
    group = jax.lax.axis_index("warpgroup")
    kv_head, H = n // (q.shape[2] // k.shape[2]), q.shape[3]
    multipliers = gpu_blocks.multipliers(H)

    def queries() -> QueryBlocks:
        return gpu_blocks.query_block(q_table, b, i)

    def walk(step: Any, carry: Any) -> Any:
        def meets(j: jax.Array) -> jax.Array:
            return may_see(queries(), gpu_blocks.key_block(kv_table, b, j))

        begin, end = queries().begin, queries().end
        return gpu_blocks.walk(begin, end, meets, step, carry)

    def copy() -> None:
        gpu_blocks.set_registers(False, H)

        def copies(j: jax.Array, slot: jax.Array) -> Any:
            block = b, pl.ds(j * kv_block, kv_block), kv_head
            return [(k.at[block], k_smem.at[slot]), (v.at[block], v_smem.at[slot])]

        def fetch(turn: jax.Array, j: jax.Array, _: None) -> None:
            pairs.fetch(turn, j)

        pairs = Stream(copies, kv_ready, kv_free)
        turns, _ = walk(fetch, None)
        pairs.drain(turns)

    def multiply() -> None:
        gpu_blocks.set_registers(True, H)
        tokens = pl.ds((i * multipliers + group) * ROWS, ROWS)
        for ref, smem in ((q, q_smem), (do, do_smem)):
            plgpu.copy_gmem_to_smem(ref.at[b, tokens, n], smem.at[group], q_ready.at[group])
        factor, lse, delta = (load(numbers.at[b, n, c, tokens], OF_ROWS) for c in range(3))
        plgpu.barrier_wait(q_ready.at[group])

        def masked(j: jax.Array, s: jax.Array) -> jax.Array:
            keys = pl.ds(j * kv_block, kv_block)
            return mask(s, rows.at[b, :, tokens], columns.at[b, :, keys], segmented)

        def step(turn: jax.Array, j: jax.Array, acc: jax.Array) -> jax.Array:
            slot = jax.lax.rem(turn, jnp.int32(stages))
            plgpu.barrier_wait(kv_ready.at[slot])
            s = product((q_smem.at[group], k_smem.at[slot]))
            is_whole = sees_all(queries(), gpu_blocks.key_block(kv_table, b, j))
            s = jax.lax.cond(is_whole, lambda s: s, functools.partial(masked, j), s)
            p = jnp.exp2(s * across(factor, s.shape) - across(lse, s.shape))
            dp = product((do_smem.at[group], v_smem.at[slot]))
            ds = p * (dp - across(delta, s.shape))
            acc = accumulate(acc, ds.astype(k.dtype), k_smem.at[slot])
            plgpu.barrier_arrive(kv_free.at[slot])
            return acc

        _, acc = walk(step, filled(0, (ROWS, H), plgpu.Layout.WGMMA))
        q_smem.at[group][...] = (acc * across(factor * LN2, acc.shape)).astype(dq.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[group], dq.at[b, tokens, n])
        plgpu.wait_smem_to_gmem(0)

    pl.when(group < multipliers)(multiply)
    pl.when(group == multipliers)(copy)


def _dkv(*refs: Any, segmented: bool, q_block: int, stages: int) -> None:
    (q, k, v, do, numbers, rows, columns, q_table, kv_table, dk, dv), scratch = refs[:11], refs[11:]
    (k_smem, v_smem, q_smem, do_smem, numbers_smem), barriers = scratch[:5], scratch[5:]
    kv_ready, q_ready, q_free, done = barriers
    b, kv_head = jax.lax.axis_index("batch"), jax.lax.axis_index("head")
    j, group = jax.lax.axis_index("block"), jax.lax.axis_index("warpgroup")
    heads = q.shape[2] // k.shape[2]  # that read one kv head
    parts, width = q_smem.shape[1], q_smem.shape[3]  # of the columns
    is_split = parts > 1
    distance = stages // 2  # of fetching ahead; the other buffers are slack between warpgroups

    def keys() -> KeyBlocks:
        return gpu_blocks.key_block(kv_table, b, j)

    def place(of: Any) -> tuple[Any, Any]:
        """Return the keys and the columns that a warpgroup has."""
        first = j * ROWS if is_split else j * _LONG + of * ROWS
        return pl.ds(first, ROWS), pl.ds(of * width if is_split else 0, width)

    mine, part = place(group)

    # Visits: the blocks of queries of one head in order, then those of the next.
    begin, length = keys().begin, keys().end - keys().begin
    end = heads * length

    def locate(visit: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return head and block of a visit."""
        some = jnp.maximum(length, 1)
        return kv_head * heads + jax.lax.div(visit, some), begin + jax.lax.rem(visit, some)

    def meets(visit: jax.Array) -> jax.Array:
        return may_see(gpu_blocks.query_block(q_table, b, locate(visit)[1]), keys())

    def copies(visit: jax.Array, slot: jax.Array) -> Any:
        n, i = locate(visit)
        tokens = pl.ds(i * q_block, q_block)
        tiles = [
            (ref.at[b, tokens, n, pl.ds(c * width, width)], smem.at[slot, c])
            for ref, smem in ((q, q_smem), (do, do_smem))
            for c in range(parts)
        ]
        return [*tiles, (numbers.at[b, n, :, tokens], numbers_smem.at[slot])]

    queries = Stream(copies, q_ready, q_free)

    def fetch(turn: jax.Array, visit: jax.Array) -> jax.Array:
        """Have the first warpgroup bring what a visit needs; return the visit after it."""

        @pl.when((group == 0) & (visit < end))
        def _copy() -> None:
            queries.fetch(turn, visit)

        return gpu_blocks.seek(visit + 1, end, meets)

    def masked(i: jax.Array, s: jax.Array) -> jax.Array:
        tokens = pl.ds(i * q_block, q_block)
        q_side, kv_side = rows.at[b, :, tokens], columns.at[b, :, mine]
        return mask(s, q_side, kv_side, segmented, transposed=True)

    def by_queries(smem: Any, ring: Any, slot: jax.Array) -> jax.Array:
        pairs = [(smem.at[c if is_split else group], ring.at[slot, c]) for c in range(parts)]
        return product(*pairs)

    def step(turn: jax.Array, visit: jax.Array, carry: Any) -> Any:
        ahead, dk_acc, dv_acc = carry
        ahead = fetch(turn + distance, ahead)
        _, i = locate(visit)
        slot = jax.lax.rem(turn, jnp.int32(stages))
        own = slot, jax.lax.rem(group, jnp.int32(parts))
        plgpu.barrier_wait(q_ready.at[slot])
        s = by_queries(k_smem, q_smem, slot)
        is_whole = sees_all(gpu_blocks.query_block(q_table, b, i), keys())
        s = jax.lax.cond(is_whole, lambda s: s, functools.partial(masked, i), s)

        def number(c: int) -> jax.Array:
            return down(plgpu.load(numbers_smem.at[slot, c], layout=OF_COLUMNS), s.shape)

        p = jnp.exp2(s * number(_FACTOR) - number(_LSE))
        dv_acc = accumulate(dv_acc, p.astype(k.dtype), do_smem.at[own])
        dp = by_queries(v_smem, do_smem, slot)
        ds = p * (dp - number(_DELTA)) * number(_FACTOR)
        plgpu.commit_smem()
        dk_acc = accumulate(dk_acc, ds.astype(k.dtype), q_smem.at[own])
        plgpu.barrier_arrive(q_free.at[slot])
        return ahead, dk_acc, dv_acc

    @pl.when(group == 0)
    def _copy_keys() -> None:
        for of in range(_MULTIPLIERS):
            tokens, columns_of = place(of)
            for ref, smem in ((k, k_smem), (v, v_smem)):
                source = ref.at[b, tokens, kv_head, columns_of]
                plgpu.copy_gmem_to_smem(source, smem.at[of], kv_ready)

    ahead = gpu_blocks.seek(jnp.int32(0), end, meets)
    for turn in range(distance):
        ahead = fetch(jnp.int32(turn), ahead)
    plgpu.barrier_wait(kv_ready)
    zero = filled(0, (ROWS, width), plgpu.Layout.WGMMA)
    start = ahead, zero, zero
    turns, (_, dk_acc, dv_acc) = gpu_blocks.walk(jnp.int32(0), end, meets, step, start)

    @pl.when(group == 0)
    def _drain() -> None:
        queries.drain(turns)

    if is_split:  # the other warpgroup may still read what is overwritten below
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)
    k_smem.at[group][...] = (dk_acc * LN2).astype(dk.dtype)
    v_smem.at[group][...] = dv_acc.astype(dv.dtype)
    plgpu.commit_smem()
    for smem, ref in ((k_smem, dk), (v_smem, dv)):
        plgpu.copy_smem_to_gmem(smem.at[group], ref.at[b, mine, kv_head, part])
    plgpu.wait_smem_to_gmem(0)


def _numbers(
    x: Inputs,
    how: Settings,
    out_BTNH: jax.Array,
    lse_BTN: jax.Array,
    dout_BTNH: jax.Array,
    dlse_BTN: jax.Array,
) -> jax.Array:
    """Collect three float32 numbers per query, [B, N, 3, T].

    The factor that takes its products to logits in base 2, the log-sum-exp in base 2, and delta.
    """
    product_BTNH = out_BTNH.astype(jnp.float32) * dout_BTNH.astype(jnp.float32)
    delta_BTN = product_BTNH.sum(-1) - dlse_BTN
    is_real_BT1 = (x.q_positions_BT >= 0)[:, :, None]
    delta_BTN = jnp.where(is_real_BT1, delta_BTN, 0)
    factor_BT1 = gpu_blocks.row_factors(x.q_positions_BT, how)[:, :, None]
    factor_BTN = jnp.broadcast_to(factor_BT1, delta_BTN.shape)
    return jnp.stack([factor_BTN, lse_BTN * LOG2E, delta_BTN], axis=2).transpose(0, 3, 2, 1)


def backward(
    x: Inputs,
    how: Settings,
    out_BTNH: jax.Array,
    lse_BTN: jax.Array,
    dout_BTNH: jax.Array,
    dlse_BTN: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the gradients of q, k and v, each in its dtype, from those of the two outputs."""
    T, S, head_dim = x.q_BTNH.shape[1], x.k_BSKH.shape[1], x.q_BTNH.shape[3]
    numbers_BNCT = _numbers(x, how, out_BTNH, lse_BTN, dout_BTNH, dlse_BTN)
    numbers_BNCT = gpu_blocks.pad(numbers_BNCT, 3, _LONG, 1)  # a factor of 0 makes NaN of -inf
    longer = gpu_blocks.padded(x, _LONG, _LONG)
    clean = longer._replace(
        q_BTNH=gpu_blocks.without_padding(longer.q_BTNH, longer.q_positions_BT),
        k_BSKH=gpu_blocks.without_padding(longer.k_BSKH, longer.kv_positions_BS),
        v_BSKH=gpu_blocks.without_padding(longer.v_BSKH, longer.kv_positions_BS),
    )
    do_BTNH = gpu_blocks.pad(gpu_blocks.pad_head(dout_BTNH.astype(x.q_BTNH.dtype)), 1, _LONG)
    do_BTNH = gpu_blocks.without_padding(do_BTNH, longer.q_positions_BT)
    dq = _backward_q(clean, how, do_BTNH, numbers_BNCT)
    dk, dv = _backward_kv(clean, how, do_BTNH, numbers_BNCT)
    return dq[:, :T, :, :head_dim], dk[:, :S, :, :head_dim], dv[:, :S, :, :head_dim]


def _backward_q(x: Inputs, how: Settings, do_BTNH: jax.Array, numbers_BNCT: jax.Array) -> jax.Array:
    q, k, v, *_ = x
    B, T, N, H = q.shape
    multipliers = gpu_blocks.multipliers(H)
    default = {"kv_block": 64, "stages": 3 if H <= 128 else 2}
    sizes = tuning.lookup("chunked_attention.dq", default, head_dim=H, dtype=q.dtype.name)
    kv_block, stages = sizes["kv_block"], sizes["stages"]
    once = plgpu.Barrier(num_arrivals=2, num_barriers=multipliers)
    ready = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=multipliers, num_barriers=stages)
    kernel = gpu_blocks.kernel(
        functools.partial(_dq, segmented=x.q_segments_BT is not None, **sizes),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=(
            plgpu.SMEM((multipliers, ROWS, H), q.dtype),
            plgpu.SMEM((multipliers, ROWS, H), q.dtype),
            plgpu.SMEM((stages, kv_block, H), q.dtype),
            plgpu.SMEM((stages, kv_block, H), q.dtype),
            *(once, ready, free),
        ),
        grid=(B, N, T // (multipliers * ROWS)),
        name="chunked_attention_dq",
        warpgroups=multipliers + 1,
        cost=gpu_blocks.cost(x, how, products=3, block=multipliers * ROWS),
    )
    return kernel(
        *(q, k, v, do_BTNH, numbers_BNCT),
        *gpu_blocks.describe(x, how),
        *gpu_blocks.tables(x, how, multipliers * ROWS, kv_block),
    )


def _backward_kv(
    x: Inputs, how: Settings, do_BTNH: jax.Array, numbers_BNCT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    q, k, v, *_ = x
    B, S, K, H = k.shape
    parts = 1 if H <= 128 else 2
    width, kv_block = H // parts, _LONG // parts
    sizes = tuning.lookup(
        "chunked_attention.dkv",
        {"q_block": 64, "stages": 4 if H <= 128 else 2},
        head_dim=H,
        dtype=q.dtype.name,
    )
    q_block, stages = sizes["q_block"], sizes["stages"]
    kernel = gpu_blocks.kernel(
        functools.partial(_dkv, segmented=x.q_segments_BT is not None, **sizes),
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch_types=(
            plgpu.SMEM((_MULTIPLIERS, ROWS, width), k.dtype),
            plgpu.SMEM((_MULTIPLIERS, ROWS, width), v.dtype),
            plgpu.SMEM((stages, parts, q_block, width), q.dtype),
            plgpu.SMEM((stages, parts, q_block, width), q.dtype),
            plgpu.SMEM((stages, 3, q_block), jnp.float32),
            plgpu.Barrier(num_arrivals=2 * _MULTIPLIERS),
            plgpu.Barrier(num_arrivals=2 * parts + 1, num_barriers=stages),
            plgpu.Barrier(num_arrivals=_MULTIPLIERS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=_MULTIPLIERS),
        ),
        grid=(B, K, S // kv_block),
        name="chunked_attention_dkv",
        warpgroups=_MULTIPLIERS,
        cost=gpu_blocks.cost(x, how, products=4, block=kv_block),
    )
    return kernel(
        *(q, k, v, do_BTNH, numbers_BNCT),
        *gpu_blocks.describe(x, how),
        *gpu_blocks.tables(x, how, q_block, kv_block),
    )
