"""In which order a device takes the rows that peers sent it: scalars, read inside the kernel."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


class Cut(NamedTuple):
    """Static sizes.

    A window is the rows that are in VMEM at a time: those of one place in each queue of a group.

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

    @property
    def num_windows(self) -> int:
        """How many windows there are in all."""
        return self.peers // self.group * self.windows


class Bounds(NamedTuple):
    """Where in each queue that arrives an expert's rows begin: int32 [P, 1, 128] in SMEM."""

    table: Any

    def of(self, peer: jax.Array, expert: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return where an expert's rows begin and end in a queue."""
        return self.table[peer, 0, expert], self.table[peer, 0, expert + 1]

    def length(self, peer: jax.Array, num_experts: int) -> jax.Array:
        """Return how many rows a queue has."""
        return self.table[peer, 0, num_experts]


class Step(NamedTuple):
    """A tile of an expert's matrices, for a window.

    Attributes:
        window: its number.
        tile: that of the tile.
        expert: whose matrices.
        is_first, is_last: of the window's steps.
        opens, closes: whether it is the first, or last, of the window's experts at this tile.
    """

    window: jax.Array
    tile: jax.Array
    expert: jax.Array
    is_first: jax.Array
    is_last: jax.Array
    opens: jax.Array
    closes: jax.Array


class Chunk(NamedTuple):
    """Rows of a window that are multiplied at once.

    Attributes:
        peer: whose queue they are of.
        number: their number in the queue, as a slice of one.
        here: they themselves in VMEM.
        begin, end: of them, those of an expert, if one is asked for.
    """

    peer: jax.Array
    number: Any
    here: Any
    begin: jax.Array
    end: jax.Array

    def is_own(self, shape: tuple[int, ...]) -> jax.Array:
        """Return which rows are the expert's."""
        place = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return (place >= self.begin) & (place < self.end)


class Walk(NamedTuple):
    """The order of windows, and of the experts that have rows in one.

    Windows are numbered by distance on the ring of the queues in them, then by their place in the
    queues. An item of the schedule is a window and an expert: window * E + expert. The steps of a
    window are tiles of columns, and at each of those the window's experts one after the other.

    Attributes:
        cut: static sizes.
        num_experts: E, of this device.
        me: number of this device.
        core: number of this core, which takes every second group of queues if there are two.
        bounds: of the queues.
        items: the schedule in SMEM.
        begins: the first item of each window in SMEM, and then how many there are.
        num_steps: tiles of a matrix.
    """

    cut: Cut
    num_experts: int
    me: jax.Array
    core: jax.Array
    bounds: Bounds
    items: Any
    begins: Any
    num_steps: int

    def whole(self, rows: jax.Array) -> jax.Array:
        """Round a number of rows up to whole tiles of memory."""
        unit = self.cut.unit
        return jax.lax.div(rows + (unit - 1), unit) * unit

    def arriving(self, peer: jax.Array) -> jax.Array:
        """Return how many rows, in whole tiles, a peer sends."""
        rows = self.whole(self.bounds.length(peer, self.num_experts))
        return pl.multiple_of(rows, self.cut.unit)

    def is_mine(self, group: jax.Array | int) -> jax.Array:
        """Return whether this core takes a group of queues."""
        return jax.lax.rem(group, self.cut.cores) == self.core

    def place(self, window: jax.Array) -> jax.Array:
        """Return the place of a window in its queues."""
        return jax.lax.rem(window, self.cut.windows)

    def _peer(self, window: jax.Array, n: jax.Array) -> jax.Array:
        distance = jax.lax.div(window, self.cut.windows) * self.cut.group + n
        return jax.lax.rem(self.me - distance + self.cut.peers, self.cut.peers)

    def part(self, window: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the peer of a window's queue n, its first row there, and the rows that exist."""
        peer = self._peer(window, n)
        start = self.place(window) * self.cut.rows
        number = jnp.clip(self.arriving(peer) - start, 0, self.cut.rows)
        return (
            peer,
            pl.multiple_of(start, self.cut.chunk),
            pl.multiple_of(number, self.cut.unit),
        )

    def _has_rows(self, window: jax.Array, expert: jax.Array) -> jax.Array:
        start = self.place(window) * self.cut.rows

        def one(n, found):
            begin, end = self.bounds.of(self._peer(window, n), expert)
            begin, end = jnp.maximum(begin, start), jnp.minimum(end, start + self.cut.rows)
            return jnp.maximum(found, (begin < end).astype(jnp.int32))

        return jax.lax.fori_loop(0, self.cut.group, one, 0) > 0

    def schedule(self) -> jax.Array:
        """Write the list of items that have rows. Returns how many they are."""
        num_windows = self.cut.num_windows

        def one(code, count):
            window = jax.lax.div(code, self.num_experts)
            is_mine = self.is_mine(jax.lax.div(window, self.cut.windows))
            expert = code - window * self.num_experts
            has_rows = is_mine & self._has_rows(window, expert)

            @pl.when(expert == 0)
            def _():
                self.begins[window] = count

            @pl.when(has_rows)
            def _():
                self.items[count] = code

            return count + has_rows.astype(jnp.int32)

        items = jax.lax.fori_loop(0, num_windows * self.num_experts, one, 0)
        self.begins[num_windows] = items
        return items

    def step(self, at: jax.Array | int) -> Step:
        """Find step `at` of all."""
        window = jax.lax.div(self.items[jax.lax.div(at, self.num_steps)], self.num_experts)
        begin = self.begins[window]
        count = self.begins[window + 1] - begin
        local = at - begin * self.num_steps
        tile = jax.lax.div(local, count)
        number = local - tile * count
        return Step(
            window,
            tile,
            jax.lax.rem(self.items[begin + number], self.num_experts),
            local == 0,
            local == count * self.num_steps - 1,
            number == 0,
            number == count - 1,
        )

    def own_chunks(
        self, window: jax.Array, expert: jax.Array, body: Callable[[Chunk], None]
    ) -> None:
        """Call with each chunk of a window that has rows of an expert."""
        cut = self.cut
        chunks = cut.rows // cut.chunk

        def one(n, _):
            part = jax.lax.div(n, chunks)
            peer, start, _ = self.part(window, part)
            start += (n - part * chunks) * cut.chunk
            begin, end = (b - start for b in self.bounds.of(peer, expert))

            @pl.when((begin < cut.chunk) & (end > 0) & (begin < end))
            def _():
                here = pl.ds(pl.multiple_of(n * cut.chunk, cut.chunk), cut.chunk)
                number = pl.ds(jax.lax.div(start, cut.chunk), 1)
                body(Chunk(peer, number, here, begin, end))

        jax.lax.fori_loop(0, cut.group * chunks, one, None)

    def every_chunk(self, window: jax.Array, body: Callable[[Chunk], None]) -> None:
        """Call with each chunk of a window."""
        cut = self.cut
        chunks = cut.rows // cut.chunk

        def one(n, _):
            part = jax.lax.div(n, chunks)
            peer, start, _ = self.part(window, part)
            here = pl.ds(pl.multiple_of(n * cut.chunk, cut.chunk), cut.chunk)
            number = pl.ds(jax.lax.div(start, cut.chunk) + n - part * chunks, 1)
            body(Chunk(peer, number, here, jnp.int32(0), jnp.int32(0)))

        jax.lax.fori_loop(0, cut.group * chunks, one, None)
