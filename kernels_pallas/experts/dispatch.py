"""Where routed rows lie while they are multiplied, and the list of blocks that kernels walk over.

Rows are sorted by expert, and each expert's begin at a multiple of `unit`: the rows of a tile of
memory on TPUs, of a copy on GPUs. So any run of an expert's rows is copied whole, and no two
experts share what is copied at once. That leaves at most unit - 1 empty places behind each expert;
rounding up to whole blocks, as a grid of fixed blocks needs, would leave half a block.

Few rows are compared with each other rather than sorted. XLA makes one program of comparisons and a
sum, and another of each sort, gather and cumulative sum: at one token those would take as long as
the kernels. Sums over very few rows are written out, term by term, and are no programs at all.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

_FEW = 1024  # rows up to which all are compared
_VERY_FEW = 8  # up to which sums are written out


class Dispatch(NamedTuple):
    """Routed rows sorted by expert, without empty places.

    Attributes:
        order_R: routed row (token * X + choice) of each sorted row.
        group_sizes_E: rows of each expert; rows of no expert are sorted last and not counted.
    """

    order_R: jax.Array
    group_sizes_E: jax.Array


def sort_rows(expert_TX: jax.Array, num_experts: int) -> Dispatch:
    """Sort routed rows by expert, in token order inside one; ids outside 0..E-1 are no expert."""
    expert_R, _ = _checked(expert_TX.reshape(-1), num_experts)
    order_R = jnp.argsort(expert_R, stable=True)
    group_sizes_E = jnp.bincount(expert_R, length=num_experts + 1)[:num_experts]
    return Dispatch(order_R, group_sizes_E.astype(jnp.int32))


def combine_sorted(y_RD: jax.Array, to: Dispatch, experts_per_token: int) -> jax.Array:
    """Bring sorted rows back to their tokens and add a token's choices up. Returns y_TD."""
    R, D = y_RD.shape
    is_routed_R = jnp.arange(R) < to.group_sizes_E.sum()
    y_RD = jnp.where(is_routed_R[:, None], y_RD, 0)
    unsorted_RD = jnp.zeros_like(y_RD).at[to.order_R].set(y_RD, unique_indices=True)
    return unsorted_RD.reshape(-1, experts_per_token, D).sum(1)


def experts_of(group_sizes_E: jax.Array, num_rows: int) -> jax.Array:
    """Return the expert of each row of rows sorted by expert; E for those after the last."""
    return _first_above(jnp.cumsum(group_sizes_E), jnp.arange(num_rows, dtype=jnp.int32))


class Places(NamedTuple):
    """Where the routed rows of a call lie; P counts places.

    Attributes:
        source_P: routed row (token * X + choice) of each place. An empty place has the last row of
            the expert before it, so that nothing there is NaN unless that expert's rows are.
        is_held_P: whether it is not empty.
        place_R: place of each routed row, -1 for rows of no expert.
        expert_R: expert of each routed row, E for none.
        starts_E: first place of each expert.
        counts_E: rows of each expert.
    """

    source_P: jax.Array
    is_held_P: jax.Array
    place_R: jax.Array
    expert_R: jax.Array
    starts_E: jax.Array
    counts_E: jax.Array

    def back(self, y_PD: jax.Array) -> jax.Array:
        """Bring rows back from their places; those of no expert are zero. Returns y_RD."""
        y_RD = y_PD[jnp.maximum(self.place_R, 0)]
        return jnp.where(self.place_R[:, None] >= 0, y_RD, 0)


def most_units(num_rows: int, num_experts: int, unit: int) -> int:
    """Return how many units rows can fill, those of each expert rounded up."""
    hit = min(num_rows, num_experts)
    return hit + (num_rows - hit) // unit


def most_blocks(num_rows: int, num_experts: int, size: int, *, every_expert: bool = True) -> int:
    """Return how many blocks there can be, if experts without rows have one, too, or not."""
    if every_expert:
        return num_experts + num_rows // size
    return most_units(num_rows, num_experts, size)


