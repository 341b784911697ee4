"""Experts divided over TPUs, one round in one kernel: rows travel, are multiplied, travel back.

Every device starts by sending each peer its queue of rows by remote DMA, then takes its own queue
through its experts, then that of the peer before it on the ring, and so on; a queue is waited for
when its turn comes. A finished window of rows leaves for its owner while the next is multiplied. At
a distance on the ring everybody receives from one peer and sends to one, so no device is crowded.

A window is rows that stay in VMEM, with float32 sums of their results, while the matrices of each
expert that has rows in it stream past: tiles of gate and up of `tile` columns, of down of as many
rows. So an expert's matrices are read once for each window in which it has rows: once for a queue
if that fits. Short queues share a window, as many as bring an expert some 512 rows, where products
take about as long as reading the matrices; those are then read once for all of these peers.

An expert's rows may begin anywhere in a window: products are of whole chunks of rows, and hidden
rows that are another expert's are set to zero, in which way they add nothing to the sums.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import backend, chips, tuning
from kernels_pallas.attention.tpu_blocks import LANES
from kernels_pallas.experts.inputs import expected_rows
from kernels_pallas.experts.tpu_parallel_kernel import exchange_kernel
from kernels_pallas.experts.tpu_parallel_travel import Mesh
from kernels_pallas.experts.tpu_parallel_walk import Cut
from kernels_pallas.experts.tpu_plan import SCALARS_BUDGET, round_up
from kernels_pallas.experts.tpu_rows import TILES

_PRODUCTS = 8 * 2**20  # of VMEM, for the products of a chunk


def vmem_limit() -> int:
    """Return how much VMEM the kernels may use."""
    vmem = max(backend.tpu().vmem, chips.LEAST_VMEM)
    return vmem - (16 if vmem > chips.LEAST_VMEM else 12) * 2**20


def _largest_first(shared: list, *tiles: list[int]) -> Iterator[tuple[int, tuple[int, int]]]:
    """List the choices of a tile and a window: of the first tiles with any window, and so on."""
    for some in tiles:
        for window in shared:
            yield from ((tile, window) for tile in some)


def fit(
    operation: str,
    needed: Callable[[int, int], int],
    peers: int,
    rows: int,
    w_gate_NDF: jax.Array,
    num_local: int,
) -> Cut | None:
    """Choose the largest window that fits into VMEM, then the widest tile, or None if none fit.

    Args:
        operation: as tuning knows it.
        needed: from the rows of a window and the columns of a tile, the bytes of buffers.
        peers, rows, w_gate_NDF, num_local: as `refusal` has them.
    """
    (D, F), dtype = w_gate_NDF.shape[-2:], w_gate_NDF.dtype
    default = {
        "group": 512,
        "window": 2048,
        "chunk": backend.multiplier(),
        "tile": TILES[0],
        "cores": backend.num_cores(),
    }
    shape = {"D": D, "F": F, "E": num_local, "dtype": str(dtype)}
    tuned = tuning.lookup(operation, default, **shape)
    unit = 32 // dtype.itemsize
    chunk, cores = min(tuned["chunk"], round_up(rows, unit)), min(tuned["cores"], peers)
    queue = round_up(rows, chunk)
    groups = [n for n in range(peers // cores, 0, -1) if peers % n == 0]
    shared = [(n, 1) for n in groups if n == 1 or n * queue <= tuned["group"] * num_local]
    shared += [(1, n) for n in range(2, queue // chunk + 1)]
    tiles = [tile for tile in TILES if tile <= tuned["tile"] and F % tile == 0]
    wide = [tile for tile in tiles if tile >= default["chunk"]]  # as the multiplier is
    for tile, (group, windows) in _largest_first(shared, wide, tiles):
        part = round_up(-(-rows // windows), chunk)
        is_small = needed(group * part, tile) + _PRODUCTS <= vmem_limit()
        if group * part <= tuned["window"] and is_small:
            return Cut(peers, group, windows, part, chunk, tile, unit, cores)
    return None


def _fit(peers: int, rows: int, w_gate_NDF: jax.Array, num_local: int) -> Cut | None:
    """Choose the sizes of the kernel, or None if none fit."""
    D, size = w_gate_NDF.shape[-2], w_gate_NDF.dtype.itemsize

    def needed(window: int, tile: int) -> int:
        return window * D * (2 * size + 4) + 6 * D * tile * size

    return fit("expert_mlp.exchange", needed, peers, rows, w_gate_NDF, num_local)


def refusal(
    peers: int, rows: int, w_gate_NDF: jax.Array, num_local: int, dtype: jnp.dtype
) -> str | None:
    """Return why these queues cannot be taken, or None if they can.

    Args:
        peers: devices, each of which has a queue for each.
        rows: places of a queue.
        w_gate_NDF: gate matrices as stored.
        num_local: experts of a device.
        dtype: of the rows.
    """
    D, F = w_gate_NDF.shape[-2:]
    if peers == 1:
        return "there is no peer to exchange rows with"
    if dtype not in (jnp.bfloat16, jnp.float32) or w_gate_NDF.dtype != dtype:
        return f"rows of {dtype} and matrices of {w_gate_NDF.dtype} must be bfloat16 or float32"
    if D % LANES or F % LANES:
        return f"D ({D}) and F ({F}) must be multiples of {LANES}"
    if num_local >= LANES:
        return f"{num_local} experts on a device are more than {LANES - 1}"
    return refusal_of_sizes(_fit(peers, rows, w_gate_NDF, num_local), D, num_local)


def refusal_of_sizes(cut: Cut | None, width: int, num_local: int) -> str | None:
    """Return why these sizes cannot be, or None if they can."""
    if cut is None:
        return f"rows of {width} columns and tiles of their matrices do not fit into VMEM"
    needed = 4 * (cut.num_windows * (num_local + 1) + cut.peers * LANES)
    if needed > SCALARS_BUDGET:
        return f"its schedule takes {needed} bytes of SMEM, over {SCALARS_BUDGET}"
    return None


def compiler_params(mesh: Mesh) -> pltpu.CompilerParams:
    """Return what the compiler is told of kernels that exchange rows."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",),
        collective_id=mesh.collective(),
        has_side_effects=True,
        vmem_limit_bytes=vmem_limit(),
    )


