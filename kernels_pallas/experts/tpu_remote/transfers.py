"""How rows cross from device to device inside the kernel.

Each core of a device is on its own: it talks to the same core of other devices, about the buffers
at every second distance on the ring if there are two cores. So no core waits for another of its own
device, and where cores take turns rather than run at the same time nothing changes but the time.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.experts.tpu_remote.order import Order


class Mesh(NamedTuple):
    """How devices are addressed: the axes that shard experts, their sizes, and all others."""

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    others: tuple[str, ...]

    @staticmethod
    def of(axes: str | tuple[str, ...]) -> "Mesh":
        """Return the mesh in force, of which these axes shard the experts."""
        axes = (axes,) if isinstance(axes, str) else tuple(axes)
        names = jax.sharding.get_abstract_mesh().axis_names
        sizes = tuple(jax.lax.axis_size(axis) for axis in axes)
        return Mesh(axes, sizes, tuple(name for name in names if name not in axes))

    def collective(self) -> int:
        """Number the barrier that the devices meet at: another for each set of axes, from 0.

        Sets of axes with several devices are numbered by how many axes they have, so that a mesh of
        n such axes needs n numbers unless experts are sharded over several. Kernels that follow
        each other may meet at the same barrier: none ends before it has heard from every peer,
        which has then left the barrier of that kernel behind.
        """
        shape = jax.sharding.get_abstract_mesh().shape
        large = sorted(name for name, size in shape.items() if size > 1)
        own = tuple(name for name in large if name in self.axes)
        sets = (s for n in range(1, len(large) + 1) for s in itertools.combinations(large, n))
        return next(number for number, names in enumerate(sets) if names == own)

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


class Transfers(NamedTuple):
    """The transfers of one core of a device.

    Attributes:
        order: of the rows that it multiplies.
        mesh: how devices are addressed.
        scalars: in SMEM: first matrix, number of this device, its place on other mesh axes, and
            the rows that go to each peer.
    """

    order: Order
    mesh: Mesh
    scalars: Any

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
            address = self._address(peer)
            pl.semaphore_signal(barrier, 1, device_id=address, core_index=core)

        self.every_peer(signal)
        pl.semaphore_wait(barrier, self.order.sizes.peers - 1)

    def leaving(self, peer: jax.Array) -> jax.Array:
        """Return how many rows, in whole tiles, go to a peer."""
        return self.order.whole(self.scalars[2 + len(self.mesh.others) + peer])

    def parts(self, block: jax.Array, body: Callable[[Any, Any, Any], Any]) -> None:
        """Call with each buffer's part of a block: peer, rows in the buffer, and in the block."""
        sizes = self.order.sizes

        def part(n: jax.Array, _: None) -> None:
            peer, start, rows = self.order.part(block, n)
            at = pl.multiple_of(n * sizes.rows, sizes.chunk)
            pl.when(rows > 0)(lambda: body(peer, pl.ds(start, rows), pl.ds(at, rows)))

        jax.lax.fori_loop(0, sizes.sharing, part, None)
