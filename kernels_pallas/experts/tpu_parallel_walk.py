"""In which order a device takes the rows that peers sent it: scalars, read inside the kernel."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


class Cut(NamedTuple):
    """Static sizes.

    Attributes:
        peers: devices.
        group: queues that share a window.
        windows: windows of a queue.
        rows: rows of a queue in a window.
        chunk: rows multiplied at once.
        tile: hidden columns of a step.
        unit: rows of a tile of memory.
        cores: of a device, that work at different queues.
    """

    peers: int
    group: int
    windows: int
    rows: int
    chunk: int
    tile: int
    unit: int
    cores: int


class Bounds(NamedTuple):
    """Where in each queue that arrives an expert's rows begin: int32 [P, 1, 128] in SMEM."""

    table: Any

    def of(self, peer: jax.Array, expert: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return where an expert's rows begin and end in a queue."""
        return self.table[peer, 0, expert], self.table[peer, 0, expert + 1]

    def length(self, peer: jax.Array, num_experts: int) -> jax.Array:
        """Return how many rows a queue has."""
        return self.table[peer, 0, num_experts]


class Walk(NamedTuple):
    """The order of windows, and of the experts that have rows in one.

    Windows are numbered by distance on the ring of the queues in them, then by their place in the
    queues. An item of the schedule is a window and an expert: window * E + expert.

    Attributes:
        cut: static sizes.
        num_experts: E, of this device.
        me: number of this device.
        core: number of this core, which takes every second group of queues if there are two.
        bounds: of the queues.
        items: the schedule in SMEM.
    """

    cut: Cut
    num_experts: int
    me: jax.Array
    core: jax.Array
    bounds: Bounds
    items: Any

    def whole(self, rows: jax.Array) -> jax.Array:
        """Round a number of rows up to whole tiles of memory."""
        unit = self.cut.unit
        return jax.lax.div(rows + (unit - 1), unit) * unit

    def arriving(self, peer: jax.Array) -> jax.Array:
        """Return how many rows, in whole tiles, a peer sends."""
        rows = self.whole(self.bounds.length(peer, self.num_experts))
        return pl.multiple_of(rows, self.cut.unit)

    def is_mine(self, group: jax.Array) -> jax.Array:
        """Return whether this core takes a group of queues."""
        return jax.lax.rem(group, self.cut.cores) == self.core

    def window(self, slab: jax.Array) -> jax.Array:
        """Return the place of a window in its queues."""
        return jax.lax.rem(slab, self.cut.windows)

    def _peer(self, slab: jax.Array, n: jax.Array) -> jax.Array:
        distance = jax.lax.div(slab, self.cut.windows) * self.cut.group + n
        return jax.lax.rem(self.me - distance + self.cut.peers, self.cut.peers)

    def part(self, slab: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the peer of a window's queue n, its first row there, and the rows that exist."""
        peer = self._peer(slab, n)
        start = self.window(slab) * self.cut.rows
        number = jnp.clip(self.arriving(peer) - start, 0, self.cut.rows)
        return (
            peer,
            pl.multiple_of(start, self.cut.chunk),
            pl.multiple_of(number, self.cut.unit),
        )

    def _has_rows(self, slab: jax.Array, expert: jax.Array) -> jax.Array:
        start = self.window(slab) * self.cut.rows

        def one(n, found):
            begin, end = self.bounds.of(self._peer(slab, n), expert)
            begin, end = jnp.maximum(begin, start), jnp.minimum(end, start + self.cut.rows)
            return jnp.maximum(found, (begin < end).astype(jnp.int32))

        return jax.lax.fori_loop(0, self.cut.group, one, 0) > 0

    def schedule(self) -> jax.Array:
        """Write the list of items that have rows. Returns how many they are."""
        slabs = self.cut.peers // self.cut.group * self.cut.windows

        def one(code, count):
            slab = jax.lax.div(code, self.num_experts)
            is_mine = self.is_mine(jax.lax.div(slab, self.cut.windows))
            has_rows = is_mine & self._has_rows(slab, code - slab * self.num_experts)

            @pl.when(has_rows)
            def _():
                self.items[count] = code

            return count + has_rows.astype(jnp.int32)

        return jax.lax.fori_loop(0, slabs * self.num_experts, one, 0)

    def slab(self, item: jax.Array) -> jax.Array:
        """Return the window of an item."""
        return jax.lax.div(self.items[item], self.num_experts)

    def expert(self, item: jax.Array) -> jax.Array:
        """Return the expert of an item."""
        return jax.lax.rem(self.items[item], self.num_experts)

    def is_first(self, item: jax.Array) -> jax.Array:
        """Return whether an item is the first of its window."""
        return (item == 0) | (self.slab(jnp.maximum(item - 1, 0)) != self.slab(item))

    def is_last(self, item: jax.Array, count: jax.Array) -> jax.Array:
        """Return whether an item is the last of its window."""
        after = jnp.minimum(item + 1, count - 1)
        return (item == count - 1) | (self.slab(after) != self.slab(item))
