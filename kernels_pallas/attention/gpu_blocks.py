"""What the GPU kernels of attention share: padded arrays, tables of blocks, and the walk over them.

A walk visits the blocks that the mask does not rule out, in order, and tells both sides of a
kernel the same sequence: the warpgroup that copies and those that multiply each derive it from the
same scalars, so that nothing but barriers passes between them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import backend
from kernels_pallas.attention import visibility
from kernels_pallas.attention.visibility import Inputs, KeyBlocks, QueryBlocks, Settings

ROWS = 64  # of the tile that one warpgroup multiplies
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
_FIELDS = 8  # scalars that describe one block in a table
OF_ROWS = plgpu.Layout.WGMMA.reduce(1)  # a vector with one number per row of a tile
OF_COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # and one with a number per column


def refusal(x: Inputs, how: Settings) -> str | None:
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
    if backend.platform() == "gpu" and not any(n in kind for n in ("H100", "H200", "H20", "H800")):
        return f"wgmma is Hopper's, and this is {kind}"
    return None


class Operands(NamedTuple):
    """Arrays padded to whole blocks, and what the kernels know of each token and block.

    Attributes:
        q_BTNH, k_BSKH, v_BSKH: padded; H is a multiple of 64.
        rows_BCT: int32 [B, 3, T], the first and last position each query sees and its segment.
        columns_BCS: int32 [B, 2, S], position and segment of each key.
        q_table_BIF, kv_table_BJF: int32, the fields of `QueryBlocks` and `KeyBlocks`.
    """

    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    rows_BCT: jax.Array
    columns_BCS: jax.Array
    q_table_BIF: jax.Array
    kv_table_BJF: jax.Array


def pad(x: jax.Array, axis: int, multiple: int, value: int = 0) -> jax.Array:
    """Lengthen an axis to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


def pad_tokens(x_BTNH: jax.Array, multiple: int) -> jax.Array:
    """Lengthen the tokens to whole blocks and the head to whole tiles."""
    return pad(pad(x_BTNH, 1, multiple), 3, 64)


def without_padding(x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Zero the tokens at negative positions: a weight of 0 does not silence a NaN."""
    return jnp.where((positions_BT >= 0)[:, :, None, None], x_BTNH, jnp.zeros_like(x_BTNH))


def _table(blocks: QueryBlocks | KeyBlocks) -> jax.Array:
    fields = [*blocks] + [jnp.zeros_like(blocks.begin)] * (_FIELDS - len(blocks))
    return jnp.stack(fields, axis=-1)


def operands(x: Inputs, how: Settings, q_block: int, kv_block: int) -> Operands:
    """Pad the arrays and summarise the blocks; v is zero at padding, q and k are as they came."""
    positions_BT = pad(x.q_positions_BT, 1, q_block, -1)
    positions_BS = pad(x.kv_positions_BS, 1, kv_block, -1)
    q_segments_BT, kv_segments_BS = jnp.zeros_like(positions_BT), jnp.zeros_like(positions_BS)
    if x.q_segments_BT is not None and x.kv_segments_BS is not None:
        q_segments_BT = pad(x.q_segments_BT, 1, q_block)
        kv_segments_BS = pad(x.kv_segments_BS, 1, kv_block)
    lo_BT = visibility.first_visible(positions_BT, how.chunk_size)
    q_blocks, kv_blocks = visibility.summarize(x, how.chunk_size, q_block, kv_block)
    return Operands(
        pad_tokens(x.q_BTNH, q_block),
        pad_tokens(x.k_BSKH, kv_block),
        pad_tokens(without_padding(x.v_BSKH, x.kv_positions_BS), kv_block),
        jnp.stack([lo_BT, positions_BT, q_segments_BT], axis=1),
        jnp.stack([positions_BS, kv_segments_BS], axis=1),
        _table(q_blocks),
        _table(kv_blocks),
    )


def query_block(table_BIF: Any, b: Any, i: Any) -> QueryBlocks:
    """Read the scalars of a block of queries."""
    return QueryBlocks(*(table_BIF[b, i, f] for f in range(len(QueryBlocks._fields))))


def key_block(table_BJF: Any, b: Any, j: Any) -> KeyBlocks:
    """Read the scalars of a block of keys."""
    return KeyBlocks(*(table_BJF[b, j, f] for f in range(len(KeyBlocks._fields))))


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

    def seek(block: jax.Array) -> jax.Array:
        def passes(block: jax.Array) -> jax.Array:
            inside = block < end
            return inside & ~meets(jnp.where(inside, block, begin))

        return jax.lax.while_loop(passes, lambda block: block + 1, block)

    def visit(state: tuple[jax.Array, jax.Array, Carry]) -> tuple[jax.Array, jax.Array, Carry]:
        turn, block, carry = state
        return turn + 1, seek(block + 1), step(turn, block, carry)

    start = jnp.int32(0), seek(begin), carry
    turns, _, carry = jax.lax.while_loop(lambda state: state[1] < end, visit, start)
    return turns, carry


def across(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat a number per row over the columns of a tile."""
    return jax.lax.broadcast_in_dim(vector, shape, [0])


def down(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat a number per column over the rows of a tile."""
    return jax.lax.broadcast_in_dim(vector, shape, [1])


def load(ref: Any, layout: Any) -> jax.Array:
    """Read a vector from global memory."""
    return plgpu.load(ref, layout=layout, optimized=False)


def visible(rows_CT: Any, columns_CS: Any, segmented: bool) -> jax.Array:
    """Return the mask of one tile from what is known of its queries and keys; see `Operands`."""
    shape = rows_CT.shape[1], columns_CS.shape[1]
    position = down(load(columns_CS.at[0], OF_COLUMNS), shape)
    seen = position >= across(load(rows_CT.at[0], OF_ROWS), shape)
    seen &= position <= across(load(rows_CT.at[1], OF_ROWS), shape)
    if segmented:
        segment = down(load(columns_CS.at[1], OF_COLUMNS), shape)
        seen &= segment == across(load(rows_CT.at[2], OF_ROWS), shape)
    return seen


def product(a: Any, b: Any) -> jax.Array:
    """Multiply two tiles of shared memory, [ROWS, D] and [D, C], in float32."""

    def body(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(body, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def accumulate(acc: jax.Array, a: jax.Array, b: Any) -> jax.Array:
    """Add the product of a tile in registers and one in shared memory to a float32 accumulator.

    The interpreter has no wgmma that takes registers, and multiplies the loaded tile instead; what
    a load has read, unlike what wgmma has, TMA may overwrite only after a fence.
    """
    if backend.gpu_interpreter():
        tile = b[...]
        plgpu.commit_smem()
        return acc + jnp.dot(a, tile, preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc))


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
