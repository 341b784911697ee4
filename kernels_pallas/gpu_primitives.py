"""What GPU kernels of several operations share."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import vector

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


def run_ring(
    inputs: Any,
    copy: Callable[[Any, Any], None],
    multiply: Callable[[Any, Sequence[Any], Any, Sequence[Any]], None],
    *,
    out_type: Any,
    ring: Any,
    scratch: Sequence[Any],
    groups: int,
    programs: int,
    shifts_registers: bool,
    name: str,
    cost: pl.CostEstimate,
    reads_back: bool = False,
) -> Any:
    """Run a kernel of persistent programs: a warpgroup copies into a ring, others multiply.

    Unless a warpgroup reads back shared memory that it wrote, or writes what it read, no barrier is
    wanted beside those that commits and waits bring: each would stall its four warps.

    Args:
        inputs: arrays, in any structure.
        copy: (inputs, ring) brings the tiles of all items.
        multiply: (inputs, outputs, ring, scratch) multiplies and writes them.
        out_type: of the outputs.
        ring: a tuple of shared memory and barriers.
        scratch: shared memory besides.
        groups: warpgroups that multiply.
        programs: as many.
        shifts_registers: whether those that multiply get registers of the one that copies.
        name: of the kernel.
        cost: estimate.
        reads_back: whether `multiply` reads shared memory that it writes.
    """
    leaves, tree = jax.tree.flatten(inputs)
    outputs = len(jax.tree.leaves(out_type))

    def body(*refs: Any) -> None:
        given = jax.tree.unflatten(tree, refs[: len(leaves)])
        outs, rest = refs[len(leaves) :][:outputs], refs[len(leaves) + outputs :]
        tiles, own = type(ring)(*rest[: len(ring)]), rest[len(ring) :]
        group = jax.lax.axis_index("warpgroup")

        @pl.when(group < groups)
        def _() -> None:
            if shifts_registers:
                plgpu.set_max_registers(232, action="increase")
            multiply(given, outs, tiles, own)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == groups)
        def _() -> None:
            if shifts_registers:
                plgpu.set_max_registers(40, action="decrease")
            copy(given, tiles)

    call = kernel(
        body,
        name=name,
        warpgroups=groups + 1,
        cost=cost,
        out_type=out_type,
        scratch_types=(*ring, *scratch),
        grid=(programs,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=0, unsafe_no_auto_barriers=not reads_back
        ),
    )
    return call(*leaves)


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


def _levels_of_word(word: Any, half: int) -> Sequence[Any]:
    """Turn four bytes into the levels of their low nibbles, or of their high ones.

    A level plus 8, put into the last bits of 128 as a bfloat16, is 128 + 8 + level.
    """
    word_type = ir.IntegerType.get_signless(32)
    return mgpu.utils.inline_ptx(
        f"""
        {{
        .reg .b32 nibbles, bias;
        mov.b32 bias, 0x43084308;
        shr.u32 nibbles, $2, {4 * half};
        lop3.b32 nibbles, nibbles, 0x0f0f0f0f, 0x08080808, 0x6a;
        prmt.b32 $0, nibbles, 0x43, 0x4140;
        prmt.b32 $1, nibbles, 0x43, 0x4342;
        sub.bf16x2 $0, $0, bias;
        sub.bf16x2 $1, $1, bias;
        }}
        """,
        word,
        result_types=[word_type] * 2,
    )


def nibbles(tile: jax.Array, half: int) -> jax.Array:
    """Return the int4s of low nibbles of a tile of int8 (half 0), or of high ones, in bfloat16."""
    if backend.is_interpreting():
        levels = jnp.right_shift(tile, 4) if half else ((tile & 15) ^ 8) - 8
        return levels.astype(jnp.bfloat16)
    result = plgpu.ShapeDtypeStruct(tile.shape, jnp.dtype(jnp.bfloat16), LINES)

    @plgpu.inline_mgpu(arg_types=(LINES,), return_type=result)
    def split(_: Any, tile: Any) -> Any:
        words_type = ir.VectorType.get((2,), ir.IntegerType.get_signless(32))
        out = np.empty_like(tile.registers)
        for at, register in np.ndenumerate(tile.registers):
            words = vector.bitcast(words_type, register)
            words = [vector.extract(words, [], [i]) for i in range(2)]
            pairs = [pair for word in words for pair in _levels_of_word(word, half)]
            joined = vector.from_elements(ir.VectorType.get((4,), pairs[0].type), pairs)
            out[at] = vector.bitcast(ir.VectorType.get((8,), ir.BF16Type.get()), joined)
        return mgpu.FragmentedArray(_registers=out, _layout=tile.layout, _is_signed=None)

    return split(tile)
