"""One round of dispatch in one TPU kernel: rows are sent, multiplied and returned by remote DMA.

Every device starts by sending each peer its buffer of rows, then takes its own buffer through its
experts, then that of the peer before it on the ring, and so on; a buffer is waited for when its
turn comes. A finished block of rows is returned while the next is multiplied. At a distance on the
ring everybody receives from one peer and sends to one, so no device is crowded.

A resident block is rows that stay in VMEM, with float32 sums of their results, while the matrices
of each expert that has rows in it stream past: tiles of gate and up of `tile` columns, of down of
as many rows. So an expert's matrices are read once for each block in which it has rows: once for a
buffer if that fits. Short buffers share a block, as many as bring an expert some 512 rows, where
products take about as long as reading the matrices; those are then read once for all these peers.

An expert's rows may begin anywhere in a block: products are of whole chunks of rows, and hidden
rows that are another expert's are set to zero, in which way they add nothing to the sums.
"""

import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import backend, chips, tuning
from kernels_pallas.experts.inputs import expected_rows
from kernels_pallas.experts.tpu_blocks import SCALARS_BUDGET, TILES
from kernels_pallas.experts.tpu_remote.kernel import exchange_kernel
from kernels_pallas.experts.tpu_remote.order import ExchangeSizes
from kernels_pallas.tpu_primitives import LANES, in_hbm, round_up, tile_rows

_PRODUCTS = 8 * 2**20  # of VMEM, for the products of a chunk


def vmem_limit() -> int:
    """Return how much VMEM the kernel may use."""
    vmem = backend.tpu().vmem
    return vmem - (16 if vmem > chips.LEAST_VMEM else 12) * 2**20


