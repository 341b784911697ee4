"""What the GPU kernels of attention share: padded arrays, tables of blocks, and the walk over them.

A walk visits the blocks that the mask does not rule out, in order, and tells both sides of a
kernel the same sequence: the warpgroup that copies and those that multiply each derive it from the
same scalars, so that nothing but barriers passes between them.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import backend, chips
from kernels_pallas.attention import visibility
from kernels_pallas.attention.visibility import Inputs, KeyBlocks, QueryBlocks, Settings

ROWS = 64  # of the tile that one warpgroup multiplies
_REGISTERS = 512  # of one thread of each warpgroup, together
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
_TAKES_COST = "cost_estimate" in inspect.signature(plgpu.kernel).parameters
OF_ROWS = plgpu.Layout.WGMMA.reduce(1)  # a vector with one number per row of a tile
OF_COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # and one with a number per column


def unsupported_reason(x: Inputs, how: Settings) -> str | None:
    """Say why the kernels cannot take these shapes, dtypes or this chip; None if they can."""
    dtypes = {a.dtype.name for a in (x.q_BTNH, x.k_BSKH, x.v_BSKH)}
    kind = backend.device_kind()
    if "float32" in dtypes:
        return "float32: wgmma multiplies in tf32"
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"q, k and v of {', '.join(sorted(dtypes))}; wgmma takes bfloat16 or float16"
    if x.q_BTNH.shape[-1] > 256:
        return f"head_dim {x.q_BTNH.shape[-1]} is over 256"
    if how.scale <= 0 or (how.temperature is not None and how.temperature[1] < 0):
        return "the scale or the temperature is negative"
    if jax.typeof(x.q_BTNH).manual_axis_type.varying:  # jax cannot type its loops over blocks
        return "`jax.shard_map` checks over which axes arrays vary; give it check_vma=False"
    if backend.platform() == "gpu" and not chips.is_hopper(kind):
        return f"wgmma is Hopper's, and this is {kind}"
    return None


def multipliers(head_dim: int) -> int:
    """Return how many warpgroups multiply, each for 64 rows; one more copies.

    With a head of 256 the accumulator alone takes 128 registers of a thread. One warpgroup may have
    255, three share as many as leave 168 to each: `setmaxnreg` shifts them with jax 0.11, and
    ptxas ignores it with jax 0.12.
    """
    return 2 if head_dim <= 128 else 1


def set_registers(is_consumer: bool, head_dim: int, copier: int = 40) -> None:
    """Move registers from the warpgroup that copies to those that multiply, if these are two.

    Args:
        is_consumer: whether this warpgroup multiplies.
        head_dim: H.
        copier: registers of a thread of the warpgroup that copies.
    """
    if multipliers(head_dim) == 1:
        return
    if is_consumer:
        plgpu.set_max_registers((_REGISTERS - copier) // 16 * 8, action="increase")
    else:
        plgpu.set_max_registers(copier, action="decrease")


def pad(x: jax.Array, axis: int, multiple: int, value: int = 0) -> jax.Array:
    """Lengthen an axis to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


def pad_head(x_BTNH: jax.Array) -> jax.Array:
    """Lengthen the head to 64, 128 or 256, what the tensor core and the backward pass divide."""
    H = x_BTNH.shape[-1]
    return pad(x_BTNH, 3, 64 if H <= 128 else 256)


def padded(x: Inputs, q_multiple: int, kv_multiple: int) -> Inputs:
    """Lengthen tokens to whole blocks, and the head; tokens are else as they came."""

    def longer(a: jax.Array | None, multiple: int, value: int = 0) -> jax.Array | None:
        return None if a is None else pad(a, 1, multiple, value)

    return Inputs(
        pad(pad_head(x.q_BTNH), 1, q_multiple),
        pad(pad_head(x.k_BSKH), 1, kv_multiple),
        pad(pad_head(x.v_BSKH), 1, kv_multiple),
        pad(x.q_positions_BT, 1, q_multiple, -1),
        pad(x.kv_positions_BS, 1, kv_multiple, -1),
        longer(x.q_segments_BT, q_multiple),
        longer(x.kv_segments_BS, kv_multiple),
    )


