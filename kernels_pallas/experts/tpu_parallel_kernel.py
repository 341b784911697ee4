"""The kernel of `tpu_parallel`: transfers between devices, and products while they are under way.

Each core of a device is on its own: it talks to the same core of other devices, about the queues at
every second distance on the ring if there are two cores. So no core waits for another of its own
device, and where cores take turns rather than run at the same time nothing changes but the time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.tpu_blocks import dot
from kernels_pallas.experts.tpu_parallel_walk import Bounds, Cut, Walk

_PIECE = 1024  # columns of results that are summed at once
_COLLECTIVE = 16  # first number of a barrier; no other kernel may have this or one that follows


class _Refs(NamedTuple):
    """The arguments of the kernel: inputs, outputs, buffers, semaphores.

    Attributes:
        scalars: first matrix, number of this device, its place on other mesh axes, and the rows
            that go to each peer.
        x, gates, bounds: queues by peer that they go to.
        w_gate, w_up, w_down: matrices.
        y: results by peer that they come from.
        x_in, gates_in, bounds_in: queues by peer that they come from.
        bounds_read: the last of them, where scalars are read.
        items: the schedule.
        window, sums, done: rows of a window, sums of their results, and these in their dtype.
        tiles: of the three matrices, two of each.
        marks_sent, marks_arrived, x_sent, x_arrived, y_sent, y_arrived, loaded, tiles_arrived:
            semaphores; x_arrived of each peer, marks_arrived of gates and bounds.
    """

    scalars: Any
    x: Any
    gates: Any
    bounds: Any
    w_gate: Any
    w_up: Any
    w_down: Any
    y: Any
    x_in: Any
    gates_in: Any
    bounds_in: Any
    bounds_read: Any
    items: Any
    window: Any
    sums: Any
    done: Any
    tiles: list[Any]
    marks_sent: Any
    marks_arrived: Any
    x_sent: Any
    x_arrived: Any
    y_sent: Any
    y_arrived: Any
    loaded: Any
    tiles_arrived: Any


class Mesh(NamedTuple):
    """How devices are addressed: the axes that divide experts, their sizes, and all others."""

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    others: tuple[str, ...]

    @staticmethod
    def of(axes: str | tuple[str, ...]) -> "Mesh":
        axes = (axes,) if isinstance(axes, str) else tuple(axes)
        names = jax.sharding.get_abstract_mesh().axis_names
        sizes = tuple(jax.lax.axis_size(axis) for axis in axes)
        return Mesh(axes, sizes, tuple(name for name in names if name not in axes))

    def collective(self) -> int:
        """Number the barrier that the devices meet at: another for other axes."""
        names = sorted((*self.axes, *self.others))
        return _COLLECTIVE + sum(1 << names.index(axis) for axis in self.axes)

    def own(self) -> list[jax.Array]:
        """Return this device's number along the axes, and its place on each of the others."""
        return [jax.lax.axis_index(axes) for axes in (self.axes, *self.others)]

    def address(self, peer: jax.Array, elsewhere: list[jax.Array]) -> dict[str, jax.Array]:
        """Return the place in the mesh of a peer, which shares this device's on other axes."""
        place = dict(zip(self.others, elsewhere, strict=True))
        for axis, size in reversed(list(zip(self.axes, self.sizes, strict=True))):
            place[axis] = jax.lax.rem(peer, size)
            peer = jax.lax.div(peer, size)
        return place


