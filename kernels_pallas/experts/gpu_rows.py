"""Where routed rows lie while the GPU kernels work on them, and the order of that work.

Each expert's rows come one after another and are followed by empty ones up to a multiple of
`granule`, so that whatever a kernel writes, it writes to its own expert alone. Empty rows hold
zeros. A block is up to `rows` of them, all of one expert; experts without rows have no blocks.

Work goes by blocks and columns of the matrices. Blocks of one expert, up to a dozen at a time,
come before the next columns: what they read of the matrix is then read from memory once, and from
the L2 cache by all blocks but the first, and so are their own rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

_TOGETHER = 16  # blocks that take turns at the same columns
_FEW = 1024  # routed rows up to which they are placed by comparing them all: fewer, smaller kernels
_VERY_FEW = 8  # up to which that is done one after another, which XLA puts into one kernel


class Block(NamedTuple):
    """A block of rows: a row of `Rows.blocks_BF`.

    Attributes:
        matrix: of its expert.
        start: its first row.
        rows: how many belong to its expert.
        first, count: the run of blocks that take turns at the same columns.
        total: blocks of all experts.
    """

    matrix: jax.Array
    start: jax.Array
    rows: jax.Array
    first: jax.Array
    count: jax.Array
    total: jax.Array


class Rows(NamedTuple):
    """The arrangement of routed rows; P counts places.

    Attributes:
        source_P: routed row (token * X + choice) in each place, -1 where there is none.
        place_R: place of each routed row, -1 for those of no expert.
        blocks_BF: int32 fields of `Block`, padded to 8; those past the total are arbitrary.
        starts_E: first place of each expert.
        sizes_E: rows of each expert.
    """

    source_P: jax.Array
    place_R: jax.Array
    blocks_BF: jax.Array
    starts_E: jax.Array
    sizes_E: jax.Array


def most(num_rows: int, num_experts: int, multiple: int) -> int:
    """Return how many multiples the rows can fill at most, each expert's rounded up."""
    hit = min(num_rows, num_experts)
    return hit + (num_rows - hit) // multiple