def without_padding(x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Zero the tokens at negative positions: a weight of 0 does not silence a NaN."""
    return jnp.where((positions_BT >= 0)[:, :, None, None], x_BTNH, jnp.zeros_like(x_BTNH))


def describe(x: Inputs, how: Settings) -> tuple[jax.Array, jax.Array]:
    """Collect what masks depend on.

    Returns:
        rows_BCT: int32 [B, 3, T], the first and last position each query sees and its segment.
        columns_BCS: int32 [B, 2, S], position and segment of each key.
    """
    positions_BT, positions_BS = x.q_positions_BT, x.kv_positions_BS
    lo_BT = visibility.first_visible(positions_BT, how.chunk_size)
    q_segments_BT, kv_segments_BS = jnp.zeros_like(positions_BT), jnp.zeros_like(positions_BS)
    if x.q_segments_BT is not None and x.kv_segments_BS is not None:
        q_segments_BT, kv_segments_BS = x.q_segments_BT, x.kv_segments_BS
    rows_BCT = jnp.stack([lo_BT, positions_BT, q_segments_BT], axis=1)
    return rows_BCT, jnp.stack([positions_BS, kv_segments_BS], axis=1)


def tables(x: Inputs, how: Settings, q_block: int, kv_block: int) -> list[jax.Array]:
    """Return the fields of `QueryBlocks` [B, blocks, 8] and of `KeyBlocks`, int32."""
    both = visibility.summarize(x, how.chunk_size, q_block, kv_block)
    rows = [[*blocks] + [jnp.zeros_like(blocks.begin)] * (8 - len(blocks)) for blocks in both]
    return [jnp.stack(fields, axis=-1) for fields in rows]


def query_block(table_BIF: Any, b: Any, i: Any) -> QueryBlocks:
    """Read the scalars of a block of queries."""
    return QueryBlocks(*(table_BIF[b, i, f] for f in range(len(QueryBlocks._fields))))


def key_block(table_BJF: Any, b: Any, j: Any) -> KeyBlocks:
    """Read the scalars of a block of keys."""
    return KeyBlocks(*(table_BJF[b, j, f] for f in range(len(KeyBlocks._fields))))


def seek(block: jax.Array, end: jax.Array, meets: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Return the first block from this one on that meets, or one past the last."""

    def passes(block: jax.Array) -> jax.Array:
        last = jnp.maximum(end - 1, 0)  # some block that the tables have
        return (block < end) & ~meets(jnp.minimum(block, last))

    return jax.lax.while_loop(passes, lambda block: block + 1, block)


def walk[Carry](
    begin: jax.Array,
    end: jax.Array,
    meets: Callable[[jax.Array], jax.Array],
    step: Callable[[jax.Array, jax.Array, Carry], Carry],
    carry: Carry,
) -> tuple[jax.Array, Carry]:
    """Visit the blocks begin..end that meet, passing over the others.

    Args:
        begin, end: the range.
        meets: of a block, whether to visit it.
        step: (turn, block, carry) -> carry; turn counts the blocks visited before.
        carry: what the first step takes.

    Returns:
        (blocks visited, last carry)
    """

    def visit(state: tuple[jax.Array, jax.Array, Carry]) -> tuple[jax.Array, jax.Array, Carry]:
        turn, block, carry = state
        return turn + 1, seek(block + 1, end, meets), step(turn, block, carry)

    start = jnp.int32(0), seek(begin, end, meets), carry
    turns, _, carry = jax.lax.while_loop(lambda state: state[1] < end, visit, start)
    return turns, carry


def kernel(
    body: Callable[..., None], *, name: str, warpgroups: int, cost: pl.CostEstimate, **how: Any
) -> Callable[..., Any]:
    """Make a kernel of `body` over a grid of (batch, head, block); see `plgpu.kernel`.

    Blocks change fastest: those that run at a time then read the same head from the L2 cache, and
    there may be more than the 65535 that CUDA allows along other axes. The results vary over the
    manual mesh axes over which some argument does.
    """
    if _TAKES_COST:
        how["cost_estimate"] = cost
    call = plgpu.kernel(
        body,
        kernel_name=name,
        grid_names=("batch", "head", "block"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=backend.gpu_interpreter(),
        **how,
    )

    def run(*arrays: jax.Array) -> Any:
        axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))
        return jax.lax.pcast(call(*arrays), tuple(axes), to="varying")

    return run


