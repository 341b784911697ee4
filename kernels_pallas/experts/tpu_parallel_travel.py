"""How rows travel between devices in the kernels of `tpu_parallel`, forward and gradient.

Each core of a device is on its own: it talks to the same core of other devices, about the queues at
every second distance on the ring if there are two cores. So no core waits for another of its own
device, and where cores take turns rather than run at the same time nothing changes but the time.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.experts.tpu_parallel_walk import Bounds, Cut, Step, Walk

_COLLECTIVE = 16  # first number of a barrier; no other kernel may have this or one that follows


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
        """Number the barrier that the devices meet at: another for other axes.

        Kernels that follow each other may meet at the same: none ends before it has heard from
        every peer, which has then left the barrier of that kernel behind.
        """
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


def by_name(fields: Sequence[str], several: dict[str, int], flat: Sequence[Any]) -> dict[str, Any]:
    """Sort the arguments of a kernel: one for each name, or a list where there are several."""
    refs = iter(flat)
    return {
        name: [next(refs) for _ in range(several[name])] if name in several else next(refs)
        for name in fields
    }


class Marks(NamedTuple):
    """Small arrays by peer, all of which every device sends to every other.

    Attributes:
        pairs: arrays by peer that they go to, and by peer that they come from.
        sent: semaphore.
        arrived: semaphores, of each pair.
        loaded: semaphore of this device's own.
    """

    pairs: Sequence[tuple[Any, Any]]
    sent: Any
    arrived: Any
    loaded: Any

    @staticmethod
    def of(refs: Any) -> "Marks":
        """Return a kernel's gates and bounds."""
        pairs = [(refs.gates, refs.gates_in), (refs.bounds, refs.bounds_in)]
        return Marks(pairs, refs.marks_sent, refs.marks_arrived, refs.loaded)


class Travel(NamedTuple):
    """The transfers of one core of a device.

    Attributes:
        walk: the order of queues.
        mesh: how devices are addressed.
        scalars: in SMEM: first matrix, number of this device, its place on other mesh axes, and
            the rows that go to each peer.
    """

    walk: Walk
    mesh: Mesh
    scalars: Any

    @staticmethod
    def of(refs: Any, cut: Cut, mesh: Mesh, num_local: int, num_steps: int) -> "Travel":
        """Return those of a kernel on the core that runs it."""
        me, core, bounds = refs.scalars[1], pl.program_id(0), Bounds(refs.bounds_read)
        walk = Walk(cut, num_local, me, core, bounds, refs.items, refs.begins, num_steps)
        return Travel(walk, mesh, refs.scalars)

    def _address(self, peer: jax.Array) -> dict[str, jax.Array]:
        others = range(len(self.mesh.others))
        return self.mesh.address(peer, [self.scalars[2 + n] for n in others])

    def send(self, source: Any, target: Any, sent: Any, arrived: Any, peer: jax.Array) -> Any:
        """Return the copy of something here to a place on a peer."""
        return pltpu.make_async_remote_copy(
            source, target, sent, arrived, device_id=self._address(peer)
        )

    def every_peer(self, body: Callable[[Any, Any], Any], *, of_core: bool = False) -> None:
        """Call with the peer at each distance, or each of this core: ahead, and behind."""
        me, peers, group = self.walk.me, self.walk.cut.peers, self.walk.cut.group

        def at(distance, _):
            ahead, behind = (jax.lax.rem(me + n + peers, peers) for n in (distance, -distance))
            is_mine = self.walk.is_mine(jax.lax.div(distance, group)) | (not of_core)

            @pl.when(is_mine)
            def _():
                body(ahead, behind)

        jax.lax.fori_loop(1, peers, at, None)

    def meet(self) -> None:
        """Wait until all devices have entered the kernel."""
        barrier = pltpu.get_barrier_semaphore()

        def signal(peer, _):
            pl.semaphore_signal(barrier, 1, device_id=self._address(peer))

        self.every_peer(signal)
        pl.semaphore_wait(barrier, self.walk.cut.peers - 1)

    def _marks(self, marks: Marks, peer: jax.Array) -> list[Any]:
        return [
            self.send(a.at[peer], b.at[self.walk.me], marks.sent, marks.arrived.at[n], peer)
            for n, (a, b) in enumerate(marks.pairs)
        ]

    def _own_marks(self, marks: Marks) -> list[Any]:
        me = self.walk.me
        return [pltpu.make_async_copy(a.at[me], b.at[me], marks.loaded) for a, b in marks.pairs]

    def start_marks(self, marks: Marks) -> None:
        """Send small arrays, and copy this device's own."""
        self.every_peer(lambda peer, _: [copy.start() for copy in self._marks(marks, peer)])
        for copy in self._own_marks(marks):
            copy.start()

    def wait_marks(self, marks: Marks) -> None:
        """Wait for the small arrays of all."""
        for copy in self._own_marks(marks):
            copy.wait()
        self.every_peer(lambda _, peer: [copy.wait_recv() for copy in self._marks(marks, peer)])

    def settle_marks(self, marks: Marks) -> None:
        """Wait until the small arrays have left."""
        self.every_peer(lambda peer, _: [copy.wait_send() for copy in self._marks(marks, peer)])

    def leaving(self, peer: jax.Array) -> jax.Array:
        """Return how many rows, in whole tiles, go to a peer."""
        rows = self.walk.whole(self.scalars[2 + len(self.mesh.others) + peer])
        return pl.multiple_of(rows, self.walk.cut.unit)

    def parts(self, window: jax.Array, body: Callable[[Any, Any, Any], Any]) -> None:
        """Call with each queue's part of a window: peer, rows in the queue, and in VMEM."""
        cut = self.walk.cut

        def part(n, _):
            peer, start, number = self.walk.part(window, n)
            at = pl.multiple_of(n * cut.rows, cut.chunk)
            pl.when(number > 0)(lambda: body(peer, pl.ds(start, number), pl.ds(at, number)))

        jax.lax.fori_loop(0, cut.group, part, None)