def _rank(expert_R: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Return how many rows of the same expert come before each row, and the rows of each expert."""
    R = expert_R.shape[0]
    if R <= _FEW:
        is_before_RR = jnp.arange(R)[:, None] > jnp.arange(R)
        rank_R = (is_before_RR & (expert_R[:, None] == expert_R)).sum(1, dtype=jnp.int32)
        sizes_E = (expert_R == jnp.arange(num_experts)[:, None]).sum(1, dtype=jnp.int32)
        return rank_R, sizes_E
    order_R = jnp.argsort(expert_R, stable=True)
    sizes_E = jnp.bincount(expert_R, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    begins_E = jnp.cumsum(sizes_E) - sizes_E
    begin_R = jnp.append(begins_E, 0)[expert_R]
    sorted_R = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(R), unique_indices=True)
    return (sorted_R - begin_R).astype(jnp.int32), sizes_E


def arrange(
    expert_TX: jax.Array, num_experts: int, first: jax.Array, *, rows: int, granule: int
) -> Rows:
    """Give routed rows their places and blocks.

    Args:
        expert_TX: expert of each choice; ids outside 0..E-1 get no place.
        num_experts: E.
        first: matrix of expert 0.
        rows: of a block.
        granule: of which each expert's rows fill a multiple; it divides `rows`.
    """
    expert_R = expert_TX.reshape(-1).astype(jnp.int32)
    R, E = expert_R.shape[0], num_experts
    is_routed_R = (expert_R >= 0) & (expert_R < E)
    expert_R = jnp.where(is_routed_R, expert_R, E)
    rank_R, sizes_E = _rank(expert_R, E)
    ends_E = jnp.cumsum(-(-sizes_E // granule) * granule)
    starts_E = jnp.append(0, ends_E[:-1]).astype(jnp.int32)
    places = most(R, E, granule) * granule + rows - granule
    if R <= min(granule, _VERY_FEW):
        place_R, source_P, fields = _arrange_very_few(expert_R, E, granule, places)
    else:
        place_R = jnp.append(starts_E, 0)[expert_R] + rank_R
        place_R = jnp.where(is_routed_R, place_R, -1)
        source_P = _sources(place_R, places)
        fields = _blocks(sizes_E, starts_E, most(R, E, rows), rows)
    fields = fields._replace(matrix=first + fields.matrix)
    blank = [jnp.zeros_like(fields.start)] * (8 - len(fields))
    blocks_BF = jnp.stack([*fields, *blank], axis=1).astype(jnp.int32)
    return Rows(source_P, place_R, blocks_BF, starts_E, sizes_E)


def _sources(place_R: jax.Array, places: int) -> jax.Array:
    R = place_R.shape[0]
    if R <= _FEW:
        is_here_PR = jnp.arange(places)[:, None] == place_R
        return jnp.where(is_here_PR, jnp.arange(R, dtype=jnp.int32), -1).max(1)
    target_R = jnp.where(place_R >= 0, place_R, places)
    source_P = jnp.full(places, -1, jnp.int32)
    return source_P.at[target_R].set(jnp.arange(R, dtype=jnp.int32), mode="drop")


def _blocks(sizes_E: jax.Array, starts_E: jax.Array, count: int, rows: int) -> Block:
    """Return the blocks of all experts, by experts."""
    blocks_E = -(-sizes_E // rows)
    last_E = jnp.cumsum(blocks_E)
    block_B = jnp.arange(count, dtype=jnp.int32)
    expert_B = (block_B[:, None] >= last_E).sum(1, dtype=jnp.int32)
    expert_B = jnp.minimum(expert_B, sizes_E.shape[0] - 1)
    before_B = last_E[expert_B] - blocks_E[expert_B]
    inside_B = block_B - before_B
    run_B = inside_B // _TOGETHER * _TOGETHER
    return Block(
        matrix=expert_B,
        start=starts_E[expert_B] + inside_B * rows,
        rows=jnp.minimum(sizes_E[expert_B] - inside_B * rows, rows),
        first=before_B + run_B,
        count=jnp.clip(blocks_E[expert_B] - run_B, 1, _TOGETHER),
        total=jnp.broadcast_to(last_E[-1], block_B.shape),
    )


def _arrange_very_few(
    expert_R: jax.Array, num_experts: int, granule: int, places: int
) -> tuple[jax.Array, jax.Array, Block]:
    """Arrange rows of which each expert has a granule at most, without a sum over an axis.

    Returns:
        place_R, source_P and the blocks.
    """
    R, zero = expert_R.shape[0], jnp.int32(0)
    row_R, place_P = jnp.arange(R, dtype=jnp.int32), jnp.arange(places, dtype=jnp.int32)
    one = [expert_R[r] for r in range(R)]

    def is_first(r: int) -> jax.Array:
        return functools.reduce(
            jnp.logical_and, [one[r] != one[i] for i in range(r)], jnp.array(True)
        )

    before_R = sum(((one[r] < expert_R) & is_first(r) for r in range(R)), zero)
    rank_R = sum(((one[r] == expert_R) & (r < row_R) for r in range(R)), zero)
    place_R = jnp.where(expert_R < num_experts, before_R * granule + rank_R, -1)
    source_P, expert_B, rows_B = jnp.full(places, -1, jnp.int32), jnp.zeros_like(row_R), zero
    for r in range(R):
        source_P = jnp.where(place_P == place_R[r], r, source_P)
        expert_B = jnp.where(row_R * granule == place_R[r], one[r], expert_B)
        rows_B += (place_R[r] >= row_R * granule) & (place_R[r] < (row_R + 1) * granule)
    total = sum((place_R[r] % granule == 0 for r in range(R)), zero)  # those that are first
    blocks = Block(
        matrix=expert_B,
        start=row_R * granule,
        rows=rows_B,
        first=row_R,
        count=jnp.ones_like(row_R),
        total=jnp.broadcast_to(total, row_R.shape),
    )
    return place_R, source_P, blocks


def spread(x_TD: jax.Array, source_P: jax.Array, choices: int) -> jax.Array:
    """Copy each routed row's token to its place; empty places are zero."""
    token_P = jnp.maximum(source_P, 0) // choices
    return jnp.where((source_P >= 0)[:, None], x_TD[token_P], jnp.zeros((), x_TD.dtype))


def spread_gates(gate_TX: jax.Array, source_P: jax.Array) -> jax.Array:
    """Copy each routed row's gate to its place, in float32; those of empty places are zero."""
    gate_P = gate_TX.reshape(-1)[jnp.maximum(source_P, 0)].astype(jnp.float32)
    return jnp.where(source_P >= 0, gate_P, 0.0)


def gather(y_APD: jax.Array, place_R: jax.Array, choices: int) -> jax.Array:
    """Add up parts and each token's choices in float32; a choice of no expert adds nothing."""
    y_ARD = y_APD[:, jnp.maximum(place_R, 0)].astype(jnp.float32)
    y_ARD = jnp.where((place_R >= 0)[:, None], y_ARD, 0.0)
    return y_ARD.reshape(y_APD.shape[0], -1, choices, y_APD.shape[2]).sum((0, 2))
