"""The grouped product of the GPU kernels: persistent programs, a ring of tiles, wgmma.

Programs, one or two per multiprocessor, share out items of work: a block of rows, some columns of
its expert's matrices and, where there are few rows, a part of the sum. In each a warpgroup copies
tiles into a ring in shared memory by TMA and runs ahead from one item into the next; the others
multiply, 64 rows each, and hand the float32 sums to an epilogue. Gate and up are multiplied side by
side, so that rows are read once for both. A warpgroup whose rows are all empty only keeps step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.experts.gpu_work import (
    DEPTH,
    Item,
    ProductPlan,
    Sums,
    bring_rows,
    run_items,
    sliced,
    span,
)
from kernels_pallas.gpu_primitives import ROWS, Slots


class Term(NamedTuple):
    """PlacedRows and the matrices that they meet; the terms of a product add up.

    Attributes:
        x_PK: rows.
        w: matrices [N, K, C], or [N, C, K] where they are transposed; their sums are apart.
    """

    x_PK: Any
    w: tuple[Any, ...]


class _Ring(NamedTuple):
    """Tiles of rows [stages, rows, DEPTH] and of each matrix, and barriers for each stage."""

    x: Any
    w: Any
    ready: Any
    free: Any


def _span(term: Term, plan: ProductPlan, item: Item) -> tuple[jax.Array, jax.Array]:
    return span(term.x_PK.shape[1] // DEPTH, item.split, plan.splits)


def _copy(
    terms: Sequence[Term], visit: Callable[..., jax.Array], ring: _Ring, *, plan: ProductPlan
) -> jax.Array:
    """Bring the tiles of all items, each as soon as there is room; return the turns it took."""

    slots = Slots(ring.ready, ring.free)

    def fetch(term: Term, item: Item, k: jax.Array, turn: jax.Array) -> jax.Array:
        slot = slots.reuse(turn)
        ready, channels = ring.ready.at[slot], pl.ds(k * DEPTH, DEPTH)
        for i, w in enumerate(term.w):
            theirs = pl.ds(item.column, plan.width)
            side = (theirs, channels) if plan.is_transposed else (channels, theirs)
            plgpu.copy_gmem_to_smem(w.at[(item.matrix, *side)], ring.w.at[slot, i], ready)
        bring_rows(term.x_PK, item, channels, ring.x.at[slot], ready, plan.granule)
        return turn + 1

    def copies(turn: jax.Array, item: Item) -> jax.Array:
        for term in terms:

            def step(k: jax.Array, turn: jax.Array, term: Term = term) -> jax.Array:
                return fetch(term, item, k, turn)

            turn = jax.lax.fori_loop(*_span(term, plan, item), step, turn)
        return turn

    return visit(copies)


def _multiply(
    terms: Sequence[Term],
    visit: Callable[..., jax.Array],
    ring: _Ring,
    prologue: Callable[[Item], None],
    epilogue: Callable[[Sequence[Sums], Item], None],
    *,
    plan: ProductPlan,
) -> None:
    """Sum the products of this warpgroup's rows, and hand over the sums of each item."""
    slots, group = Slots(ring.ready, ring.free), jax.lax.axis_index("warpgroup")
    mine = pl.ds(group * ROWS, ROWS)

    def sum_up(accs: Sequence[Any], turn: jax.Array, item: Item) -> Sequence[jax.Array]:
        first = turn
        for term in terms:

            def step(_: jax.Array, turn: jax.Array) -> jax.Array:
                slot = slots.filled(turn)
                for i, acc in enumerate(accs):
                    w_tile = ring.w.at[slot, i]
                    w_tile = w_tile.transpose((1, 0)) if plan.is_transposed else w_tile
                    plgpu.wgmma(acc, ring.x.at[slot, mine], w_tile)
                plgpu.wgmma_wait(len(accs))  # those before are done with their tiles
                pl.when(turn > first)(lambda: slots.release(turn - 1))
                return turn + 1

            turn = jax.lax.fori_loop(*_span(term, plan, item), step, turn)
        return [acc[...] for acc in accs]

    def count(item: Item) -> jax.Array:
        spans = [_span(term, plan, item) for term in terms]
        return sum((end - begin for begin, end in spans), jnp.int32(0))

    def work(turn: jax.Array, item: Item) -> None:
        own = item._replace(start=item.start + group * ROWS, rows=item.rows - group * ROWS)
        prologue(own)
        accs = [plgpu.ACC((ROWS, plan.width), jnp.float32)] * ring.w.shape[1]
        sums = pl.run_scoped(lambda *accs: sum_up(accs, turn, item), *accs)
        slots.release(turn + count(item) - 1)
        epilogue([sliced(total) for total in sums], own)

    def keep_step(turn: jax.Array, item: Item) -> None:
        def step(k: jax.Array, _: None) -> None:
            slots.filled(turn + k)
            slots.release(turn + k)

        jax.lax.fori_loop(jnp.int32(0), count(item), step, None)

    def take(turn: jax.Array, item: Item) -> jax.Array:
        if plan.groups == 1:
            work(turn, item)
        else:
            has_rows = item.rows > group * ROWS
            pl.when(has_rows)(lambda: work(turn, item))
            pl.when(~has_rows)(lambda: keep_step(turn, item))
        return turn + count(item)

    visit(take)


def product(
    terms: Sequence[Term],
    blocks_BF: jax.Array,
    plan: ProductPlan,
    epilogue: Callable[..., None],
    **how: Any,
) -> Any:
    """Multiply the rows of each block by its expert's matrices.

    Args:
        terms: what is multiplied and added up.
        blocks_BF: see `gpu_rows`.
        plan: static sizes.
        epilogue: see `gpu_work.run_items`.
        **how: see there.
    """
    matrices = len(terms[0].w)
    channels_axis, columns_axis = (2, 1) if plan.is_transposed else (1, 2)
    columns = terms[0].w[0].shape[columns_axis] // plan.width
    shape = (plan.width, DEPTH) if plan.is_transposed else (DEPTH, plan.width)
    dtype = terms[0].x_PK.dtype
    for term in terms:
        if any(w.shape[channels_axis] != term.x_PK.shape[1] for w in term.w):
            raise ValueError(f"rows {term.x_PK.shape} do not fit matrices {term.w[0].shape}")
    rings = _Ring(
        plgpu.SMEM((plan.stages, plan.rows, DEPTH), dtype),
        plgpu.SMEM((plan.stages, matrices, *shape), dtype),
        plgpu.Barrier(num_arrivals=1 + matrices, num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=plan.groups, num_barriers=plan.stages),
    )
    return run_items(
        list(terms),
        blocks_BF,
        plan,
        functools.partial(_copy, plan=plan),
        functools.partial(_multiply, plan=plan),
        epilogue,
        columns=columns,
        width=plan.width,
        ring=rings,
        shifts_registers=plan.per_processor == 1,
        **how,
    )