class Stream(NamedTuple):
    """Tiles that come through a ring of buffers in shared memory.

    Attributes:
        copies: (block, slot) -> pairs of a tile of global memory and its buffer.
        ready: a barrier for each slot, at which each copy arrives.
        free: a barrier for each slot, at which each reader arrives when it is done.
    """

    copies: Callable[[jax.Array, jax.Array], Sequence[tuple[Any, Any]]]
    ready: Any
    free: Any

    def fetch(self, turn: jax.Array, block: jax.Array) -> None:
        """Bring a block into the slot of this turn, once its readers are done with the last one."""
        stages = self.ready.shape[0]
        slot = jax.lax.rem(turn, jnp.int32(stages))

        @pl.when(turn >= stages)
        def _reuse() -> None:
            plgpu.barrier_wait(self.free.at[slot])

        for source, target in self.copies(block, slot):
            plgpu.copy_gmem_to_smem(source, target, self.ready.at[slot])

    def drain(self, turns: jax.Array) -> None:
        """Wait until all that was brought has been read."""
        for slot in range(self.ready.shape[0]):

            @pl.when(slot < turns)
            def _drain(slot: int = slot) -> None:
                plgpu.barrier_wait(self.free.at[slot])


def across(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat a number per row over the columns of a tile."""
    return jax.lax.broadcast_in_dim(vector, shape, [0])


def down(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat a number per column over the rows of a tile."""
    return jax.lax.broadcast_in_dim(vector, shape, [1])


def load(ref: Any, layout: Any) -> jax.Array:
    """Read a vector from global memory."""
    return plgpu.load(ref, layout=layout, optimized=False)


def mask(
    s: jax.Array, q_CT: Any, kv_CS: Any, segmented: bool, *, transposed: bool = False
) -> jax.Array:
    """Put -inf where a query does not see a key.

    Args:
        s: a tile, queries by keys, or transposed.
        q_CT, kv_CS: what `describe` says of its queries and keys, in global memory.
        segmented: whether segments count.
        transposed: whether the rows of the tile are keys.
    """

    def of_rows(ref: Any) -> jax.Array:
        return across(load(ref, OF_ROWS), s.shape)

    def of_columns(ref: Any) -> jax.Array:
        return down(load(ref, OF_COLUMNS), s.shape)

    of_q, of_kv = (of_columns, of_rows) if transposed else (of_rows, of_columns)
    position = of_kv(kv_CS.at[0])
    s = jnp.where(position >= of_q(q_CT.at[0]), s, -jnp.inf)
    s = jnp.where(position <= of_q(q_CT.at[1]), s, -jnp.inf)
    if not segmented:
        return s
    return jnp.where(of_kv(kv_CS.at[1]) == of_q(q_CT.at[2]), s, -jnp.inf)


def product(*pairs: tuple[Any, Any], meanwhile: Callable[[], None] = lambda: None) -> jax.Array:
    """Sum the products of tiles of shared memory, [ROWS, D] and [C, D] transposed, in float32.

    Args:
        pairs: of tiles.
        meanwhile: what to do before waiting for the result.
    """

    def body(acc: Any) -> jax.Array:
        for a, b in pairs:
            plgpu.wgmma(acc, a, b.transpose((1, 0)))
        meanwhile()
        return acc[...]

    a, b = pairs[0]
    return pl.run_scoped(body, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))


def accumulate(acc: jax.Array, a: jax.Array, b: Any) -> jax.Array:
    """Add the product of a tile in registers and one in shared memory to a float32 accumulator.

    The interpreter has no wgmma that takes registers, and multiplies the loaded tile instead; what
    a load has read, unlike what wgmma has, TMA may overwrite only after a fence.
    """
    if backend.gpu_interpreter():
        tile = b[...]
        plgpu.commit_smem()
        return acc + jnp.dot(a, tile, preferred_element_type=jnp.float32)
    run: Any = pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))
    return run(plgpu.ACC.init(acc))


def filled(value: float, shape: tuple[int, ...], layout: Any) -> jax.Array:
    """Return a float32 array of one value in the given layout."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def row_factors(positions: jax.Array, how: Settings) -> jax.Array:
    """Return what the products of each query are multiplied by to give logits in base 2."""
    factor = jnp.full(positions.shape, how.scale * LOG2E, jnp.float32)
    if how.temperature is None:
        return factor
    return factor * visibility.attention_temperature(positions, how.temperature)


def cost(x: Inputs, how: Settings, *, products: int, block: int) -> pl.CostEstimate:
    """Estimate what a causal call takes.

    Args:
        x, how: the call.
        products: matrix products over all pairs of a query and a key.
        block: queries (or keys) that share each copy of a key (or query).
    """
    B, T, N, H = x.q_BTNH.shape
    S = x.k_BSKH.shape[1]
    pairs = B * N * T * max(min(how.chunk_size or S, S) // 2, 1)
    once = 2 * x.q_BTNH.size
    return pl.CostEstimate(
        flops=2 * products * pairs * H,
        transcendentals=pairs,
        bytes_accessed=x.q_BTNH.dtype.itemsize * (once + 2 * pairs * H // block),
    )