def _fit(peers: int, rows: int, w_gate_NDF: jax.Array, num_local: int) -> ExchangeSizes | None:
    """Choose the largest block that fits into VMEM, then the widest tile, or None if none fit."""
    (D, F), size = w_gate_NDF.shape[-2:], w_gate_NDF.dtype.itemsize
    default = {
        "group": 512,
        "block": 2048,
        "chunk": backend.multiplier(),
        "tile": TILES[0],
        "cores": backend.num_cores(),
    }
    shape = {"D": D, "F": F, "E": num_local, "dtype": str(w_gate_NDF.dtype)}
    tuned = tuning.lookup("expert_mlp.exchange", default, **shape)
    unit = tile_rows(w_gate_NDF.dtype)
    chunk, cores = min(tuned["chunk"], round_up(rows, unit)), min(tuned["cores"], peers)
    whole = round_up(rows, chunk)
    groups = [n for n in range(peers // cores, 0, -1) if peers % n == 0]
    cuts = [(n, 1) for n in groups if n == 1 or n * whole <= tuned["group"] * num_local]
    cuts += [(1, n) for n in range(2, whole // chunk + 1)]
    tiles = [tile for tile in TILES if tile <= tuned["tile"] and F % tile == 0]
    wide = [tile for tile in tiles if tile >= default["chunk"]]  # as the multiplier is
    # The widest tile that goes with the largest block, if it is as wide as the multiplier.
    choices = [(*cut, tile) for some in (wide, tiles) for cut in cuts for tile in some]
    for sharing, blocks, tile in choices:
        part = round_up(-(-rows // blocks), chunk)
        block = sharing * part
        needed = block * D * (2 * size + 4) + 6 * D * tile * size + _PRODUCTS
        if block <= tuned["block"] and needed <= vmem_limit():
            return ExchangeSizes(peers, sharing, blocks, part, chunk, tile, unit, cores)
    return None


def unsupported_reason(
    peers: int, rows: int, w_gate_NDF: jax.Array, num_local: int, dtype: jnp.dtype
) -> str | None:
    """Return why buffers of so many rows for each peer cannot be taken, or None if they can."""
    D, F = w_gate_NDF.shape[-2:]
    if peers == 1:
        return "there is no peer to exchange rows with"
    if dtype not in (jnp.bfloat16, jnp.float32) or w_gate_NDF.dtype != dtype:
        return f"rows of {dtype} and matrices of {w_gate_NDF.dtype} must be bfloat16 or float32"
    if D % LANES or F % LANES:
        return f"D ({D}) and F ({F}) must be multiples of {LANES}"
    if num_local >= LANES:
        return f"{num_local} experts on a device are more than {LANES - 1}"
    sizes = _fit(peers, rows, w_gate_NDF, num_local)
    if sizes is None:
        return f"rows of {D} columns and tiles of their matrices do not fit into VMEM"
    needed = 4 * (sizes.num_blocks * (num_local + 1) + peers * LANES)
    if needed > SCALARS_BUDGET:
        return f"its list of items takes {needed} bytes of SMEM, over {SCALARS_BUDGET}"
    return None


def _labels(
    sizes: ExchangeSizes, gate_PR: jax.Array, expert_PR: jax.Array, num_local: int
) -> tuple[jax.Array, jax.Array]:
    """Lay out what goes with buffers of rows.

    Returns:
        int32 [P, 1 + chunks, lanes]: where each expert's rows begin, and at [E] where they all end;
        then, as bits, the float32 gates of each chunk of rows. And int32 [P], how many rows.
    """
    (P, R), chunks = gate_PR.shape, sizes.blocks * sizes.rows // sizes.chunk
    lanes = round_up(sizes.chunk, LANES)
    gates = jnp.pad(gate_PR.astype(jnp.float32), ((0, 0), (0, chunks * sizes.chunk - R)))
    gates = gates.reshape(P, chunks, sizes.chunk)
    gates = jnp.pad(gates, ((0, 0), (0, 0), (0, lanes - sizes.chunk)))
    bits = jax.lax.bitcast_convert_type(gates, jnp.int32)
    is_before = (expert_PR[..., None] >= 0) & (expert_PR[..., None] < jnp.arange(num_local + 1))
    bounds = is_before.sum(1, dtype=jnp.int32)
    padded = jnp.pad(bounds, ((0, 0), (0, lanes - num_local - 1)))[:, None]
    return jnp.concatenate([padded, bits], axis=1), bounds[:, num_local]


def collective(axes: tuple[str, ...]) -> int:
    """Number the barrier that devices meet at along these axes: another for each set, from 0.

    Sets of axes with several devices are numbered by how many axes they have, so that a mesh of n
    such axes needs n numbers unless experts are sharded over several. Kernels that follow each
    other may meet at the same barrier: none ends before it has heard from every peer, which has
    then left the barrier of that kernel behind.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    large = sorted(name for name, size in shape.items() if size > 1)
    own = tuple(name for name in large if name in axes)
    sets = (s for n in range(1, len(large) + 1) for s in itertools.combinations(large, n))
    return next(number for number, names in enumerate(sets) if names == own)


def exchange_and_apply(
    x_PRD: jax.Array,
    gate_PR: jax.Array,
    expert_PR: jax.Array,
    w_gate_NDF: jax.Array,
    w_up_NDF: jax.Array,
    w_down_NFD: jax.Array,
    first: jax.Array,
    *,
    num_local: int,
    axes: str | tuple[str, ...],
) -> jax.Array:
    """Send each peer a buffer of rows, apply its experts to them, and return the results.

    Call it inside `jax.shard_map`, on all devices of the axes alike.

    Args:
        x_PRD: send buffer of rows for each device of the axes.
        gate_PR: their gates.
        expert_PR: int32 expert of each row among those of the device it goes to, ascending in a
            buffer; places without a row are last and have -1.
        w_gate_NDF, w_up_NDF, w_down_NFD: this device's matrices, perhaps of several layers.
        first: int32 number of its expert 0's matrices.
        num_local: experts of a device.
        axes: mesh axes.

    Returns:
        y_PRD in the dtype of x; places without a row are arbitrary.
    """
    (P, R, D), F, dtype = x_PRD.shape, w_gate_NDF.shape[2], x_PRD.dtype
    sizes, axes = _fit(P, R, w_gate_NDF, num_local), (axes,) if isinstance(axes, str) else axes
    assert sizes is not None
    x_PRD = jnp.pad(x_PRD, ((0, 0), (0, round_up(R, sizes.unit) - R), (0, 0)))
    labels, lengths_P = _labels(sizes, gate_PR, expert_PR, num_local)
    scalars = jnp.stack([first, jax.lax.axis_index(axes), *lengths_P]).astype(jnp.int32)
    block, tile = sizes.sharing * sizes.rows, sizes.tile
    operands = [in_hbm(array) for array in (x_PRD, labels, w_gate_NDF, w_up_NDF, w_down_NFD)]
    whole, in_smem = (pl.BlockSpec(memory_space=m) for m in (pltpu.HBM, pltpu.SMEM))
    y, _ = pl.pallas_call(
        exchange_kernel(sizes, num_local, F // tile, axes),
        grid=(sizes.cores,),
        in_specs=[in_smem, *[whole] * len(operands)],
        out_specs=[whole] * 2,
        out_shape=[backend.like(x_PRD, x_PRD.shape, dtype)] * 2,
        scratch_shapes=[
            pltpu.VMEM(labels.shape, jnp.int32),
            pltpu.SMEM((P, 1, LANES), jnp.int32),
            pltpu.SMEM((sizes.num_blocks * num_local,), jnp.int32),
            pltpu.SMEM((sizes.num_blocks + 1,), jnp.int32),
            pltpu.VMEM((block, D), dtype),
            pltpu.VMEM((block, D), jnp.float32),
            pltpu.VMEM((block, D), dtype),
            *[pltpu.VMEM((2, *shape), dtype) for shape in ((D, tile), (D, tile), (tile, D))],
            *[pltpu.SemaphoreType.DMA(shape) for shape in ((), (), (), (P,), (), (), (), (3, 2))],
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            collective_id=collective(axes),
            has_side_effects=True,
            vmem_limit_bytes=vmem_limit(),
        ),
        cost_estimate=_cost(sizes, P * R, num_local, D, F, dtype),
        interpret=backend.tpu_interpreter(sizes.cores),
        name="expert_mlp_exchange",
    )(scalars, *operands)
    return y[:, :R]


def _cost(
    sizes: ExchangeSizes, places: int, num_local: int, D: int, F: int, dtype: jnp.dtype
) -> pl.CostEstimate:
    held, peers, size = expected_rows(places), sizes.peers, dtype.itemsize
    readings = peers // sizes.sharing * (num_local + sizes.blocks - 1)
    return pl.CostEstimate(
        flops=6 * held * D * F,
        transcendentals=held * F,
        bytes_accessed=(readings * 3 * D * F + 4 * held * D) * size,
        remote_bytes_transferred=2 * (peers - 1) * held // peers * D * size,
    )
