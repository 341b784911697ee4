"""Grouped outer products on Hopper GPUs: x^T y summed over each expert's rows, for every expert.

A persistent kernel as in `gpu_product`, but an item is an expert and a tile of its result, and the
sum runs along the expert's rows, as many as there are. Experts without rows get zeros.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import backend, tuning
from kernels_pallas.experts.gpu_rows import PlacedRows
from kernels_pallas.experts.gpu_work import Item, fitting, staging, store
from kernels_pallas.gpu_primitives import ROWS, Slots, run_ring

_GROUPS = 2  # warpgroups that multiply, each 64 lines of a tile
_LINES = _GROUPS * ROWS
_DEPTH = 64  # rows of a step


class _Tile(NamedTuple):
    """An item of work: an expert, its rows, and the corner of a tile of its result."""

    expert: jax.Array
    start: jax.Array
    steps: jax.Array
    line: jax.Array
    column: jax.Array


class _Ring(NamedTuple):
    """Tiles of x and of each y, and barriers for each stage."""

    x: Any
    y: Any
    ready: Any
    free: Any


def _walk(
    bounds: Sequence[Any],
    lines: int,
    columns: int,
    step: Callable[..., jax.Array],
    width: int,
) -> jax.Array:
    """Do `step` (tiles before it, item) -> tiles after it, for each item of this program."""
    starts_E, sizes_E = bounds
    E = starts_E.shape[0]
    tiles = lines * columns

    def visit(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, turn = state
        expert, inside = jax.lax.div(i, jnp.int32(tiles)), jax.lax.rem(i, jnp.int32(tiles))
        line = jax.lax.rem(inside, jnp.int32(lines)) * _LINES
        column = jax.lax.div(inside, jnp.int32(lines)) * width
        steps = jax.lax.div(sizes_E[expert] + _DEPTH - 1, jnp.int32(_DEPTH))
        turn = step(turn, _Tile(expert, starts_E[expert], steps, line, column))
        return i + jax.lax.axis_size("program"), turn

    start = jax.lax.axis_index("program").astype(jnp.int32), jnp.int32(0)
    return jax.lax.while_loop(lambda state: state[0] < E * tiles, visit, start)[1]


def _copy(x_PL: Any, y: Sequence[Any], ring: _Ring, walk: Callable[..., jax.Array]) -> None:
    slots = Slots(ring.ready, ring.free)

    def copies(turn: jax.Array, tile: _Tile) -> jax.Array:
        def fetch(k: jax.Array, turn: jax.Array) -> jax.Array:
            slot = slots.reuse(turn)
            rows = pl.ds(pl.multiple_of(tile.start + k * _DEPTH, _DEPTH), _DEPTH)
            ready = ring.ready.at[slot]
            source = x_PL.at[rows, pl.ds(tile.line, _LINES)]
            plgpu.copy_gmem_to_smem(source, ring.x.at[slot], ready)
            for i, y_PC in enumerate(y):
                source = y_PC.at[rows, pl.ds(tile.column, ring.y.shape[3])]
                plgpu.copy_gmem_to_smem(source, ring.y.at[slot, i], ready)
            return turn + 1

        return jax.lax.fori_loop(jnp.int32(0), tile.steps, fetch, turn)

    slots.drain(walk(copies))


def _multiply(ring: _Ring, walk: Callable[..., jax.Array], write: Callable[..., None]) -> None:
    slots, count = Slots(ring.ready, ring.free), ring.y.shape[1]
    group = jax.lax.axis_index("warpgroup")

    def visit(turn: jax.Array, tile: _Tile) -> jax.Array:
        def sum_up(*accs: Any) -> Sequence[jax.Array]:
            def step(k: jax.Array, _: None) -> None:
                slot = slots.filled(turn + k)
                for i, acc in enumerate(accs):
                    x_tile = ring.x.at[slot, :, pl.ds(group * ROWS, ROWS)].transpose((1, 0))
                    plgpu.wgmma(acc, x_tile, ring.y.at[slot, i])
                plgpu.wgmma_wait(len(accs))  # those before are done with their tiles
                pl.when(k > 0)(lambda: slots.release(turn + k - 1))

            jax.lax.fori_loop(jnp.int32(0), tile.steps, step, None)
            return [acc[...] for acc in accs]

        accs = [plgpu.ACC((ROWS, ring.y.shape[3]), jnp.float32)] * count
        sums = pl.run_scoped(sum_up, *accs)
        pl.when(tile.steps > 0)(lambda: slots.release(turn + tile.steps - 1))
        write(sums, tile)
        return turn + tile.steps

    walk(visit)


def outer(
    x_PL: jax.Array,
    y: tuple[jax.Array, ...],
    rows: PlacedRows,
    dtype: Any,
    cost: pl.CostEstimate,
    *,
    name: str,
) -> Sequence[jax.Array]:
    """Sum x^T y over the rows of each expert.

    Args:
        x_PL: rows; empty ones are zero.
        y: as many rows each [P, C], empty ones finite.
        rows: their places, by multiples of 64.
        dtype: of the results.
        cost: estimate.
        name: of the kernel, and after a dot for its sizes.

    Returns:
        For each y a result [E, L, C].
    """
    E, L, C, count = rows.places.starts_E.shape[0], x_PL.shape[1], y[0].shape[1], len(y)
    default = {"width": 256 // count, "stages": 4}
    sizes = tuning.lookup(name.replace("mlp_", "mlp."), default, dtype=x_PL.dtype.name)
    width, stages = fitting(C, sizes["width"]), sizes["stages"]
    lines, columns = -(-L // _LINES), C // width
    rings = _Ring(
        plgpu.SMEM((stages, _DEPTH, _LINES), x_PL.dtype),
        plgpu.SMEM((stages, count, _DEPTH, width), x_PL.dtype),
        plgpu.Barrier(num_arrivals=1 + count, num_barriers=stages),
        plgpu.Barrier(num_arrivals=_GROUPS, num_barriers=stages),
    )

    def walk(bounds: Sequence[Any]) -> Callable[..., jax.Array]:
        return lambda step: _walk(bounds, lines, columns, step, width)

    def copy(inputs: Any, ring: _Ring) -> None:
        x_ref, y_refs, bounds = inputs
        _copy(x_ref, y_refs, ring, walk(bounds))

    def multiply(inputs: Any, outs: Sequence[Any], ring: _Ring, own: Sequence[Any]) -> None:
        group = jax.lax.axis_index("warpgroup")
        buffers = own[0].at[group]

        def write(sums: Sequence[jax.Array], tile: _Tile) -> None:
            start = tile.line + group * ROWS
            at = Item(tile.expert, start, jnp.int32(ROWS), tile.column, jnp.int32(0))
            copies = width // buffers.shape[2]
            for i, (tile_sums, out) in enumerate(zip(sums, outs, strict=True)):
                store(tile_sums, buffers, out.at[tile.expert], at, ROWS, before=i * copies)

        _multiply(ring, walk(inputs[2]), write)

    return run_ring(
        (x_PL, y, (rows.places.starts_E, rows.places.counts_E)),
        copy,
        multiply,
        out_type=(jax.ShapeDtypeStruct((E, L, C), dtype),) * count,
        ring=rings,
        scratch=[staging(_GROUPS, dtype)],
        groups=_GROUPS,
        programs=min(backend.gpu().multiprocessors, E * lines * columns),
        shifts_registers=True,
        name=name,
        cost=cost,
    )
