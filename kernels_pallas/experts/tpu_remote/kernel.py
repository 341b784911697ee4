"""The kernel of `exchange`: rows are sent, multiplied while others are under way, and returned."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.experts.tpu_remote.order import Chunk, ExchangeSizes, Order, Step
from kernels_pallas.tpu_primitives import dot

_PIECE = 1024  # columns of results that are summed at once


class _Refs(NamedTuple):
    """The arguments of the kernel: inputs, outputs, buffers, semaphores.

    Attributes:
        scalars: number of expert 0's matrices, that of this device, rows that go to each peer.
        x, labels: send buffers of rows and of what goes with them (`exchange.Labels`), by peer.
        w_gate, w_up, w_down: matrices.
        y: results by peer that they come from.
        x_in, labels_in: received buffers, by peer.
        bounds, items, begins: see `Order`.
        block, sums, done: rows of a block, sums of their results, and these in their dtype.
        gate_tiles, up_tiles, down_tiles: of the matrices, two of each.
        labels_sent, labels_arrived, x_sent, x_arrived, y_sent, y_arrived, loaded, tiles_arrived:
            semaphores; x_arrived of each peer.
    """

    scalars: Any
    x: Any
    labels: Any
    w_gate: Any
    w_up: Any
    w_down: Any
    y: Any
    x_in: Any
    labels_in: Any
    bounds: Any
    items: Any
    begins: Any
    block: Any
    sums: Any
    done: Any
    gate_tiles: Any
    up_tiles: Any
    down_tiles: Any
    labels_sent: Any
    labels_arrived: Any
    x_sent: Any
    x_arrived: Any
    y_sent: Any
    y_arrived: Any
    loaded: Any
    tiles_arrived: Any


class _Core(NamedTuple):
    """What one core of a device does.

    Each core is on its own: it talks to the same core of other devices, about the buffers at every
    second distance on the ring if there are two cores. So no core waits for another of its own
    device, and where cores take turns rather than run at the same time nothing changes but the
    time.

    Attributes:
        refs: arguments of the kernel.
        order: of the rows that it multiplies.
        axes: mesh axes that shard experts; a peer shares this device's place on all others.
    """

    refs: _Refs
    order: Order
    axes: tuple[str, ...]

    def send(self, source: Any, target: Any, sent: Any, arrived: Any, peer: jax.Array) -> Any:
        """Return the copy of something here to a place on a peer."""
        return pltpu.make_async_remote_copy(
            source, target, sent, arrived, device_id={self.axes: peer}
        )

    def every_peer(self, body: Callable[[Any, Any], Any], *, of_core: bool = False) -> None:
        """Call with the peer at each distance, or each of this core: ahead, and behind."""
        me, sizes = self.order.me, self.order.sizes

        def at(distance: jax.Array, _: None) -> None:
            ahead, behind = (
                jax.lax.rem(me + n + sizes.peers, sizes.peers) for n in (distance, -distance)
            )
            is_mine = self.order.is_mine(jax.lax.div(distance, sizes.sharing)) | (not of_core)

            @pl.when(is_mine)
            def _():
                body(ahead, behind)

        jax.lax.fori_loop(1, sizes.peers, at, None)

    def meet(self) -> None:
        """Wait until this core of all devices has entered the kernel."""
        barrier, core = pltpu.get_barrier_semaphore(), self.order.core

        def signal(peer: jax.Array, _: jax.Array) -> None:
            pl.semaphore_signal(barrier, 1, device_id={self.axes: peer}, core_index=core)

        self.every_peer(signal)
        pl.semaphore_wait(barrier, self.order.sizes.peers - 1)

    def leaving(self, peer: jax.Array) -> jax.Array:
        """Return how many rows, in whole tiles, go to a peer."""
        return self.order.whole(self.refs.scalars[2 + peer])

    def parts(self, block: jax.Array, body: Callable[[Any, Any, Any], Any]) -> None:
        """Call with each buffer's part of a block: peer, rows in the buffer, and in the block."""
        sizes = self.order.sizes

        def part(n: jax.Array, _: None) -> None:
            peer, start, rows = self.order.part(block, n)
            at = pl.multiple_of(n * sizes.rows, sizes.chunk)
            pl.when(rows > 0)(lambda: body(peer, pl.ds(start, rows), pl.ds(at, rows)))

        jax.lax.fori_loop(0, sizes.sharing, part, None)

    def _labels(self, peer: jax.Array) -> Any:
        r, me = self.refs, self.order.me
        source, target = r.labels.at[peer], r.labels_in.at[me]
        return self.send(source, target, r.labels_sent, r.labels_arrived, peer)

    def send_labels(self) -> None:
        """Start sending what goes with rows to all peers."""
        self.every_peer(lambda peer, _: self._labels(peer).start())

    def receive_labels(self) -> None:
        """Wait for what goes with the rows of all peers, and copy this device's own."""
        r, me = self.refs, self.order.me
        pltpu.sync_copy(r.labels.at[me], r.labels_in.at[me])
        self.every_peer(lambda _, peer: self._labels(peer).wait_recv())
        bounds = r.labels_in.at[:, pl.ds(0, 1), pl.ds(0, r.bounds.shape[2])]
        pltpu.sync_copy(bounds, r.bounds)

    def wait_labels_sent(self) -> None:
        """Wait until the labels have left."""
        self.every_peer(lambda peer, _: self._labels(peer).wait_send())

    def _rows(self, peer: jax.Array) -> Any:
        r, me, rows = self.refs, self.order.me, pl.ds(0, self.leaving(peer))
        source, target = r.x.at[peer, rows], r.x_in.at[me, rows]
        return self.send(source, target, r.x_sent, r.x_arrived.at[me], peer)

    def send_rows(self) -> None:
        """Start sending this core's buffers."""

        def start(peer: jax.Array, _: jax.Array) -> None:
            pl.when(self.leaving(peer) > 0)(lambda: self._rows(peer).start())

        self.every_peer(start, of_core=True)

    def wait_rows_sent(self) -> None:
        """Wait until this core's buffers have left."""

        def wait(peer: jax.Array, _: jax.Array) -> None:
            pl.when(self.leaving(peer) > 0)(lambda: self._rows(peer).wait_send())

        self.every_peer(wait, of_core=True)

    def load(self, block: jax.Array) -> None:
        """Bring a block's rows into VMEM, when they have arrived, and clear its sums."""
        r, me = self.refs, self.order.me

        def copy(source: Any, here: Any) -> Any:
            return pltpu.make_async_copy(source, r.block.at[here], r.loaded)

        def wait_arriving(peer: jax.Array) -> None:
            rows = r.x_in.at[peer, pl.ds(0, self.order.received(peer))]
            pltpu.make_async_copy(rows, rows, r.x_arrived.at[peer]).wait()

        def start(peer: jax.Array, rows: Any, here: Any) -> None:
            is_new = (self.order.place(block) == 0) & (peer != me)
            pl.when(is_new)(lambda: wait_arriving(peer))
            pl.when(peer == me)(lambda: copy(r.x.at[me, rows], here).start())
            pl.when(peer != me)(lambda: copy(r.x_in.at[peer, rows], here).start())

        def wait(peer: jax.Array, rows: Any, here: Any) -> None:
            copy(r.x_in.at[peer, rows], here).wait()

        def clear(here: Any) -> None:
            r.sums[here] = jnp.zeros((self.order.sizes.chunk, r.sums.shape[1]), jnp.float32)

        self.parts(block, start)
        self.parts(block, wait)
        self.order.every_chunk(clear)

    def tiles(self, step: Step, at: jax.Array | int) -> list[Any]:
        """Return the copies of the tiles of step number `at`."""
        r, width, slot = self.refs, self.order.sizes.tile, jax.lax.rem(at, 2)
        expert = r.scalars[0] + step.expert
        hidden = pl.ds(pl.multiple_of(step.tile * width, width), width)
        pairs = (
            (r.w_gate.at[expert, :, hidden], r.gate_tiles),
            (r.w_up.at[expert, :, hidden], r.up_tiles),
            (r.w_down.at[expert, hidden], r.down_tiles),
        )
        return [
            pltpu.make_async_copy(source, tiles.at[slot], r.tiles_arrived.at[n, slot])
            for n, (source, tiles) in enumerate(pairs)
        ]

    def multiply(self, step: Step, slot: jax.Array) -> None:
        """Take an expert's rows in the block through the tiles, and add to the sums."""
        r, width = self.refs, self.refs.sums.shape[1]
        shape = (self.order.sizes.chunk, r.labels_in.shape[2])
        rows, lanes = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))

        def one(chunk: Chunk) -> None:
            bits = r.labels_in[chunk.peer, pl.ds(1 + chunk.number, 1), :]
            gates = jnp.where(rows == lanes, pltpu.bitcast(bits, jnp.float32), 0)
            gate = gates.sum(1, keepdims=True)  # of each row, as a column
            x = r.block[chunk.here]
            a, b = (gate * dot(x, tiles[slot], (1, 0)) for tiles in (r.gate_tiles, r.up_tiles))
            hidden = jnp.where(chunk.is_own(a.shape), jax.nn.silu(a) * b, 0).astype(x.dtype)
            for at in range(0, width, _PIECE):
                piece = pl.ds(at, min(_PIECE, width - at))
                r.sums[chunk.here, piece] += dot(hidden, r.down_tiles[slot, :, piece], (1, 0))

        self.order.own_chunks(step.block, step.expert, one)

    def _stays(self, rows: Any, here: Any) -> Any:
        r = self.refs
        return pltpu.make_async_copy(r.done.at[here], r.y.at[self.order.me, rows], r.y_sent)

    def return_results(self, block: jax.Array) -> None:
        """Send the results of a block back, or keep those of this device's own rows."""
        r, me = self.refs, self.order.me

        def settle(here: Any) -> None:
            r.done[here] = r.sums[here].astype(r.done.dtype)

        def part(peer: jax.Array, rows: Any, here: Any) -> None:
            source, target = r.done.at[here], r.y.at[me, rows]
            send = self.send
            leaves = peer != me
            pl.when(leaves)(lambda: send(source, target, r.y_sent, r.y_arrived, peer).start())
            pl.when(peer == me)(lambda: self._stays(rows, here).start())

        self.order.every_chunk(settle)
        self.parts(block, part)

    def wait_results_sent(self, block: jax.Array) -> None:
        """Wait until the results of a block have left, or of none if it is negative."""

        @pl.when(block >= 0)
        def _():
            self.parts(block, lambda _, rows, here: self._stays(rows, here).wait())

    def wait_returned(self) -> None:
        """Wait for the results of all rows that this core sent."""
        r = self.refs

        def one(peer: jax.Array, _: jax.Array) -> None:
            number = self.leaving(peer)

            @pl.when(number > 0)
            def _():
                rows = r.y.at[peer, pl.ds(0, number)]
                pltpu.make_async_copy(rows, rows, r.y_arrived).wait()

        self.every_peer(one, of_core=True)

    def take_step(self, at: jax.Array, total: jax.Array, last_block: jax.Array) -> jax.Array:
        """Take one tile of one expert for one block; return the last block that was returned."""
        step = self.order.step(at)

        @pl.when(at + 1 < total)
        def _():
            for copy in self.tiles(self.order.step(at + 1), at + 1):
                copy.start()

        pl.when(step.is_first)(lambda: self.load(step.block))
        for copy in self.tiles(step, at):
            copy.wait()
        self.multiply(step, jax.lax.rem(at, 2))

        @pl.when(step.is_last)
        def _():
            self.wait_results_sent(last_block)
            self.return_results(step.block)

        return jnp.where(step.is_last, step.block, last_block)


def exchange_kernel(sizes: ExchangeSizes, num_local: int, num_tiles: int, axes: tuple[str, ...]):
    """Return the kernel for static sizes."""

    def kernel(*flat: Any) -> None:
        r = _Refs(*flat)
        lists = (r.bounds, r.items, r.begins)
        order = Order(sizes, num_local, num_tiles, r.scalars[1], pl.program_id(0), *lists)
        core = _Core(r, order, axes)
        core.meet()
        core.send_labels()
        core.send_rows()
        core.receive_labels()
        total = order.write()

        @pl.when(total > 0)
        def _():
            for copy in core.tiles(order.step(0), 0):
                copy.start()
            step = lambda at, last: core.take_step(at, total, last)  # noqa: E731
            core.wait_results_sent(jax.lax.fori_loop(0, total, step, -1))

        core.wait_rows_sent()
        core.wait_labels_sent()
        core.wait_returned()

    return kernel