class Results(NamedTuple):
    """The way of results to the owners of the rows.

    Attributes:
        travel: the transfers of this core.
        done: results of a window.
        home: results by peer that they come from.
        sent, arrived: semaphores.
    """

    travel: Travel
    done: Any
    home: Any
    sent: Any
    arrived: Any

    def _staying(self, rows: Any, here: Any) -> Any:
        target = self.home.at[self.travel.walk.me, rows]
        return pltpu.make_async_copy(self.done.at[here], target, self.sent)

    def start(self, window: jax.Array) -> None:
        """Send the results of a window, or keep those of this device's own rows."""
        me = self.travel.walk.me

        def part(peer, rows, here):
            def send():
                source, target = self.done.at[here], self.home.at[me, rows]
                self.travel.send(source, target, self.sent, self.arrived, peer).start()

            pl.when(peer == me)(lambda: self._staying(rows, here).start())
            pl.when(peer != me)(send)

        self.travel.parts(window, part)

    def wait(self, window: jax.Array) -> None:
        """Wait until the results of a window have left."""
        self.travel.parts(window, lambda _, rows, here: self._staying(rows, here).wait())

    def wait_home(self) -> None:
        """Wait for the results of all rows that this core sent to others."""

        def one(peer, _):
            number = self.travel.leaving(peer)

            @pl.when(number > 0)
            def _():
                rows = self.home.at[peer, pl.ds(0, number)]
                pltpu.make_async_copy(rows, rows, self.arrived).wait()

        self.travel.every_peer(one, of_core=True)


def diagonal(shape: tuple[int, int]) -> jax.Array:
    """Return where the row is the column: numbers that lie along lanes become a column so."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return row == jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def tile_copies(
    weights: Sequence[Any],
    tiles: Sequence[Any],
    arrived: Any,
    width: int,
    first: jax.Array,
    step: Step,
    at: jax.Array | int,
) -> list[Any]:
    """Return the copies of a step's tiles of matrices to the slot of its number.

    Args:
        weights: gate, up and down matrices.
        tiles: of each, two slots.
        arrived: semaphores of each and of its slots.
        width: hidden columns of a tile.
        first: number of expert 0's matrices.
        step: the step.
        at: its number.
    """
    number, slot = first + step.expert, jax.lax.rem(at, 2)
    hidden = pl.ds(pl.multiple_of(step.tile * width, width), width)
    w_gate, w_up, w_down = weights
    sources = (w_gate.at[number, :, hidden], w_up.at[number, :, hidden], w_down.at[number, hidden])
    return [
        pltpu.make_async_copy(source, tile.at[slot], arrived.at[n, slot])
        for n, (source, tile) in enumerate(zip(sources, tiles, strict=True))
    ]
