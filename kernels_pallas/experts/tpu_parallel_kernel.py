"""The kernel of `tpu_parallel`: rows travel, and are multiplied while others are under way."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.tpu_blocks import dot
from kernels_pallas.experts.tpu_parallel_travel import (
    Marks,
    Mesh,
    Results,
    Travel,
    by_name,
    diagonal,
    tile_copies,
)
from kernels_pallas.experts.tpu_parallel_walk import Cut

PIECE = 1024  # columns of results that are summed at once


class _Refs(NamedTuple):
    """The arguments of the kernel: inputs, outputs, buffers, semaphores.

    Attributes:
        scalars: first matrix, number of this device, its place on other mesh axes, and the rows
            that go to each peer.
        x, gates, bounds: queues by peer that they go to.
        weights: gate, up and down matrices.
        y: results by peer that they come from.
        x_in, gates_in, bounds_in: queues by peer that they come from.
        bounds_read: the last of them, where scalars are read.
        items, begins: the schedule.
        window, sums, done: rows of a window, sums of their results, and these in their dtype.
        tiles: of the three matrices, two of each.
        marks_sent, marks_arrived, x_sent, x_arrived, y_sent, y_arrived, loaded, tiles_arrived:
            semaphores; x_arrived of each peer, marks_arrived of gates and bounds.
    """

    scalars: Any
    x: Any
    gates: Any
    bounds: Any
    weights: list[Any]
    y: Any
    x_in: Any
    gates_in: Any
    bounds_in: Any
    bounds_read: Any
    items: Any
    begins: Any
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

    @staticmethod
    def of(flat: Any) -> "_Refs":
        """Sort the flat arguments."""
        return _Refs(**by_name(_Refs._fields, {"weights": 3, "tiles": 3}, flat))


def exchange_kernel(cut: Cut, num_local: int, num_steps: int, mesh: Mesh):
    """Return the kernel for static sizes."""

    def kernel(*flat):
        refs = _Refs.of(flat)
        first, me = refs.scalars[0], refs.scalars[1]
        width = refs.sums.shape[1]
        travel = Travel.of(refs, cut, mesh, num_local, num_steps)
        walk = travel.walk
        marks = Marks.of(refs)

        # Rows, to their experts.

        def leaving(peer, number):
            rows = pl.ds(0, number)
            source, target = refs.x.at[peer, rows], refs.x_in.at[me, rows]
            return travel.send(source, target, refs.x_sent, refs.x_arrived.at[me], peer)

        def start_leaving(peer, _):
            number = travel.leaving(peer)
            pl.when(number > 0)(lambda: leaving(peer, number).start())

        def wait_leaving(peer, _):
            number = travel.leaving(peer)
            pl.when(number > 0)(lambda: leaving(peer, number).wait_send())

        def wait_arriving(peer):
            rows = refs.x_in.at[peer, pl.ds(0, walk.arriving(peer))]
            pltpu.make_async_copy(rows, rows, refs.x_arrived.at[peer]).wait()

        # A window.

        def load(window):
            def start(peer, rows, here):
                is_new = (walk.place(window) == 0) & (peer != me)
                pl.when(is_new)(lambda: wait_arriving(peer))

                def copy(source):
                    pltpu.make_async_copy(source, refs.window.at[here], refs.loaded).start()

                pl.when(peer == me)(lambda: copy(refs.x.at[me, rows]))
                pl.when(peer != me)(lambda: copy(refs.x_in.at[peer, rows]))

            def wait(peer, rows, here):
                source = refs.x_in.at[peer, rows]
                pltpu.make_async_copy(source, refs.window.at[here], refs.loaded).wait()

            travel.parts(window, start)
            travel.parts(window, wait)

            def clear(chunk):
                refs.sums[chunk.here] = jnp.zeros((cut.chunk, width), jnp.float32)

            walk.every_chunk(window, clear)

        # Tiles of matrices.

        def tiles(step, at):
            return tile_copies(
                refs.weights, refs.tiles, refs.tiles_arrived, cut.tile, first, step, at
            )

        def multiply(step, slot):
            gate_tile, up_tile, down_tile = refs.tiles
            is_diagonal = diagonal((cut.chunk, refs.gates_in.shape[2]))

            def one(chunk):
                gates = refs.gates_in[chunk.peer, chunk.number, :]
                gate = jnp.where(is_diagonal, gates, 0).sum(1, keepdims=True)
                x = refs.window[chunk.here]
                a, b = (gate * dot(x, t[slot], (1, 0)) for t in (gate_tile, up_tile))
                hidden = jnp.where(chunk.is_own(a.shape), jax.nn.silu(a) * b, 0).astype(x.dtype)
                for at in range(0, width, PIECE):
                    piece = pl.ds(at, min(PIECE, width - at))
                    refs.sums[chunk.here, piece] += dot(hidden, down_tile[slot, :, piece], (1, 0))

            walk.own_chunks(step.window, step.expert, one)

        # Results, to the owners of the rows.

        def settle(chunk):
            refs.done[chunk.here] = refs.sums[chunk.here].astype(refs.done.dtype)

        results = Results(travel, refs.done, refs.y, refs.y_sent, refs.y_arrived)

        def one_step(at, total, last_window):
            """Do one tile of one expert for one window; return the last window that left."""
            step = walk.step(at)

            @pl.when(at + 1 < total)
            def _():
                for copy in tiles(walk.step(at + 1), at + 1):
                    copy.start()

            pl.when(step.is_first)(lambda: load(step.window))
            for copy in tiles(step, at):
                copy.wait()
            multiply(step, jax.lax.rem(at, 2))

            @pl.when(step.is_last)
            def _():
                pl.when(last_window >= 0)(lambda: results.wait(last_window))
                walk.every_chunk(step.window, settle)
                results.start(step.window)

            return jnp.where(step.is_last, step.window, last_window)

        travel.meet()
        travel.start_marks(marks)
        travel.every_peer(start_leaving, of_core=True)
        travel.wait_marks(marks)
        pltpu.sync_copy(refs.bounds_in, refs.bounds_read)
        total = walk.schedule() * num_steps

        @pl.when(total > 0)
        def _():
            for copy in tiles(walk.step(0), 0):
                copy.start()
            last = jax.lax.fori_loop(0, total, lambda at, window: one_step(at, total, window), -1)
            results.wait(last)

        travel.every_peer(wait_leaving, of_core=True)
        travel.settle_marks(marks)
        results.wait_home()

    return kernel
