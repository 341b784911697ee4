"""What GPU kernels of several operations share."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import backend

ROWS = 64  # of the tile that one warpgroup multiplies
TILE = plgpu.Layout.WGMMA
OF_ROWS = TILE.reduce(1)  # a vector with one number per row of a tile
OF_COLUMNS = TILE.reduce(0)  # and one with a number per column
# Each thread has eight columns of a line: reading bytes and writing bfloat16s meet no conflicts.
LINES = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 64), (4, 64), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
PART = 64  # columns that this layout covers
_SLICE = 32  # lines at a time, as many as registers hold
_TAKES_COST = "cost_estimate" in inspect.signature(plgpu.kernel).parameters


def kernel(
    body: Callable[..., None],
    *,
    name: str,
    warpgroups: int,
    cost: pl.CostEstimate,
    **how: Any,
) -> Callable[..., Any]:
    """Make a kernel; see `plgpu.kernel`.

    Its results vary over the manual mesh axes over which some argument does.
    """
    if _TAKES_COST:
        how["cost_estimate"] = cost
    call = plgpu.kernel(
        body,
        kernel_name=name,
        num_threads=warpgroups,
        thread_name="warpgroup",
        interpret=backend.gpu_interpreter(),
        **how,
    )

    def run(*arrays: jax.Array) -> Any:
        axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))
        return jax.lax.pcast(call(*arrays), tuple(axes), to="varying")

    return run


class Slots(NamedTuple):
    """The turns that copies and readers take at the slots of a ring of buffers.

    Attributes:
        ready: a barrier for each slot, at which each copy arrives.
        free: a barrier for each slot, at which each reader arrives when it is done.
    """

    ready: Any
    free: Any

    def of(self, turn: jax.Array) -> jax.Array:
        """Return the slot of a turn."""
        return jax.lax.rem(turn, jnp.int32(self.ready.shape[0]))

    def reuse(self, turn: jax.Array) -> jax.Array:
        """Return the slot of a turn, once its readers are done with what was there before."""
        slot = self.of(turn)

        @pl.when(turn >= self.ready.shape[0])
        def _reuse() -> None:
            plgpu.barrier_wait(self.free.at[slot])

        return slot

    def filled(self, turn: jax.Array) -> jax.Array:
        """Return the slot of a turn, once all copies to it have arrived."""
        slot = self.of(turn)
        plgpu.barrier_wait(self.ready.at[slot])
        return slot

    def release(self, turn: jax.Array) -> None:
        """Tell that this reader is done with what came in a turn."""
        plgpu.barrier_arrive(self.free.at[self.of(turn)])

    def drain(self, turns: jax.Array) -> None:
        """Wait until all that was brought has been read."""
        for slot in range(self.ready.shape[0]):

            @pl.when(slot < turns)
            def _drain(slot: int = slot) -> None:
                plgpu.barrier_wait(self.free.at[slot])


def widen(stored: Any, wide: Any) -> None:
    """Write a tile of int8 or float8 as the dtype of another, in shared memory both.

    Args:
        stored: [lines, columns], a multiple of 32 by one of 64.
        wide: the same shape.
    """
    lines, columns = stored.shape
    for column in range(0, columns, PART):
        for line in range(0, lines, _SLICE):
            at = pl.ds(line, _SLICE), pl.ds(column, PART)
            tile: jax.Array = plgpu.load(stored.at[at], layout=LINES)
            if tile.dtype == jnp.float8_e4m3fn:
                tile = tile.astype(jnp.float32)
            wide[at] = tile.astype(wide.dtype)


def clear_lines(tile: Any, begin: jax.Array, end: jax.Array) -> None:
    """Zero the lines of a tile in shared memory outside of [begin, end); shapes as for `widen`."""
    lines, columns = tile.shape
    for column in range(0, columns, PART):
        for line in range(0, lines, _SLICE):
            at = pl.ds(line, _SLICE), pl.ds(column, PART)
            number = plgpu.broadcasted_iota(jnp.int32, (_SLICE, PART), 0, layout=LINES) + line
            value = plgpu.load(tile.at[at], layout=LINES)
            is_kept = (number >= begin) & (number < end)
            tile[at] = jnp.where(is_kept, value, jnp.zeros_like(value))
