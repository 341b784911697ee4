"""Where rows lie for the TPU kernels of experts, and the run-time list of blocks they walk over.

Rows are sorted by expert, and each expert's begin at a multiple of `unit`, the rows of a vector
tile, so that any run of an expert's rows is one aligned copy and no two experts share a tile. That
leaves at most unit - 1 empty rows behind each expert; rounding up to whole blocks, as a grid of
fixed blocks needs, would leave half a block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.experts.reference import Dispatch

SCALARS_BUDGET = 512 * 2**10  # of 1 MiB of SMEM


class Plan(NamedTuple):
    """Where the rows of a call lie.

    Attributes:
        source_P: routed row of each place. An empty place has another row of the same expert, so
            that nothing there is NaN unless the expert's own rows are.
        is_held_P: whether it is not empty.
        place_R: place of each routed row, -1 for rows of nobody.
        starts_E: first place of each expert.
        sizes_E: its rows, rounded up to the unit.
    """

    source_P: jax.Array
    is_held_P: jax.Array
    place_R: jax.Array
    starts_E: jax.Array
    sizes_E: jax.Array


def round_up(n: int, unit: int) -> int:
    """Return the next multiple of a unit."""
    return -(-n // unit) * unit


def places(num_rows: int, num_experts: int, unit: int) -> int:
    """Return how many places suffice, whatever the sizes of the experts."""
    return round_up(num_rows + min(num_rows, num_experts) * (unit - 1), unit)


def _first_above(ends_E: jax.Array, at_P: jax.Array) -> jax.Array:
    """Return how many experts end at or before a number: the expert that has it."""
    return (ends_E[None] <= at_P[:, None]).sum(1, dtype=jnp.int32)


def plan(to: Dispatch, unit: int) -> Plan:
    """Give each routed row its place."""
    (R,), (E,) = to.order_R.shape, to.group_sizes_E.shape
    sizes_E = -(-to.group_sizes_E // unit) * unit
    ends_E = jnp.cumsum(sizes_E)
    starts_E = ends_E - sizes_E
    sorted_ends_E = jnp.cumsum(to.group_sizes_E)
    shift_E = starts_E - (sorted_ends_E - to.group_sizes_E)

    place_P = jnp.arange(places(R, E, unit), dtype=jnp.int32)
    expert_P = jnp.minimum(_first_above(ends_E, place_P), E - 1)
    last_P = jnp.maximum(sorted_ends_E[expert_P] - 1, 0)
    sorted_P = place_P - shift_E[expert_P]
    is_held_P = sorted_P <= last_P
    source_P = to.order_R[jnp.minimum(sorted_P, last_P)].astype(jnp.int32)

    sorted_R = jnp.argsort(to.order_R).astype(jnp.int32)
    expert_R = _first_above(sorted_ends_E, sorted_R)
    shift_R = shift_E[jnp.minimum(expert_R, E - 1)]
    place_R = jnp.where(expert_R < E, sorted_R + shift_R, -1)
    return Plan(source_P, is_held_P, place_R, starts_E, sizes_E)


def from_places(y_PD: jax.Array, p: Plan) -> jax.Array:
    """Bring rows back from their places; rows of nobody are zero. Returns y_RD."""
    y_RD = y_PD[jnp.maximum(p.place_R, 0)]
    return jnp.where(p.place_R[:, None] >= 0, y_RD, 0)


class Blocks(NamedTuple):
    """The blocks of rows that hold something, in order.

    Attributes:
        table: int32 [5 * blocks], the fields of a `Block` of each.
        count: int32, how many of them there are.
    """

    table: jax.Array
    count: jax.Array


class Block(NamedTuple):
    """One entry of the table: a run of an expert's rows.

    Attributes:
        expert: whose.
        start: its first place.
        rows: how many.
        inside: its number among the expert's blocks.
        count: how many those are.
    """

    expert: jax.Array
    start: jax.Array
    rows: jax.Array
    inside: jax.Array
    count: jax.Array


def read_block(table: Any, i: jax.Array, unit: int) -> Block:
    """Read entry i of a table in SMEM."""
    expert, start, rows, inside, count = (table[len(Block._fields) * i + n] for n in range(5))
    aligned = (pl.multiple_of(n, unit) for n in (start, rows))
    return Block(expert, *aligned, inside, count)


def most_blocks(num_rows: int, num_experts: int, unit: int, window: int) -> int:
    """Return how many blocks there may be, one more for each expert if empty ones have one."""
    return places(num_rows, num_experts, unit) // window + num_experts


def blocks(p: Plan, window: int, *, unit: int, every_expert: bool = False) -> Blocks:
    """List the blocks: runs of up to `window` rows of one expert.

    Args:
        p: where rows lie.
        window: rows of a block at most.
        unit: of the plan.
        every_expert: list a block without rows for each expert that has none. Without it, a call
            that nobody is routed in has one block, of places that nobody holds.
    """
    (E,), (R,) = p.sizes_E.shape, p.place_R.shape
    counts_E = jnp.maximum(-(-p.sizes_E // window), int(every_expert))
    ends_E = jnp.cumsum(counts_E)
    i = jnp.arange(most_blocks(R, E, unit, window), dtype=jnp.int32)
    expert = _first_above(ends_E, i)
    expert = jnp.minimum(expert, E - 1)
    inside = i - (ends_E - counts_E)[expert]
    rows = jnp.clip(p.sizes_E[expert] - inside * window, 0, window)
    if not every_expert:
        rows = jnp.maximum(rows, unit)
    start = jnp.minimum(p.starts_E[expert] + inside * window, p.source_P.shape[0] - unit)
    fields = Block(expert, start, rows, inside, counts_E[expert])
    table = jnp.stack(fields, axis=1).astype(jnp.int32)
    return Blocks(table.reshape(-1), jnp.maximum(ends_E[-1], 1))
