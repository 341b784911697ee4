"""In which order a core multiplies the rows that peers sent: scalars, read inside the kernel."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


class ExchangeSizes(NamedTuple):
    """Static sizes.

    Attributes:
        peers: devices, each of which has a send buffer for each.
        sharing: received buffers that share a resident block.
        blocks: resident blocks of a buffer.
        rows: rows of a buffer in a block.
        chunk: rows multiplied at once.
        tile: hidden columns of a step.
        unit: rows of a tile of memory.
        cores: of a device, each of which takes other buffers.
    """

    peers: int
    sharing: int
    blocks: int
    rows: int
    chunk: int
    tile: int
    unit: int
    cores: int

    @property
    def num_blocks(self) -> int:
        """Return how many resident blocks there are in all."""
        return self.peers // self.sharing * self.blocks


class Step(NamedTuple):
    """A tile of an expert's matrices for a resident block: whether the block's first, or last."""

    block: jax.Array
    tile: jax.Array
    expert: jax.Array
    is_first: jax.Array
    is_last: jax.Array


class Chunk(NamedTuple):
    """Rows that are multiplied at once.

    Attributes:
        peer: who sent them.
        number: theirs among the chunks of its buffer.
        here: they themselves in the resident block.
        begin, end: of them, those of the expert.
    """

    peer: jax.Array
    number: jax.Array
    here: Any
    begin: jax.Array
    end: jax.Array

    def is_own(self, shape: tuple[int, ...]) -> jax.Array:
        """Return which rows are the expert's."""
        place = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return (place >= self.begin) & (place < self.end)


class Order(NamedTuple):
    """The order of resident blocks, and of the experts that have rows in one.

    Blocks are numbered by the distance on the ring of the peers whose rows they hold, then by their
    place in the buffers. An item is a block and an expert: block * E + expert. The steps of a block
    are tiles of columns, and at each of those the block's experts one after the other.

    Attributes:
        sizes: static sizes.
        num_experts: E, of this device.
        num_tiles: of a matrix.
        me: number of this device.
        core: number of this core, which takes every second group of buffers if there are two.
        bounds: int32 [P, 1, lanes] in SMEM: where in the buffer of a peer each expert's rows begin,
            and at [E] where they all end.
        items: the list of items in SMEM.
        begins: the first item of each block in SMEM, and then how many there are.
    """

    sizes: ExchangeSizes
    num_experts: int
    num_tiles: int
    me: jax.Array
    core: jax.Array
    bounds: Any
    items: Any
    begins: Any

    def whole(self, rows: jax.Array) -> jax.Array:
        """Round a number of rows up to whole tiles of memory."""
        unit = self.sizes.unit
        return pl.multiple_of(jax.lax.div(rows + (unit - 1), unit) * unit, unit)

    def received(self, peer: jax.Array) -> jax.Array:
        """Return how many rows, in whole tiles, a peer sends."""
        return self.whole(self.bounds[peer, 0, self.num_experts])

    def is_mine(self, group: jax.Array | int) -> jax.Array:
        """Return whether this core takes a group of buffers."""
        return jax.lax.rem(group, self.sizes.cores) == self.core

    def place(self, block: jax.Array) -> jax.Array:
        """Return the place of a block in its buffers."""
        return jax.lax.rem(block, self.sizes.blocks)

    def _peer(self, block: jax.Array, n: jax.Array) -> jax.Array:
        distance = jax.lax.div(block, self.sizes.blocks) * self.sizes.sharing + n
        return jax.lax.rem(self.me - distance + self.sizes.peers, self.sizes.peers)

    def part(self, block: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the peer of a block's buffer n, its first row there, and the rows that exist."""
        peer, start = self._peer(block, n), self.place(block) * self.sizes.rows
        rows = jnp.clip(self.received(peer) - start, 0, self.sizes.rows)
        return (
            peer,
            pl.multiple_of(start, self.sizes.chunk),
            pl.multiple_of(rows, self.sizes.unit),
        )

    def _has_rows(self, block: jax.Array, expert: jax.Array) -> jax.Array:
        start = self.place(block) * self.sizes.rows

        def one(n: jax.Array, found: jax.Array) -> jax.Array:
            peer = self._peer(block, n)
            begin = jnp.maximum(self.bounds[peer, 0, expert], start)
            end = jnp.minimum(self.bounds[peer, 0, expert + 1], start + self.sizes.rows)
            return jnp.maximum(found, (begin < end).astype(jnp.int32))

        return jax.lax.fori_loop(0, self.sizes.sharing, one, 0) > 0

    def write(self) -> jax.Array:
        """Write the list of items that have rows. Returns how many steps there are."""
        num_blocks = self.sizes.num_blocks

        def one(item: jax.Array, count: jax.Array) -> jax.Array:
            block = jax.lax.div(item, self.num_experts)
            expert = item - block * self.num_experts
            is_mine = self.is_mine(jax.lax.div(block, self.sizes.blocks))
            has_rows = is_mine & self._has_rows(block, expert)

            @pl.when(expert == 0)
            def _():
                self.begins[block] = count

            @pl.when(has_rows)
            def _():
                self.items[count] = item

            return count + has_rows.astype(jnp.int32)

        items = jax.lax.fori_loop(0, num_blocks * self.num_experts, one, 0)
        self.begins[num_blocks] = items
        return items * self.num_tiles

    def step(self, at: jax.Array | int) -> Step:
        """Find step `at` of all."""
        block = jax.lax.div(self.items[jax.lax.div(at, self.num_tiles)], self.num_experts)
        begin = self.begins[block]
        count = self.begins[block + 1] - begin
        local = at - begin * self.num_tiles
        tile = jax.lax.div(local, count)
        expert = jax.lax.rem(self.items[begin + local - tile * count], self.num_experts)
        return Step(block, tile, expert, local == 0, local == count * self.num_tiles - 1)

    def own_chunks(
        self, block: jax.Array, expert: jax.Array, body: Callable[[Chunk], None]
    ) -> None:
        """Call with each chunk of a block that has rows of an expert."""
        chunk, chunks = self.sizes.chunk, self.sizes.rows // self.sizes.chunk

        def one(n: jax.Array, _: None) -> None:
            part = jax.lax.div(n, chunks)
            peer, first, _rows = self.part(block, part)
            start = first + (n - part * chunks) * chunk
            begin, end = (self.bounds[peer, 0, expert + i] - start for i in range(2))

            @pl.when((begin < chunk) & (end > 0) & (begin < end))
            def _():
                here = pl.ds(pl.multiple_of(n * chunk, chunk), chunk)
                body(Chunk(peer, jax.lax.div(start, chunk), here, begin, end))

        jax.lax.fori_loop(0, self.sizes.sharing * chunks, one, None)

    def every_chunk(self, body: Callable[[Any], None]) -> None:
        """Call with the rows of each chunk of a block."""
        chunk = self.sizes.chunk

        def one(n: jax.Array, _: None) -> None:
            body(pl.ds(pl.multiple_of(n * chunk, chunk), chunk))

        jax.lax.fori_loop(0, self.sizes.sharing * self.sizes.rows // chunk, one, None)
