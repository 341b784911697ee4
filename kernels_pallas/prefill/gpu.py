"""Prefill attention on Hopper GPUs: chunked attention's forward pass on keys that lie in a cache.

What multiplies is the same. The warpgroup that brings keys and values takes each block of slots
from its pages by TMA. In the blocks where a row's slots begin and end it zeroes the other values,
which may be NaN. 8-bit blocks come as they are stored into a ring of their own; the same warpgroup
widens them into the ring that is multiplied from, while the others are at the blocks before.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import backend, chips, tuning
from kernels_pallas.attention import gpu_blocks, gpu_forward
from kernels_pallas.attention.gpu_blocks import OF_ROWS, ROWS, across, load, pad
from kernels_pallas.attention.gpu_forward import Tiles
from kernels_pallas.attention.visibility import Settings, first_visible
from kernels_pallas.decode.inputs import Inputs, scales_in_order
from kernels_pallas.gpu_primitives import clear_lines, widen
from kernels_pallas.prefill.queries import Blocks, summarize

_TILE = plgpu.Layout.WGMMA
_COPIER_REGISTERS = 72  # of a thread: it widens
_BESIDES = 2 * 1024  # bytes of shared memory for barriers and the like


class _Plan(NamedTuple):
    """Sizes of one call.

    Attributes:
        q_block: queries of a block of threads.
        kv_block: slots of a step.
        page: slots of a page.
        stages: of the rings that are multiplied from.
        stored_stages: of the rings of 8-bit blocks; 0 if blocks need not be widened.
        alternate: whether warpgroups take turns.
    """

    q_block: int
    kv_block: int
    page: int
    stages: int
    stored_stages: int
    alternate: int

    @property
    def piece(self) -> int:
        """Return the slots of a copy, all in one page."""
        return math.gcd(self.page, self.kv_block)


class _Landing(NamedTuple):
    """Where TMA puts blocks.

    Attributes:
        k, v: rings of 8-bit blocks; None if blocks are multiplied where they land.
        k_landed, v_landed: barriers of the slots.
    """

    k: Any
    v: Any
    k_landed: Any
    v_landed: Any


class _Refs(NamedTuple):
    """What is in global memory; see `_arrays`."""

    q: Any
    k: Any
    v: Any
    rows: Any
    plan: Any
    table: Any
    k_scale: Any
    v_scale: Any


def _plan(x: Inputs) -> _Plan:
    head_dim, page, stored = x.q_BTNH.shape[3], x.k_BSKH.shape[1], x.k_BSKH.dtype
    is_wide = stored.itemsize == 1
    default = {
        "kv_block": 64 if is_wide or head_dim > 128 else 128,
        "stages": 2,
        "stored_stages": 3,
        "alternate": 1,
    }
    sizes = tuning.lookup("prefill_attention", default, head_dim=head_dim, dtype=stored.name)
    q_block = ROWS * gpu_blocks.multipliers(head_dim)
    block = sizes["kv_block"] * head_dim  # numbers of keys or of values
    left = backend.gpu().smem - 2 * q_block * (head_dim + 64 + 2) - 4 * sizes["stages"] * block
    fitting = (left - _BESIDES) // (2 * block)
    sizes["stored_stages"] = is_wide * max(1, min(sizes["stored_stages"], fitting))
    return _Plan(q_block, page=page, **sizes)


def unsupported_reason(x: Inputs, how: Settings) -> str | None:
    """Say why these arrays cannot be taken; None if they can."""
    del how
    stored, H, kind = x.k_BSKH.dtype, x.q_BTNH.shape[3], backend.device_kind()
    if not backend.gpu_interpreter() and not chips.is_hopper(kind):
        return f"it needs a Hopper GPU, and this is {kind}"
    if stored not in (jnp.bfloat16, jnp.float16, jnp.int8, jnp.float8_e4m3fn):
        return f"its caches are bfloat16, float16, int8 or float8_e4m3fn, not {stored.name}"
    wanted = jnp.dtype(jnp.bfloat16) if stored.itemsize == 1 else stored
    if x.q_BTNH.dtype != wanted:
        return f"queries of a cache of {stored.name} are {wanted.name}, not {x.q_BTNH.dtype.name}"
    if H not in (64, 128, 256):
        return f"its head dims are 64, 128 and 256, not {H}"
    if x.k_BSKH.shape[1] % 8:
        return f"pages of {x.k_BSKH.shape[1]} slots are not a multiple of 8"
    return None


def _arrays(x: Inputs, how: Settings, plan: _Plan) -> _Refs:
    """Put heads before slots, queries into whole blocks, and what they see into tables."""
    assert x.page_table_BP is not None
    blocks = summarize(x, how, plan.q_block)
    fields = [*blocks] + [jnp.zeros_like(blocks.begin)] * (8 - len(blocks))
    positions_BT = pad(x.q_positions_BT, 1, plan.q_block, -1)
    start_B1, last_B1 = x.kv_start_B[:, None], blocks.row_end[:, :1] - 1
    lo_BT = first_visible(positions_BT, how.chunk_size) - start_B1
    hi_BT = jnp.where(positions_BT < 0, -1, jnp.minimum(positions_BT - start_B1, last_B1))
    return _Refs(
        q=pad(x.q_BTNH, 1, plan.q_block),
        k=x.k_BSKH.swapaxes(1, 2),
        v=x.v_BSKH.swapaxes(1, 2),
        rows=jnp.stack([lo_BT, hi_BT, positions_BT], axis=1),
        plan=jnp.stack(fields, axis=-1),
        table=x.page_table_BP,
        k_scale=scales_in_order(x, how, x.k_scale_BSK, plan.kv_block),
        v_scale=scales_in_order(x, how, x.v_scale_BSK, plan.kv_block),
    )


class _Line(NamedTuple):
    """The way of keys, or of values, from their pages to the tiles that are multiplied.

    Attributes:
        source: pages in global memory.
        landing: the ring in which they come; that of the tiles if they need not be widened.
        landed: its barriers.
        tiles, ready, free: the ring that is multiplied from.
        is_clean: whether slots that nobody sees have to be zero.
    """

    source: Any
    landing: Any
    landed: Any
    tiles: Any
    ready: Any
    free: Any
    is_clean: bool

    def fetch(self, turn: jax.Array, pages: list[Any], slots: list[Any], head: Any) -> None:
        """Copy a block, piece by piece."""
        place = jax.lax.rem(turn, jnp.int32(self.landing.shape[0]))
        if self.landing is self.tiles:
            self._reuse(turn, place)
        for n, (page, at) in enumerate(zip(pages, slots, strict=True)):
            source, piece = self.source.at[page, head, at], pl.ds(n * at.size, at.size)
            target = self.landing.at[place, piece]
            plgpu.copy_gmem_to_smem(source, target, self.landed.at[place])

    def settle(self, turn: jax.Array, begin: jax.Array, end: jax.Array) -> None:
        """Make a block that has landed ready; its lines [begin, end) are seen by somebody."""
        place = jax.lax.rem(turn, jnp.int32(self.landing.shape[0]))
        slot = jax.lax.rem(turn, jnp.int32(self.tiles.shape[0]))
        plgpu.barrier_wait(self.landed.at[place])
        tile = self.tiles.at[slot]
        if self.landing is not self.tiles:
            self._reuse(turn, slot)
            widen(self.landing.at[place], tile)
        if self.is_clean:
            is_cut = (begin > 0) | (end < tile.shape[0])
            pl.when(is_cut)(lambda: clear_lines(tile, begin, end))
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.ready.at[slot])

    def _reuse(self, turn: jax.Array, slot: jax.Array) -> None:
        """Wait until what a slot held has been multiplied."""
        stages = self.tiles.shape[0]
        pl.when(turn >= stages)(lambda: plgpu.barrier_wait(self.free.at[slot]))


def _copy(
    refs: _Refs, tiles: Tiles, landing: _Landing, plan: _Plan, here: Blocks, b: Any, head: Any
) -> None:
    """Bring the blocks of slots that a block of queries sees."""
    size, piece, page_size = plan.kv_block, plan.piece, plan.page
    first, stop = here.bounds(size)
    turns = stop - first
    lines = [
        _Line(refs.k, landing.k, landing.k_landed, tiles.k, tiles.k_ready, tiles.k_free, False),
        _Line(refs.v, landing.v, landing.v_landed, tiles.v, tiles.v_ready, tiles.v_free, True),
    ]
    if landing.k is None:
        lines = [line._replace(landing=line.tiles) for line in lines]
    ahead = plan.stored_stages or plan.stages - 1

    def fetch(line: _Line, turn: jax.Array) -> None:
        at = [(first + turn) * size + offset for offset in range(0, size, piece)]
        # A block may start before the first page that is seen, and end after the last.
        least = jax.lax.div(here.row_begin, page_size)
        most = jax.lax.div(here.row_end - 1, page_size)
        numbers = [jnp.clip(jax.lax.div(slot, page_size), least, most) for slot in at]
        pages = [refs.table[b, number] for number in numbers]
        slots = [pl.ds(jax.lax.rem(slot, page_size), piece) for slot in at]
        pl.when(turn < turns)(lambda: line.fetch(turn, pages, slots, head))

    for turn in range(ahead):
        for line in lines:
            fetch(line, jnp.int32(turn))

    def step(turn: jax.Array, _: None) -> None:
        start = (first + turn) * size
        for line in lines:
            line.settle(turn, here.row_begin - start, here.row_end - start)
            fetch(line, turn + ahead)

    jax.lax.fori_loop(0, turns, step, None)

    def drain(line: _Line) -> None:
        for slot in range(plan.stages):
            pl.when(slot < turns)(lambda slot=slot: plgpu.barrier_wait(line.free.at[slot]))

    for line in lines:
        drain(line)


def _attend(*arguments: Any, plan: _Plan, how: Settings, tree: Any) -> None:
    refs, out, lse, tiles, landing = jax.tree.unflatten(tree, arguments)
    b, n = jax.lax.axis_index("batch"), jax.lax.axis_index("head")
    i = refs.plan.shape[1] - 1 - jax.lax.axis_index("block")  # the longest of causal rows first
    group = jax.lax.axis_index("warpgroup")
    H = refs.q.shape[3]
    head = n // (refs.q.shape[2] // refs.k.shape[1])
    multipliers = gpu_blocks.multipliers(H)

    def here() -> Blocks:
        return Blocks(*(refs.plan[b, i, field] for field in range(len(Blocks._fields))))

    def copy() -> None:
        gpu_blocks.set_registers(False, H, _COPIER_REGISTERS)
        _copy(refs, tiles, landing, plan, here(), b, head)

    def multiply() -> None:
        gpu_blocks.set_registers(True, H, _COPIER_REGISTERS)
        tokens = pl.ds((i * multipliers + group) * ROWS, ROWS)

        def walk(step: Any, carry: Any) -> Any:
            first, stop = here().bounds(plan.kv_block)
            run = jax.lax.fori_loop(0, stop - first, lambda t, c: step(t, first + t, c), carry)
            return stop - first, run

        def is_whole(j: jax.Array) -> jax.Array:
            start = j * plan.kv_block
            return (start >= here().all_begin) & (start + plan.kv_block <= here().all_end)

        def mask(j: jax.Array, s: jax.Array) -> jax.Array:
            start = j * plan.kv_block
            slots = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=_TILE) + start
            lo, hi = (across(load(refs.rows.at[b, at, tokens], OF_ROWS), s.shape) for at in (0, 1))
            return jnp.where((slots >= lo) & (slots <= hi), s, -jnp.inf)

        def scales(j: jax.Array) -> tuple[Any, Any]:
            at = pl.ds(j * plan.kv_block, plan.kv_block)
            found = [a if a is None else a.at[b, head, at] for a in (refs.k_scale, refs.v_scale)]
            return found[0], found[1]

        gpu_forward.multiply(
            tiles,
            gpu_forward.Keys(walk, is_whole, mask, scales),
            (refs.q, out, lse),
            (b, tokens, n),
            group,
            lambda: gpu_blocks.row_factors(load(refs.rows.at[b, 2, tokens], OF_ROWS), how),
        )

    pl.when(group < multipliers)(multiply)
    pl.when(group == multipliers)(copy)


def _cost(x: Inputs, how: Settings, plan: _Plan, out_dtype: Any) -> pl.CostEstimate:
    """Estimate as if the queries were the last of rows that are full."""
    B, T, N, H = x.q_BTNH.shape
    S, chunk = x.num_slots, how.chunk_size
    seen = chunk // 2 if chunk is not None and chunk < S else S - min(T, S) // 2
    pairs = B * N * T * seen
    slot = 2 * H * x.k_BSKH.dtype.itemsize
    slot += sum(4 for scale in (x.k_scale_BSK, x.v_scale_BSK) if scale is not None)
    q_width = x.q_BTNH.dtype.itemsize + jnp.dtype(out_dtype).itemsize
    return pl.CostEstimate(
        flops=4 * pairs * H,
        transcendentals=pairs,
        bytes_accessed=x.q_BTNH.size * q_width + pairs // min(plan.q_block, T) * slot,
    )


def forward(x: Inputs, how: Settings, *, out_dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Attend; see `api.prefill_attention`.

    Returns:
        (out_BTNH in out_dtype, lse_BTN float32)
    """
    x, plan = x.in_pages(), _plan(x)
    B, T, N, H = x.q_BTNH.shape
    refs = _arrays(x, how, plan)
    length, dtype = refs.q.shape[1], x.q_BTNH.dtype
    depth = plan.stored_stages or plan.stages
    ring = plgpu.SMEM((depth, plan.kv_block, H), x.k_BSKH.dtype) if plan.stored_stages else None
    landed = plgpu.Barrier(num_arrivals=plan.kv_block // plan.piece, num_barriers=depth)
    tiles = Tiles.types(
        *(H, plan.kv_block, plan.stages),
        dtype=dtype,
        out_dtype=out_dtype,
        alternate=plan.alternate,
    )
    out_type = (
        jax.ShapeDtypeStruct(refs.q.shape, out_dtype),
        jax.ShapeDtypeStruct((B, N, length), jnp.float32),
    )
    scratch = (tiles, _Landing(ring, ring, landed, landed))
    tree = jax.tree.structure((refs, *out_type, *scratch))
    kernel = gpu_blocks.kernel(
        functools.partial(_attend, plan=plan, how=how, tree=tree),
        out_type=out_type,
        scratch_types=tuple(jax.tree.leaves(scratch)),
        grid=(B, N, length // plan.q_block),
        name="prefill_attention",
        warpgroups=gpu_blocks.multipliers(H) + 1,
        cost=_cost(x, how, plan, out_dtype),
    )
    out_BTNH, lse_BNT = kernel(*jax.tree.leaves(refs))
    return out_BTNH[:, :T], lse_BNT[:, :, :T].swapaxes(1, 2)