def exchange_kernel(cut: Cut, num_local: int, num_steps: int, mesh: Mesh):
    """Return the kernel for static sizes."""
    P, num_others = cut.peers, len(mesh.others)

    def kernel(*flat):
        parts = [*flat[:16], list(flat[16:19]), *flat[19:]]
        refs = _Refs(*parts)
        first, me = refs.scalars[0], refs.scalars[1]
        elsewhere = [refs.scalars[2 + n] for n in range(num_others)]
        walk = Walk(cut, num_local, me, pl.program_id(0), Bounds(refs.bounds_read), refs.items)

        def send(source, target, sent, arrived, peer):
            device = mesh.address(peer, elsewhere)
            return pltpu.make_async_remote_copy(source, target, sent, arrived, device_id=device)

        def every_peer(body, *, of_core=False):
            """Call with the peer at each distance, or each of this core: ahead, and behind."""

            def at(distance, _):
                ahead, behind = (jax.lax.rem(me + n + P, P) for n in (distance, -distance))
                is_mine = walk.is_mine(jax.lax.div(distance, cut.group)) | (not of_core)

                @pl.when(is_mine)
                def _():
                    body(ahead, behind)

            jax.lax.fori_loop(1, P, at, None)

        def meet():
            barrier = pltpu.get_barrier_semaphore()

            def signal(peer, _):
                pl.semaphore_signal(barrier, 1, device_id=mesh.address(peer, elsewhere))

            every_peer(signal)
            pl.semaphore_wait(barrier, P - 1)

        # Gates and bounds, which are small: all of them are waited for.

        def marks(peer):
            pairs = ((refs.gates, refs.gates_in), (refs.bounds, refs.bounds_in))
            return [
                send(a.at[peer], b.at[me], refs.marks_sent, refs.marks_arrived.at[n], peer)
                for n, (a, b) in enumerate(pairs)
            ]

        def own_marks():
            pairs = ((refs.gates, refs.gates_in), (refs.bounds, refs.bounds_in))
            return [pltpu.make_async_copy(a.at[me], b.at[me], refs.loaded) for a, b in pairs]

        def start_marks():
            every_peer(lambda peer, _: [copy.start() for copy in marks(peer)])
            for copy in own_marks():
                copy.start()

        def wait_marks():
            for copy in own_marks():
                copy.wait()
            every_peer(lambda _, peer: [copy.wait_recv() for copy in marks(peer)])
            pltpu.sync_copy(refs.bounds_in, refs.bounds_read)

        # Rows, to their experts.

        def leaving(peer, number):
            rows = pl.ds(0, number)
            source, target = refs.x.at[peer, rows], refs.x_in.at[me, rows]
            return send(source, target, refs.x_sent, refs.x_arrived.at[me], peer)

        def sent_rows(peer):
            return pl.multiple_of(walk.whole(refs.scalars[2 + num_others + peer]), cut.unit)

        def start_leaving(peer, _):
            number = sent_rows(peer)
            pl.when(number > 0)(lambda: leaving(peer, number).start())

        def wait_leaving(peer, _):
            number = sent_rows(peer)
            pl.when(number > 0)(lambda: leaving(peer, number).wait_send())

        def wait_arriving(peer):
            rows = refs.x_in.at[peer, pl.ds(0, walk.arriving(peer))]
            pltpu.make_async_copy(rows, rows, refs.x_arrived.at[peer]).wait()

        # A window.

        def parts(slab, body):
            """Call with each queue's part of a window: peer, rows in the queue, and in VMEM."""

            def part(n, _):
                peer, start, number = walk.part(slab, n)
                at = pl.multiple_of(n * cut.rows, cut.chunk)
                pl.when(number > 0)(lambda: body(peer, pl.ds(start, number), pl.ds(at, number)))

            jax.lax.fori_loop(0, cut.group, part, None)

        def every_chunk(body):
            def one(n, _):
                body(pl.ds(pl.multiple_of(n * cut.chunk, cut.chunk), cut.chunk))

            jax.lax.fori_loop(0, refs.sums.shape[0] // cut.chunk, one, None)

        def load(slab):
            def start(peer, rows, here):
                is_new = (walk.window(slab) == 0) & (peer != me)
                pl.when(is_new)(lambda: wait_arriving(peer))

                def copy(source):
                    pltpu.make_async_copy(source, refs.window.at[here], refs.loaded).start()

                pl.when(peer == me)(lambda: copy(refs.x.at[me, rows]))
                pl.when(peer != me)(lambda: copy(refs.x_in.at[peer, rows]))

            def wait(peer, rows, here):
                source = refs.x_in.at[peer, rows]
                pltpu.make_async_copy(source, refs.window.at[here], refs.loaded).wait()

            parts(slab, start)
            parts(slab, wait)

            def clear(rows):
                refs.sums[rows] = jnp.zeros((cut.chunk, refs.sums.shape[1]), jnp.float32)

            every_chunk(clear)

        # Tiles of matrices.

        def tiles(at):
            item, slot = jax.lax.div(at, num_steps), jax.lax.rem(at, 2)
            number = first + walk.expert(item)
            hidden = pl.ds(pl.multiple_of((at - item * num_steps) * cut.tile, cut.tile), cut.tile)
            sources = (
                refs.w_gate.at[number, :, hidden],
                refs.w_up.at[number, :, hidden],
                refs.w_down.at[number, hidden],
            )
            return [
                pltpu.make_async_copy(source, tile.at[slot], refs.tiles_arrived.at[n, slot])
                for n, (source, tile) in enumerate(zip(sources, refs.tiles, strict=True))
            ]

        def multiply(slab, expert, slot):
            gate_tile, up_tile, down_tile = refs.tiles
            chunks = cut.rows // cut.chunk
            lanes = refs.gates_in.shape[2]
            row = jax.lax.broadcasted_iota(jnp.int32, (cut.chunk, lanes), 0)
            is_diagonal = row == jax.lax.broadcasted_iota(jnp.int32, (cut.chunk, lanes), 1)

            def one(n, _):
                part = jax.lax.div(n, chunks)
                peer, start, _ = walk.part(slab, part)
                start += (n - part * chunks) * cut.chunk
                begin, end = (b - start for b in walk.bounds.of(peer, expert))

                @pl.when((begin < cut.chunk) & (end > 0) & (begin < end))
                def _():
                    here = pl.ds(pl.multiple_of(n * cut.chunk, cut.chunk), cut.chunk)
                    gates = refs.gates_in[peer, pl.ds(jax.lax.div(start, cut.chunk), 1), :]
                    gate = jnp.where(is_diagonal, gates, 0).sum(1, keepdims=True)
                    x = refs.window[here]
                    a, b = (gate * dot(x, t[slot], (1, 0)) for t in (gate_tile, up_tile))
                    place = jax.lax.broadcasted_iota(jnp.int32, a.shape, 0)
                    is_own = (place >= begin) & (place < end)
                    hidden = jnp.where(is_own, jax.nn.silu(a) * b, 0).astype(x.dtype)
                    for at in range(0, refs.sums.shape[1], _PIECE):
                        piece = pl.ds(at, min(_PIECE, refs.sums.shape[1] - at))
                        refs.sums[here, piece] += dot(hidden, down_tile[slot, :, piece], (1, 0))

            jax.lax.fori_loop(0, cut.group * chunks, one, None)

        # Results, to the owners of the rows.

        def returning(peer, rows, here):
            target = refs.y.at[me, rows]
            return send(refs.done.at[here], target, refs.y_sent, refs.y_arrived, peer)

        def staying(rows, here):
            return pltpu.make_async_copy(refs.done.at[here], refs.y.at[me, rows], refs.y_sent)

        def settle(rows):
            refs.done[rows] = refs.sums[rows].astype(refs.done.dtype)

        def start_returning(peer, rows, here):
            pl.when(peer == me)(lambda: staying(rows, here).start())
            pl.when(peer != me)(lambda: returning(peer, rows, here).start())

        def wait_returning(slab):
            parts(slab, lambda peer, rows, here: staying(rows, here).wait())

        def wait_home(peer, _):
            number = sent_rows(peer)

            @pl.when(number > 0)
            def _():
                rows = refs.y.at[peer, pl.ds(0, number)]
                pltpu.make_async_copy(rows, rows, refs.y_arrived).wait()

        def step(at, items, total, last_slab):
            """Do one tile of one expert for one window; return the last window that left."""
            item = jax.lax.div(at, num_steps)
            tile = at - item * num_steps
            slab = walk.slab(item)

            @pl.when(at + 1 < total)
            def _():
                for copy in tiles(at + 1):
                    copy.start()

            pl.when((tile == 0) & walk.is_first(item))(lambda: load(slab))
            for copy in tiles(at):
                copy.wait()
            multiply(slab, walk.expert(item), jax.lax.rem(at, 2))
            is_done = (tile == num_steps - 1) & walk.is_last(item, items)

            @pl.when(is_done)
            def _():
                pl.when(last_slab >= 0)(lambda: wait_returning(last_slab))
                every_chunk(settle)
                parts(slab, start_returning)

            return jnp.where(is_done, slab, last_slab)

        meet()
        start_marks()
        every_peer(start_leaving, of_core=True)
        wait_marks()
        items = walk.schedule()
        total = items * num_steps

        @pl.when(total > 0)
        def _():
            for copy in tiles(0):
                copy.start()
            last = jax.lax.fori_loop(0, total, lambda at, slab: step(at, items, total, slab), -1)
            wait_returning(last)

        every_peer(wait_leaving, of_core=True)
        every_peer(lambda peer, _: [copy.wait_send() for copy in marks(peer)])
        every_peer(wait_home, of_core=True)

    return kernel