def tile_buffers(cut: Cut, depth: int, dtype: jnp.dtype) -> list:
    """Return where tiles of gate, up and down matrices arrive, two of each."""
    shapes = [(2, depth, cut.tile), (2, depth, cut.tile), (2, cut.tile, depth)]
    return [pltpu.VMEM(shape, dtype) for shape in shapes]


class Labels(NamedTuple):
    """What goes with queues of rows.

    Attributes:
        scalars: int32; see `tpu_parallel_travel.Travel`.
        gates: float32 [P, chunks, lanes], a chunk's along the lanes.
        bounds: int32 [P, 1, 128], where each expert's rows begin, and at [E] where they all end.
    """

    scalars: jax.Array
    gates: jax.Array
    bounds: jax.Array

    @staticmethod
    def of(
        cut: Cut,
        mesh: Mesh,
        first: jax.Array,
        gate_PR: jax.Array,
        expert_PR: jax.Array,
        num_local: int,
    ) -> "Labels":
        """Lay out gates and experts of rows, as `exchange_and_apply` has them."""
        (P, R), chunks = gate_PR.shape, cut.windows * cut.rows // cut.chunk
        gates = jnp.pad(gate_PR.astype(jnp.float32), ((0, 0), (0, chunks * cut.chunk - R)))
        gates = gates.reshape(P, chunks, cut.chunk)
        rest = round_up(cut.chunk, LANES) - cut.chunk
        gates = jnp.pad(gates, ((0, 0), (0, 0), (0, rest)))
        experts = jnp.arange(num_local + 1)
        is_before = (expert_PR[..., None] >= 0) & (expert_PR[..., None] < experts)
        bounds = is_before.sum(1, dtype=jnp.int32)
        scalars = jnp.stack([first, *mesh.own(), *bounds[:, num_local]]).astype(jnp.int32)
        bounds = jnp.pad(bounds, ((0, 0), (0, LANES - num_local - 1)))[:, None]
        return Labels(scalars, gates, bounds)

    def buffers(self, cut: Cut, num_local: int) -> list:
        """Return where they arrive, and the schedule."""
        return [
            pltpu.VMEM(self.gates.shape, jnp.float32),
            pltpu.VMEM(self.bounds.shape, jnp.int32),
            pltpu.SMEM(self.bounds.shape, jnp.int32),
            pltpu.SMEM((cut.num_windows * num_local,), jnp.int32),
            pltpu.SMEM((cut.num_windows + 1,), jnp.int32),
        ]


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
    """Send each peer a queue of rows, apply its experts to them, and bring the results home.

    Call it inside `jax.shard_map`, on all devices of the axes alike.

    Args:
        x_PRD: queue of rows for each device of the axes.
        gate_PR: their gates.
        expert_PR: int32 expert of each row among those of the device it goes to, ascending in a
            queue; places without a row are last and have -1.
        w_gate_NDF, w_up_NDF, w_down_NFD: this device's matrices, perhaps of several layers.
        first: int32 number of its expert 0's matrices.
        num_local: experts of a device.
        axes: mesh axes.

    Returns:
        y_PRD in the dtype of x; places without a row are arbitrary.
    """
    (P, R, D), F, size = x_PRD.shape, w_gate_NDF.shape[2], x_PRD.dtype.itemsize
    mesh, cut = Mesh.of(axes), _fit(P, R, w_gate_NDF, num_local)
    assert cut is not None
    x_PRD = jnp.pad(x_PRD, ((0, 0), (0, round_up(R, cut.unit) - R), (0, 0)))
    labels = Labels.of(cut, mesh, first, gate_PR, expert_PR, num_local)
    in_hbm, in_smem = (pl.BlockSpec(memory_space=m) for m in (pl.ANY, pltpu.SMEM))
    rows, dtype = cut.group * cut.rows, x_PRD.dtype
    semaphores = [(), (2,), (), (P,), (), (), (), (3, 2)]
    held = expected_rows(P * R)
    readings = P // cut.group * (num_local + cut.windows - 1)
    y, _ = pl.pallas_call(
        exchange_kernel(cut, num_local, F // cut.tile, mesh),
        grid=(cut.cores,),
        in_specs=[in_smem, *[in_hbm] * 6],
        out_specs=[in_hbm] * 2,
        out_shape=[backend.like(x_PRD, x_PRD.shape, dtype)] * 2,
        scratch_shapes=[
            *labels.buffers(cut, num_local),
            pltpu.VMEM((rows, D), dtype),
            pltpu.VMEM((rows, D), jnp.float32),
            pltpu.VMEM((rows, D), dtype),
            *tile_buffers(cut, D, dtype),
            *[pltpu.SemaphoreType.DMA(shape) for shape in semaphores],
        ],
        compiler_params=compiler_params(mesh),
        cost_estimate=pl.CostEstimate(
            flops=6 * held * D * F,
            transcendentals=held * F,
            bytes_accessed=(readings * 3 * D * F + 4 * held * D) * size,
            remote_bytes_transferred=2 * (P - 1) * held // P * D * size,
        ),
        interpret=backend.tpu_interpreter(),
        name="expert_mlp_exchange",
    )(labels.scalars, x_PRD, labels.gates, labels.bounds, w_gate_NDF, w_up_NDF, w_down_NFD)
    return y[:, :R]
