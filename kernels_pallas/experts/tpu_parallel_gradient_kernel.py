"""The kernel of `tpu_parallel_gradient`: rows and their gradients travel, and dx travels back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.tpu_blocks import LANES, dot
from kernels_pallas.experts.tpu_parallel_kernel import PIECE
from kernels_pallas.experts.tpu_parallel_travel import (
    Marks,
    Mesh,
    Results,
    Travel,
    by_name,
    diagonal,
    tile_copies,
)
from kernels_pallas.experts.tpu_parallel_walk import Chunk, Cut


class _Refs(NamedTuple):
    """The arguments of the kernel: inputs, outputs, buffers, semaphores.

    Attributes:
        scalars: as `Travel` has them.
        rows: x and dy by peer that they go to.
        gates, bounds: by the same.
        weights: gate, up and down matrices.
        dx, dgate: results by peer that they come from.
        rows_in: x and dy by peer that they come from.
        hidden: da, db and h of those.
        bounds_out: their bounds.
        gates_in, bounds_in, bounds_read: what came with them; the last where scalars are read.
        items, begins: the schedule.
        windows: x and dy of a window.
        sums, gate_sums: of its dx, and of parts of its dgate.
        done: its dx, in its dtype.
        dgate_here: dgate by peer that it goes to.
        tiles: of the three matrices, two of each.
        hidden_tiles: of da, db and h, two of each.
        marks_sent, marks_arrived, rows_sent, rows_arrived, dx_sent, dx_arrived, dgate_sent,
            dgate_arrived, loaded, tiles_arrived, hidden_left: semaphores; rows_arrived of each
            peer, marks_arrived of gates and bounds, hidden_left of each slot.
    """

    scalars: Any
    rows: list[Any]
    gates: Any
    bounds: Any
    weights: list[Any]
    dx: Any
    dgate: Any
    rows_in: list[Any]
    hidden: list[Any]
    bounds_out: Any
    gates_in: Any
    bounds_in: Any
    bounds_read: Any
    items: Any
    begins: Any
    windows: list[Any]
    sums: Any
    gate_sums: Any
    done: Any
    dgate_here: Any
    tiles: list[Any]
    hidden_tiles: list[Any]
    marks_sent: Any
    marks_arrived: Any
    rows_sent: Any
    rows_arrived: Any
    dx_sent: Any
    dx_arrived: Any
    dgate_sent: Any
    dgate_arrived: Any
    loaded: Any
    tiles_arrived: Any
    hidden_left: Any

    @staticmethod
    def of(flat: Any) -> "_Refs":
        """Sort the flat arguments."""
        several = {"rows": 2, "weights": 3, "rows_in": 2, "hidden": 3}
        several |= {"windows": 2, "tiles": 3, "hidden_tiles": 3}
        return _Refs(**by_name(_Refs._fields, several, flat))


def _swiglu_gradient(products: list[jax.Array], gate: jax.Array) -> tuple[jax.Array, ...]:
    """Return the gradients of the two products of a token, its hidden row, and dgate's summands.

    Args:
        products: of x with gate and up, and of dy with down.
        gate: of each row.
    """
    a, b, dh = products
    sigma = jax.nn.sigmoid(gate * a)
    silu = gate * a * sigma
    da, db = dh * (gate * b) * (sigma + silu * (1 - sigma)), dh * silu
    return gate * da, gate * db, silu * (gate * b), a * da + b * db


def gradient_kernel(cut: Cut, num_local: int, num_steps: int, mesh: Mesh):
    """Return the kernel for static sizes."""
    kept = min(num_steps, 2)  # tiles of hidden rows that are on their way at a time

    def kernel(*flat):
        refs = _Refs.of(flat)
        first, me = refs.scalars[0], refs.scalars[1]
        width = refs.sums.shape[1]
        travel = Travel.of(refs, cut, mesh, num_local, num_steps)
        walk = travel.walk
        marks = Marks.of(refs)
        is_diagonal = diagonal((cut.chunk, refs.gates_in.shape[2]))

        # Rows and their gradients, to their experts.

        def leaving(peer, number):
            rows = pl.ds(0, number)
            arrived = refs.rows_arrived.at[me]
            return [
                travel.send(x.at[peer, rows], x_in.at[me, rows], refs.rows_sent, arrived, peer)
                for x, x_in in zip(refs.rows, refs.rows_in, strict=True)
            ]

        def start_leaving(peer, _):
            number = travel.leaving(peer)

            @pl.when(number > 0)
            def _():
                for copy in leaving(peer, number):
                    copy.start()

        def wait_leaving(peer, _):
            number = travel.leaving(peer)

            @pl.when(number > 0)
            def _():
                for copy in leaving(peer, number):
                    copy.wait_send()

        def start_staying():
            number = travel.leaving(me)

            @pl.when((number > 0) & walk.is_mine(0))
            def _():
                rows = (me, pl.ds(0, number))
                for x, x_in in zip(refs.rows, refs.rows_in, strict=True):
                    arrived = refs.rows_arrived.at[me]
                    pltpu.make_async_copy(x.at[rows], x_in.at[rows], arrived).start()

        def wait_arriving(peer):
            for x_in in refs.rows_in:
                rows = x_in.at[peer, pl.ds(0, walk.arriving(peer))]
                pltpu.make_async_copy(rows, rows, refs.rows_arrived.at[peer]).wait()

        # A window.

        def load(window):
            def copies(peer, rows, here):
                return [
                    pltpu.make_async_copy(x_in.at[peer, rows], buffer.at[here], refs.loaded)
                    for x_in, buffer in zip(refs.rows_in, refs.windows, strict=True)
                ]

            def start(peer, rows, here):
                pl.when(walk.place(window) == 0)(lambda: wait_arriving(peer))
                for copy in copies(peer, rows, here):
                    copy.start()

            def wait(peer, rows, here):
                for copy in copies(peer, rows, here):
                    copy.wait()

            travel.parts(window, start)
            travel.parts(window, wait)

            def clear(chunk):
                refs.sums[chunk.here] = jnp.zeros((cut.chunk, width), jnp.float32)
                refs.gate_sums[chunk.here] = jnp.zeros((cut.chunk, LANES), jnp.float32)

            walk.every_chunk(window, clear)

        # Tiles: matrices come, hidden rows leave.

        def tiles(step, at):
            return tile_copies(
                refs.weights, refs.tiles, refs.tiles_arrived, cut.tile, first, step, at
            )

        def hidden_copies(body, window, tile):
            slot = jax.lax.rem(tile, 2)
            columns = pl.ds(pl.multiple_of(tile * cut.tile, cut.tile), cut.tile)

            def part(peer, rows, here):
                for buffer, array in zip(refs.hidden_tiles, refs.hidden, strict=True):
                    source, target = buffer.at[slot, here], array.at[peer, rows, columns]
                    body(pltpu.make_async_copy(source, target, refs.hidden_left.at[slot]))

            travel.parts(window, part)

        def wait_hidden(window, tile):
            hidden_copies(lambda copy: copy.wait(), window, tile)

        def wait_last_hidden(window):
            for n in range(kept):
                wait_hidden(window, jnp.int32(num_steps - kept + n))

        def multiply(step, slot):
            gate_tile, up_tile, down_tile = (tile.at[slot] for tile in refs.tiles)
            hidden_slot = jax.lax.rem(step.tile, 2)

            def one(chunk: Chunk):
                gates = refs.gates_in[chunk.peer, chunk.number, :]
                gate = jnp.where(is_diagonal, gates, 0).sum(1, keepdims=True)
                x, dy = (window[chunk.here] for window in refs.windows)
                products = [dot(x, gate_tile[...], (1, 0)), dot(x, up_tile[...], (1, 0))]
                products.append(dot(dy, down_tile[...], (1, 1)))
                *results, summands = _swiglu_gradient(products, gate)
                is_own = chunk.is_own(summands.shape)

                # The chunk's first rows are those of the first expert that has any in it.
                for buffer, result in zip(refs.hidden_tiles, results, strict=True):
                    others = buffer[hidden_slot, chunk.here].astype(jnp.float32)
                    others = jnp.where(chunk.begin > 0, others, 0)
                    merged = jnp.where(is_own, result, others).astype(buffer.dtype)
                    buffer[hidden_slot, chunk.here] = merged

                da, db = (jnp.where(is_own, d, 0).astype(x.dtype) for d in results[:2])
                for at in range(0, width, PIECE):
                    piece = pl.ds(at, min(PIECE, width - at))
                    dx = dot(da, gate_tile[piece], (1, 1)) + dot(db, up_tile[piece], (1, 1))
                    refs.sums[chunk.here, piece] += dx
                summands = jnp.where(is_own, summands, 0)
                for at in range(0, cut.tile, LANES):
                    refs.gate_sums[chunk.here] += summands[:, at : at + LANES]

            walk.own_chunks(step.window, step.expert, one)

        # Results, to the owners of the rows.

        def settle(chunk: Chunk):
            refs.done[chunk.here] = refs.sums[chunk.here].astype(refs.done.dtype)
            dgate = refs.gate_sums[chunk.here].sum(1, keepdims=True)
            along = jnp.where(is_diagonal, dgate, 0).sum(0, keepdims=True)
            refs.dgate_here[chunk.peer, chunk.number, :] = along

        results = Results(travel, refs.done, refs.dx, refs.dx_sent, refs.dx_arrived)

        def dgate_copy(peer):
            source, target = refs.dgate_here.at[peer], refs.dgate.at[me]
            return travel.send(source, target, refs.dgate_sent, refs.dgate_arrived, peer)

        def finish_dgate():
            """Send the gradients of gates home: those of all peers of this core, even if none."""
            travel.every_peer(lambda _, peer: dgate_copy(peer).start(), of_core=True)

            @pl.when(walk.is_mine(0))
            def _():
                pltpu.sync_copy(refs.dgate_here.at[me], refs.dgate.at[me])

            travel.every_peer(lambda _, peer: dgate_copy(peer).wait_send(), of_core=True)
            travel.every_peer(lambda peer, _: dgate_copy(peer).wait_recv(), of_core=True)

        def one_step(at, total, last_window):
            """Do one tile of one expert for one window; return the last window that left."""
            step = walk.step(at)

            @pl.when(at + 1 < total)
            def _():
                for copy in tiles(walk.step(at + 1), at + 1):
                    copy.start()

            @pl.when(step.is_first)
            def _():
                load(step.window)
                pl.when(last_window >= 0)(lambda: wait_last_hidden(last_window))

            is_reused = step.opens & (step.tile >= kept)
            pl.when(is_reused)(lambda: wait_hidden(step.window, step.tile - kept))
            for copy in tiles(step, at):
                copy.wait()
            multiply(step, jax.lax.rem(at, 2))

            @pl.when(step.closes)
            def _():
                hidden_copies(lambda copy: copy.start(), step.window, step.tile)

            @pl.when(step.is_last)
            def _():
                pl.when(last_window >= 0)(lambda: results.wait(last_window))
                walk.every_chunk(step.window, settle)
                results.start(step.window)

            return jnp.where(step.is_last, step.window, last_window)

        travel.meet()
        travel.start_marks(marks)
        travel.every_peer(start_leaving, of_core=True)
        start_staying()
        travel.wait_marks(marks)
        pltpu.sync_copy(refs.bounds_in, refs.bounds_read)
        pl.when(walk.core == 0)(lambda: pltpu.sync_copy(refs.bounds_in, refs.bounds_out))
        total = walk.schedule() * num_steps

        @pl.when(total > 0)
        def _():
            for copy in tiles(walk.step(0), 0):
                copy.start()
            last = jax.lax.fori_loop(0, total, lambda at, window: one_step(at, total, window), -1)
            wait_last_hidden(last)
            results.wait(last)

        finish_dgate()
        travel.every_peer(wait_leaving, of_core=True)
        travel.settle_marks(marks)
        results.wait_home()

    return kernel