def arrange(expert_R: jax.Array, num_experts: int, unit: int, *, spare: int = 0) -> Places:
    """Give routed rows their places.

    Args:
        expert_R: expert of each routed row; ids outside 0..E-1 are no expert.
        num_experts: E.
        unit: of which each expert's rows begin at a multiple.
        spare: empty places at the end.
    """
    R, E = expert_R.shape[0], num_experts
    expert_R, is_routed_R = _checked(expert_R, E)
    places = most_units(R, E, unit) * unit + spare
    row_R, place_P = (jnp.arange(n, dtype=jnp.int32) for n in (R, places))
    counts_E = (expert_R == jnp.arange(E)[:, None]).sum(1, dtype=jnp.int32)
    starts_E = _before(-(-counts_E // unit) * unit)
    if R <= _FEW:
        rank_R = _total((expert_R == expert_R[:, None]) & (row_R < row_R[:, None]))
        opens_R = rank_R % unit == 0  # a unit of its expert
        place_R = unit * _total(opens_R & (expert_R < expert_R[:, None])) + rank_R
        place_R = jnp.where(is_routed_R, place_R, -1)
        # The last place that is held, up to here, and whose that is.
        is_before_PR = (place_R >= 0) & (place_R <= place_P[:, None])
        last_P = _largest(jnp.where(is_before_PR, place_R * R + row_R, -1))
        source_P, is_held_P = jnp.maximum(last_P, 0) % R, last_P // R == place_P
    else:
        order_R, before_E = jnp.argsort(expert_R, stable=True), _before(counts_E)
        rank_R = jnp.argsort(order_R).astype(jnp.int32) - _pick(before_E, expert_R)
        place_R = jnp.where(is_routed_R, _pick(starts_E, expert_R) + rank_R, -1)
        expert_P = _first_above(starts_E + -(-counts_E // unit) * unit, place_P)
        inside_P, count_P = place_P - _pick(starts_E, expert_P), _pick(counts_E, expert_P)
        sorted_P = _pick(before_E, expert_P) + jnp.minimum(inside_P, count_P - 1)
        source_P = order_R[jnp.clip(sorted_P, 0, R - 1)].astype(jnp.int32)
        is_held_P = inside_P < count_P
    return Places(source_P, is_held_P, place_R, expert_R, starts_E, counts_E)


class Block(NamedTuple):
    """A run of rows of one expert, or as many fields of several.

    Attributes:
        expert: whose.
        start: its first place.
        rows: how many.
        number: its own among the expert's blocks.
        count: how many blocks the expert has.
    """

    expert: jax.Array
    start: jax.Array
    rows: jax.Array
    number: jax.Array
    count: jax.Array


class Blocks(NamedTuple):
    """The blocks of rows that hold something, in order: fields [B], of which `total` count."""

    fields: Block
    total: jax.Array


def list_blocks(p: Places, size: int, *, unit: int, every_expert: bool = False) -> Blocks:
    """List blocks of up to `size` rows of one expert.

    Args:
        p: where rows lie.
        size: rows of a block at most.
        unit: of the places; it divides the size.
        every_expert: list a block without rows for each expert that has none.
    """
    (R,), (E,) = p.expert_R.shape, p.counts_E.shape
    if R > unit or every_expert:
        return blocks_of(p.starts_E, p.counts_E, size, R, every_expert=every_expert)
    # No expert has more than a unit, which is a block.
    block_B = jnp.arange(most_units(R, E, size), dtype=jnp.int32)
    is_in_BR = (p.place_R >= 0) & (p.place_R // unit == block_B[:, None])
    expert_B = _largest(jnp.where(is_in_BR, p.expert_R, 0))
    zero_B = jnp.zeros_like(block_B)
    fields = Block(expert_B, unit * block_B, _total(is_in_BR), zero_B, zero_B + 1)
    return Blocks(fields, _total((p.place_R >= 0) & (p.place_R % unit == 0)))


def blocks_of(
    starts_E: jax.Array,
    counts_E: jax.Array,
    size: int,
    num_rows: int,
    *,
    every_expert: bool = False,
) -> Blocks:
    """List blocks of experts' rows that start at given places; see `list_blocks`."""
    most = most_blocks(num_rows, counts_E.shape[0], size, every_expert=every_expert)
    blocks_E = jnp.maximum(-(-counts_E // size), int(every_expert))
    before_E = _before(blocks_E)
    block_B = jnp.arange(most, dtype=jnp.int32)
    expert_B = jnp.minimum(_first_above(before_E + blocks_E, block_B), counts_E.shape[0] - 1)
    number_B = block_B - _pick(before_E, expert_B)
    start_B = _pick(starts_E, expert_B) + number_B * size
    rows_B = jnp.clip(_pick(counts_E, expert_B) - number_B * size, 0, size)
    fields = Block(expert_B, start_B, rows_B, number_B, _pick(blocks_E, expert_B))
    return Blocks(fields, blocks_E.sum())


def _checked(expert_R: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Return experts with E for none, and whether there is one."""
    expert_R = expert_R.astype(jnp.int32)
    is_routed_R = (expert_R >= 0) & (expert_R < num_experts)
    return jnp.where(is_routed_R, expert_R, num_experts), is_routed_R


def _over_rows(join: Callable, all_at_once: Callable, x_NR: jax.Array) -> jax.Array:
    R = x_NR.shape[-1]
    if R > _VERY_FEW:
        return all_at_once(x_NR, axis=-1)
    return functools.reduce(join, [x_NR[..., r] for r in range(R)])


def _total(x_NR: jax.Array) -> jax.Array:
    return _over_rows(jnp.add, jnp.sum, x_NR.astype(jnp.int32))


def _largest(x_NR: jax.Array) -> jax.Array:
    return _over_rows(jnp.maximum, jnp.max, x_NR)


def _before(x_E: jax.Array) -> jax.Array:
    """Return the sum of what comes before each."""
    number = jnp.arange(x_E.shape[0])
    return jnp.where(number[None] < number[:, None], x_E[None], 0).sum(1)


def _first_above(ends_E: jax.Array, at_P: jax.Array) -> jax.Array:
    """Return how many experts end at or before a number: the expert that has it, or E."""
    return (ends_E[None] <= at_P[:, None]).sum(1, dtype=jnp.int32)


def _pick(x_E: jax.Array, expert_P: jax.Array) -> jax.Array:
    """Look numbers of experts up, zero if there is no such expert."""
    is_it_PE = expert_P[:, None] == jnp.arange(x_E.shape[0])
    return jnp.where(is_it_PE, x_E[None], 0).sum(1)
