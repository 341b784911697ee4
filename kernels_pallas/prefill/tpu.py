"""Prefill attention on TPUs: one program for the query heads of a kv head and a block of queries.

The kernel of chunked attention on keys that lie in a cache. Which blocks of slots a block of
queries sees follows from positions and lengths alone, in closed form, so that nothing is made for
every slot but, if tokens have scales, these in the order of the row. A block of slots comes in
pieces, each from its page; the page table comes from HBM in windows. 8-bit keys and values cross
HBM as they are stored, and are widened once for all the heads that share them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import backend, tuning
from kernels_pallas.attention import tpu_blocks as tb
from kernels_pallas.attention import tpu_sizes
from kernels_pallas.attention.tpu_softmax import Softmax
from kernels_pallas.attention.visibility import Settings
from kernels_pallas.decode.inputs import Inputs, scales_in_order
from kernels_pallas.prefill.queries import Blocks, summarize
from kernels_pallas.tpu_primitives import LANES, in_hbm, round_up

_TILE = 8  # slots are copied in multiples of it
_WINDOW = 1024  # entries of the page table in SMEM at a time
# q; out and sum; k and v as stored, twice, and widened
_HOLDS = tpu_sizes.Holds(queries=2, query_sums=2 + 1, rows=2, keys=4 + 2, key_sums=0)


class _Cache(NamedTuple):
    """Keys and values with heads first [pages, K, page, H]; scales [B, K, blocks, 1, bkv]."""

    k: Any
    v: Any
    k_scale: Any
    v_scale: Any


class _Scratch(NamedTuple):
    """What a core keeps in VMEM and SMEM.

    Attributes:
        columns, factors: of the queries, see `tb.set_columns`.
        softmax: of the queries.
        buffers: two blocks of slots as stored, and their scales.
        wide_k, wide_v: a block in the dtype that is multiplied; None if it is stored so.
        window: of the page table; held: which one.
        slot: where the next first block comes.
        arrived, window_arrived: semaphores.
    """

    columns: Any
    factors: Any
    softmax: Softmax
    buffers: _Cache
    wide_k: Any
    wide_v: Any
    window: Any
    held: Any
    slot: Any
    arrived: Any
    window_arrived: Any


class _Pieces(NamedTuple):
    """The copies of a block that comes in pieces; looks like one of them."""

    copy: Callable[..., None]

    def start(self) -> None:
        """Start every copy."""
        self.copy(is_start=True)

    def wait(self) -> None:
        """Wait for every copy."""
        self.copy(is_start=False)


class _Sizes(NamedTuple):
    """Static sizes: as `tpu_sizes.Shape`, slots for keys, and slots of a page and of a copy."""

    B: int
    T: int
    S: int
    K: int
    G: int
    H: int
    bq: int
    bkv: int
    page: int
    piece: int


def _compute_dtype(x: Inputs) -> jnp.dtype:
    is_float = x.k_BSKH.dtype in (jnp.bfloat16, jnp.float32)
    return jnp.promote_types(x.q_BTNH.dtype, x.k_BSKH.dtype if is_float else jnp.bfloat16)


def unsupported_reason(x: Inputs, how: Settings) -> str | None:
    """Return why these arrays cannot be taken, or None if they can."""
    del how
    floats = (jnp.bfloat16, jnp.float32)
    if x.q_BTNH.dtype not in floats:
        return f"queries of {x.q_BTNH.dtype} are neither bfloat16 nor float32"
    if x.k_BSKH.dtype not in (*floats, jnp.int8, jnp.float8_e4m3fn):
        return f"a cache of {x.k_BSKH.dtype} is none of bfloat16, float32, int8 and float8_e4m3fn"
    H = x.q_BTNH.shape[3]
    if H % 8 or H > 256:
        return f"head_dim ({H}) is not a multiple of 8 up to 256"
    if x.k_BSKH.shape[1] % _TILE:
        return f"pages of {x.k_BSKH.shape[1]} slots are not a multiple of {_TILE}"
    return tpu_sizes.vmem_reason(_sizes(x), _HOLDS, _compute_dtype(x).itemsize)


def _sizes(x: Inputs) -> _Sizes:
    """Choose the blocks: some thousand rows of queries for each copy of a block of slots."""
    (B, T, N, H), (_, page, K, _) = x.q_BTNH.shape, x.k_BSKH.shape
    G = N // K
    default = {"q": tpu_sizes.query_block(G), "kv": tpu_sizes.KV_BLOCK}
    shape = {"head_dim": H, "group": G, "dtype": str(x.k_BSKH.dtype)}
    sizes = tuning.lookup("prefill_attention", default, **shape)
    bq = tpu_sizes.fit(T, sizes["q"], 16)
    bkv = block_size(page, sizes["kv"], x.num_slots)
    s = _Sizes(B, T, x.num_slots, K, G, H, bq, bkv, page, math.gcd(page, bkv))
    return tpu_sizes.fit_vmem(s, _HOLDS, _compute_dtype(x).itemsize, 16)


def block_size(page: int, block: int, slots: int) -> int:
    """Return the block near a wanted size that is cut into the fewest copies.

    A copy is of slots of one page, as many as divide the page and the block. From 128 on it does
    not matter how many they are, and the block is the wanted one, or what is next to it below.
    """
    wanted = min(block, round_up(slots, LANES))
    sizes = range(LANES, min(block * 5 // 4, round_up(slots, LANES)) + 1, LANES)

    def worth(size: int) -> tuple[int, bool, int]:
        return min(math.gcd(page, size), LANES), size <= wanted, size

    return max(sizes, key=worth)


def _kernel(s: _Sizes, how: Settings):
    """Return the kernel for static sizes and settings."""
    p = tpu_sizes.Programs.of(s)

    def kernel(plan, q_marks, q_ref, cache, windows, out_ref, lse_ref, scratch):
        program, h, i = (pl.program_id(axis) for axis in range(3))
        b = p.row(program)

        def blocks_of(i: Any) -> Blocks:
            return Blocks.read(plan, p.block(program, i))

        here = blocks_of(i)
        buffers = scratch.buffers

        def hold_window(page: Any) -> Any:
            """Bring the window with a page of the row, unless it is here; return its entry."""
            per_row, entries = windows.shape[0] // s.B, windows.shape[2]
            wanted = b * per_row + jax.lax.div(page, entries)

            @pl.when(scratch.held[0] != wanted)
            def _() -> None:
                copy = pltpu.make_async_copy(
                    windows.at[wanted], scratch.window, scratch.window_arrived
                )
                copy.start()
                copy.wait()
                scratch.held[0] = wanted

            return scratch.window[0, jax.lax.rem(page, entries)]

        def copy_pieces(j: Any, slot: Any, *, is_start: bool) -> None:
            first = jnp.maximum(jax.lax.div(here.row_begin, s.piece) * s.piece, j * s.bkv)
            stop = jnp.minimum(here.row_end, (j + 1) * s.bkv)

            def step(n: Any, _: None) -> None:
                source = first + n * s.piece
                # Where a copy came from does not matter to those who wait for it.
                page = hold_window(jax.lax.div(source, s.page)) if is_start else 0
                at = pl.ds(pl.multiple_of(jax.lax.rem(source, s.page), s.piece), s.piece)
                to = pl.ds(pl.multiple_of(source - j * s.bkv, s.piece), s.piece)
                for kind in range(2):
                    copy = pltpu.make_async_copy(
                        cache[kind].at[page, h, at],
                        buffers[kind].at[slot, to],
                        scratch.arrived.at[kind, slot],
                    )
                    copy.start() if is_start else copy.wait()

            jax.lax.fori_loop(0, pl.cdiv(stop - first, s.piece), step, None)

        def copies(j: Any, slot: Any) -> list[Any]:
            found: list[Any] = [_Pieces(functools.partial(copy_pieces, j, slot))]
            for kind in range(2, 4):
                if cache[kind] is not None:
                    source, target = cache[kind].at[b, h, j], buffers[kind].at[slot]
                    arrived = scratch.arrived.at[kind, slot]
                    found.append(pltpu.make_async_copy(source, target, arrived))
            return found

        def visit(j: Any, slot: Any) -> None:
            first = j * s.bkv
            k, v = buffers.k.at[slot], buffers.v.at[slot]
            if scratch.wide_k is not None:
                for stored, wide in ((k, scratch.wide_k), (v, scratch.wide_v)):
                    wide[...] = stored[...].astype(wide.dtype)
                k, v = scratch.wide_k, scratch.wide_v

            @pl.when((first < here.row_begin) | (first + s.bkv > here.row_end))
            def _() -> None:  # a weight of 0 times NaN would be NaN
                slots = first + jax.lax.broadcasted_iota(jnp.int32, (s.bkv, 1), 0)
                is_held = (slots >= here.row_begin) & (slots < here.row_end)
                v[...] = jnp.where(is_held, v[...], jnp.zeros_like(v))

            def attend(is_masked: bool) -> None:
                slots = first + jax.lax.broadcasted_iota(jnp.int32, (1, s.bkv), 1)
                scratch.softmax.add(
                    *(q_ref, k, v),
                    factor=lambda: tb.factor(scratch.factors, how, s.bkv),
                    mask=tb.mask(scratch.columns, slots) if is_masked else None,
                    k_scale=None if buffers.k_scale is None else buffers.k_scale[slot],
                    v_scale=None if buffers.v_scale is None else buffers.v_scale[slot],
                )

            is_whole = (first >= here.all_begin) & (first + s.bkv <= here.all_end)
            pl.when(is_whole)(lambda: attend(False))
            pl.when(~is_whole)(lambda: attend(True))

        @pl.when(i == 0)
        def _() -> None:
            scratch.held[0] = -1

        tb.set_columns(scratch.columns, scratch.factors, q_marks, how)
        # From positions to slots of the cache that hold something.
        scratch.columns[0] -= here.start
        scratch.columns[1] = jnp.minimum(scratch.columns[1] - here.start, here.row_end - 1)
        scratch.softmax.clear()
        tb.walk(
            i,
            p.blocks,
            bounds=lambda i: blocks_of(i).bounds(s.bkv),
            copies=copies,
            slot_ref=scratch.slot,
            visit=visit,
        )
        scratch.softmax.write(out_ref, lse_ref)

    return kernel


def _heads_first(x: Inputs, how: Settings, s: _Sizes) -> _Cache:
    """Return the cache with slots after heads, held in HBM, and scales in the order of rows."""

    def in_order(scale_PSK: jax.Array | None) -> jax.Array | None:
        scale_BKS = scales_in_order(x, how, scale_PSK, s.bkv)
        if scale_BKS is None:
            return None
        return in_hbm(scale_BKS.reshape(s.B, s.K, -1, 1, s.bkv))

    k, v = (in_hbm(a.swapaxes(1, 2)) for a in (x.k_BSKH, x.v_BSKH))
    return _Cache(k, v, in_order(x.k_scale_BSK), in_order(x.v_scale_BSK))


def _windows(table_BP: jax.Array) -> jax.Array:
    """Cut the page table into windows: [B * windows, 1, entries]."""
    entries = min(_WINDOW, round_up(table_BP.shape[1], LANES))
    return in_hbm(tb.padded(table_BP, 1, entries).reshape(-1, 1, entries))


def _scratch(s: _Sizes, cache: _Cache, windows: jax.Array, dtype: jnp.dtype) -> _Scratch:
    scale = pltpu.VMEM((2, 1, s.bkv), jnp.float32)
    buffer = pltpu.VMEM((2, s.bkv, s.H), cache.k.dtype)
    wide = None if cache.k.dtype == dtype else pltpu.VMEM((s.bkv, s.H), dtype)
    return _Scratch(
        columns=pltpu.VMEM((2, s.bq, LANES), jnp.int32),
        factors=pltpu.VMEM((s.bq, LANES), jnp.float32),
        softmax=Softmax.scratch(s.G, s.bq, s.H),
        buffers=_Cache(buffer, buffer, *(a if a is None else scale for a in cache[2:])),
        wide_k=wide,
        wide_v=wide,
        window=pltpu.SMEM(windows.shape[1:], jnp.int32),
        held=pltpu.SMEM((1,), jnp.int32),
        slot=pltpu.SMEM((1,), jnp.int32),
        arrived=pltpu.SemaphoreType.DMA((4, 2)),
        window_arrived=pltpu.SemaphoreType.DMA,
    )


def forward(x: Inputs, how: Settings, *, out_dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Attend; see `api.prefill_attention`.

    Args:
        x: arrays that `unsupported_reason` does not refuse.
        how: static settings.
        out_dtype: of the output.

    Returns:
        (out_BTNH in out_dtype, lse_BTN float32).
    """
    x = x.in_pages()
    assert x.page_table_BP is not None
    s, dtype = _sizes(x), _compute_dtype(x)
    p = tpu_sizes.Programs.of(s)
    plan = summarize(x, how, s.bq)
    cache, windows = _heads_first(x, how, s), _windows(x.page_table_BP)
    q = tb.head_major(x.q_BTNH.astype(dtype), s.K)
    nq = pl.cdiv(s.T, s.bq)
    q_spec = pl.BlockSpec(
        (None, None, s.G, s.bq, s.H), lambda b, h, i: (p.row(b), h, 0, p.block(b, i), 0)
    )
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    walked = s.bkv * sum(
        part.dtype.itemsize * (s.H if part.ndim == 4 else 1) for part in cache if part is not None
    )
    out_BKGTH, lse_BKnGT = pl.pallas_call(
        _kernel(s, how),
        grid=(p.parts * s.B, s.K, p.blocks),
        in_specs=[
            tb.scalars_spec(plan, p.row),
            pl.BlockSpec((None, None, 1, s.bq), lambda b, h, i: (p.row(b), p.block(b, i), 0, 0)),
            q_spec,
            jax.tree.map(lambda _: hbm, cache),
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
            backend.like(q, q.shape, out_dtype),
            backend.like(q, (s.B, s.K, nq, s.G, s.bq), jnp.float32),
        ],
        scratch_shapes=[_scratch(s, cache, windows, dtype)],
        compiler_params=tb.params(),
        cost_estimate=tb.cost(
            s,
            how,
            products=2,
            owned=q.size * (dtype.itemsize + jnp.dtype(out_dtype).itemsize),
            walked=walked,
        ),
        interpret=backend.tpu_interpreter(),
        name="prefill_attention",
    )(tb.scalars(plan), tb.marks(x.q_positions_BT, None, s.bq), q, cache, windows)
    lse_BTN = lse_BKnGT.transpose(0, 2, 4, 1, 3).reshape(s.B, -1, s.K * s.G)[:, : s.T]
    return tb.token_major(out_BKGTH), lse_BTN
