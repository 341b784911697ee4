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

from kernels_pallas import chips
from kernels_pallas.tpu_primitives import round_up

FEW_ROWS = 512  # up to which a row is compared with every other, rather than sorted
SCALARS_BUDGET = chips.TPU7X.smem // 2  # every TPU has as much SMEM


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


def places(num_rows: int, num_experts: int, unit: int) -> int:
    """Return how many places suffice, whatever the sizes of the experts."""
    return round_up(num_rows + min(num_rows, num_experts) * (unit - 1), unit)


def _before(x_E: jax.Array) -> jax.Array:
    """Return the sum of what comes before each."""
    number = jnp.arange(x_E.shape[0])
    return jnp.where(number[None] < number[:, None], x_E[None], 0).sum(1)


def _first_above(ends_E: jax.Array, at_P: jax.Array) -> jax.Array:
    """Return how many experts end at or before a number: the expert that has it, or E."""
    return (ends_E[None] <= at_P[:, None]).sum(1, dtype=jnp.int32)


def _pick(x_E: jax.Array, expert_P: jax.Array) -> jax.Array:
    """Look numbers of experts up, zero if there is no such expert.

    This and the like are sums over masks because XLA makes few programs of those, where it makes
    one of each gather, sort and cumulative sum: at one token those would take as long as the
    kernels.
    """
    is_it_PE = expert_P[:, None] == jnp.arange(x_E.shape[0])
    return jnp.where(is_it_PE, x_E[None], 0).sum(1)


def experts_of(group_sizes_E: jax.Array, num_rows: int) -> jax.Array:
    """Return the expert of each row of rows sorted by expert; E for those after the last."""
    return _first_above(jnp.cumsum(group_sizes_E), jnp.arange(num_rows, dtype=jnp.int32))


def plan(expert_R: jax.Array, num_experts: int, unit: int) -> Plan:
    """Give each routed row its place.

    Args:
        expert_R: expert of each routed row; ids outside 0..E-1 go to nobody.
        num_experts: E.
        unit: rows of a tile.
    """
    (R,), E = expert_R.shape, num_experts
    number_R = jnp.arange(R, dtype=jnp.int32)
    is_routed_R = (expert_R >= 0) & (expert_R < E)
    expert_R = jnp.where(is_routed_R, expert_R, E)
    counts_E = (expert_R[:, None] == jnp.arange(E)).sum(0, dtype=jnp.int32)
    sizes_E = -(-counts_E // unit) * unit
    starts_E = _before(sizes_E)
    place_P = jnp.arange(places(R, E, unit), dtype=jnp.int32)
    expert_P = _first_above(starts_E + sizes_E, place_P)
    inside_P = place_P - _pick(starts_E, expert_P)
    last_P = _pick(counts_E, expert_P) - 1
    if R <= FEW_ROWS:
        is_before_RR = (expert_R[None] == expert_R[:, None]) & (number_R[None] < number_R[:, None])
        inside_R = is_before_RR.sum(1, dtype=jnp.int32)
        is_here_PR = expert_R[None] == expert_P[:, None]
        is_here_PR &= inside_R[None] == jnp.minimum(inside_P, last_P)[:, None]
        source_P = jnp.where(is_here_PR, number_R[None], 0).sum(1)
    else:
        order_R = jnp.argsort(expert_R, stable=True).astype(jnp.int32)
        before_E = _before(counts_E)
        inside_R = jnp.argsort(order_R).astype(jnp.int32) - _pick(before_E, expert_R)
        sorted_P = _pick(before_E, expert_P) + jnp.minimum(inside_P, last_P)
        source_P = order_R[jnp.clip(sorted_P, 0, R - 1)]
    place_R = jnp.where(is_routed_R, _pick(starts_E, expert_R) + inside_R, -1)
    return Plan(source_P, inside_P <= last_P, place_R, starts_E, sizes_E)


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
    start, rows = pl.multiple_of(start, unit), pl.multiple_of(rows, unit)
    return Block(expert, start, rows, inside, count)


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
    before_E = _before(counts_E)
    i = jnp.arange(most_blocks(R, E, unit, window), dtype=jnp.int32)
    expert = jnp.minimum(_first_above(before_E + counts_E, i), E - 1)
    inside = i - _pick(before_E, expert)
    rows = jnp.clip(_pick(p.sizes_E, expert) - inside * window, 0, window)
    if not every_expert:
        rows = jnp.maximum(rows, unit)
    start = _pick(p.starts_E, expert) + inside * window
    start = jnp.minimum(start, p.source_P.shape[0] - unit)
    fields = Block(expert, start, rows, inside, _pick(counts_E, expert))
    table = jnp.stack(fields, axis=1).astype(jnp.int32)
    return Blocks(table.reshape(-1), jnp.maximum(counts_E.sum(), 1))
