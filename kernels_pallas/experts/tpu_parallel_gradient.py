"""The gradient of `tpu_parallel`, one round in one kernel: x and dy come, and dx and dgate return.

The queues of rows and of their gradients leave by remote DMA at once, and windows of both are taken
in the order of the ring, as forward. Every tile of gate, up and down is read once for a window and
serves five products: those of x with gate and up and that of dy with down^T give the hidden rows
and their gradients, and these times gate^T and up^T are summed to dx. Nothing of the forward pass
is kept. Experts of a window take turns at each tile, so that a tile of hidden rows is whole when it
leaves for HBM, although an expert's rows may begin within a tile of memory.

What has come and the hidden rows stay on the device of the experts. The gradients of matrices are
sums over them, three kernels of `tpu_outer` after this one. With one expert on a device its rows
are taken where they lie; with more they are first sorted by expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import backend
from kernels_pallas.attention.tpu_blocks import LANES
from kernels_pallas.experts import tpu_plan as tp
from kernels_pallas.experts.inputs import expected_rows
from kernels_pallas.experts.tpu_outer import grouped_outer_places
from kernels_pallas.experts.tpu_parallel import (
    Labels,
    compiler_params,
    fit,
    refusal_of_sizes,
    tile_buffers,
)
from kernels_pallas.experts.tpu_parallel_gradient_kernel import gradient_kernel
from kernels_pallas.experts.tpu_parallel_travel import Mesh
from kernels_pallas.experts.tpu_parallel_walk import Cut
from kernels_pallas.experts.tpu_rows import TILES, VMEM_BUDGET
from kernels_pallas.experts.tpu_rows import Cut as OuterCut

_LONGEST = 512  # rows of a block in sums over rows


def _fit(peers: int, rows: int, w_gate_NDF: jax.Array, num_local: int) -> Cut | None:
    """Choose the sizes of the kernel, or None if none fit."""
    D, size = w_gate_NDF.shape[-2], w_gate_NDF.dtype.itemsize

    def needed(window: int, tile: int) -> int:
        row = D * (3 * size + 4) + 4 * LANES + 6 * tile * size
        return window * row + 6 * D * tile * size

    return fit("expert_mlp.exchange_gradient", needed, peers, rows, w_gate_NDF, num_local)


def _fit_outer(cut: Cut, depth: int, width: int, dtype: jnp.dtype) -> OuterCut | None:
    """Choose the sizes of the sums over rows: the widest tile, as rows are read for each."""
    cores = backend.num_cores() if width % (backend.num_cores() * LANES) == 0 else 1
    chunk = tp.round_up(min(cut.rows, backend.multiplier()), cut.unit)
    for tile in (tile for tile in TILES if width % (cores * tile) == 0):
        window = tp.round_up(min(cut.windows * cut.rows, _LONGEST), chunk)
        while window >= chunk:
            rows = 2 * window * (depth + tile) * dtype.itemsize
            if rows + depth * tile * (4 + 2 * dtype.itemsize) <= VMEM_BUDGET:
                return OuterCut(window, chunk, tile, cut.unit, cores)
            window -= chunk
    return None


def refusal(peers: int, rows: int, w_gate_NDF: jax.Array, num_local: int) -> str | None:
    """Return why these queues cannot be taken though `tpu_parallel` does, or None if they can.

    Args:
        peers: devices, each of which has a queue for each.
        rows: places of a queue.
        w_gate_NDF: gate matrices.
        num_local: experts of a device.
    """
    (D, F), dtype = w_gate_NDF.shape[-2:], w_gate_NDF.dtype
    cut = _fit(peers, rows, w_gate_NDF, num_local)
    reason = refusal_of_sizes(cut, D, num_local)
    if cut is not None and reason is None and _fit_outer(cut, D, F, dtype) is None:
        return f"tiles of the gradient of {D} x {F} matrices do not fit into VMEM"
    return reason


class Gradients(NamedTuple):
    """The gradients of one round.

    Attributes:
        dx_PRD, dgate_PR: by peer that the rows went to; places without a row are arbitrary.
        matrices: of gate and up [E, D, F] and down [E, F, D], in their dtype.
    """

    dx_PRD: jax.Array
    dgate_PR: jax.Array
    matrices: list[jax.Array]


def exchange_gradient(
    x_PRD: jax.Array,
    dy_PRD: jax.Array,
    gate_PR: jax.Array,
    expert_PR: jax.Array,
    w_gate_NDF: jax.Array,
    w_up_NDF: jax.Array,
    w_down_NFD: jax.Array,
    first: jax.Array,
    *,
    num_local: int,
    axes: str | tuple[str, ...],
) -> Gradients:
    """Return the gradients of `tpu_parallel.exchange_and_apply`.

    Args:
        x_PRD, gate_PR, expert_PR, w_gate_NDF, w_up_NDF, w_down_NFD, first: its arguments; places
            of x without a row are finite where the queue is not empty.
        dy_PRD: the gradient of its result, finite in the same places.
        num_local: experts of a device.
        axes: mesh axes.
    """
    (P, R, D), F = x_PRD.shape, w_gate_NDF.shape[2]
    mesh, cut = Mesh.of(axes), _fit(P, R, w_gate_NDF, num_local)
    assert cut is not None
    rest = ((0, 0), (0, tp.round_up(R, cut.unit) - R), (0, 0))
    x_PRD, dy_PRD = jnp.pad(x_PRD, rest), jnp.pad(dy_PRD, rest)
    labels = Labels.of(cut, mesh, first, gate_PR, expert_PR, num_local)
    weights = (w_gate_NDF, w_up_NDF, w_down_NFD)
    dx, dgate, *came = _exchange(x_PRD, dy_PRD, labels, weights, cut, mesh, num_local)
    dgate_PR = dgate[..., : cut.chunk].reshape(P, -1)[:, :R]
    x, dy, da, db, h = (a.reshape(-1, a.shape[2]) for a in came[:5])
    here = _Here(x, dy, da, db, h, came[5][:, 0, : num_local + 1])
    return Gradients(dx[:, :R], dgate_PR, _outer(here, cut, P, D, F))


def _exchange(
    x_PRD: jax.Array,
    dy_PRD: jax.Array,
    labels: Labels,
    weights: tuple[jax.Array, ...],
    cut: Cut,
    mesh: Mesh,
    num_local: int,
) -> list[jax.Array]:
    """Run the kernel. Returns dx, dgate, x and dy as they came, da, db, h, and their bounds."""
    (P, R, D), F, dtype, size = x_PRD.shape, weights[0].shape[2], x_PRD.dtype, x_PRD.dtype.itemsize
    in_hbm, in_smem = (pl.BlockSpec(memory_space=m) for m in (pl.ANY, pltpu.SMEM))
    window = cut.group * cut.rows
    held = expected_rows(P * R)
    readings = P // cut.group * (num_local + cut.windows - 1)
    outs = [
        (x_PRD.shape, dtype),
        (labels.gates.shape, jnp.float32),
        *[(x_PRD.shape, dtype)] * 2,
        *[((P, R, F), dtype)] * 3,
        (labels.bounds.shape, jnp.int32),
    ]
    semaphores = [(), (2,), (), (P,), (), (), (), (), (), (3, 2), (2,)]
    return pl.pallas_call(
        gradient_kernel(cut, num_local, F // cut.tile, mesh),
        grid=(cut.cores,),
        in_specs=[in_smem, *[in_hbm] * 7],
        out_specs=[in_hbm] * len(outs),
        out_shape=[backend.like(x_PRD, shape, kind) for shape, kind in outs],
        scratch_shapes=[
            *labels.buffers(cut, num_local),
            pltpu.VMEM((window, D), dtype),
            pltpu.VMEM((window, D), dtype),
            pltpu.VMEM((window, D), jnp.float32),
            pltpu.VMEM((window, LANES), jnp.float32),
            pltpu.VMEM((window, D), dtype),
            pltpu.VMEM(labels.gates.shape, jnp.float32),
            *tile_buffers(cut, D, dtype),
            *[pltpu.VMEM((2, window, cut.tile), dtype)] * 3,
            *[pltpu.SemaphoreType.DMA(shape) for shape in semaphores],
        ],
        compiler_params=compiler_params(mesh),
        cost_estimate=pl.CostEstimate(
            flops=10 * held * D * F,
            transcendentals=held * F,
            bytes_accessed=(readings * 3 * D * F + held * (7 * D + 3 * F)) * size,
            remote_bytes_transferred=3 * (P - 1) * held // P * D * size,
        ),
        interpret=backend.tpu_interpreter(),
        name="expert_mlp_exchange_gradient",
    )(labels.scalars, x_PRD, dy_PRD, labels.gates, labels.bounds, *weights)


class _Here(NamedTuple):
    """Rows [P * R, ...] on the device of their experts, by peer and in it by expert.

    Attributes:
        x, dy: as they came; finite in places without a row, up to a whole tile of memory.
        da, db, h: gradients of the products of x, and hidden rows; zero in these places.
        bounds: int32 [P, E + 1], where in its queue each expert's rows begin, and where all end.
    """

    x: jax.Array
    dy: jax.Array
    da: jax.Array
    db: jax.Array
    h: jax.Array
    bounds: jax.Array


def _outer(here: _Here, cut: Cut, peers: int, D: int, F: int) -> list[jax.Array]:
    """Sum over each expert's rows in float32: the gradients of its matrices, in their dtype."""
    E, dtype, held = here.bounds.shape[1] - 1, here.x.dtype, expected_rows(here.x.shape[0])
    outer_cut = _fit_outer(cut, D, F, dtype)
    assert outer_cut is not None
    readings = F // outer_cut.tile if held > E * outer_cut.window else 1
    if E == 1:
        blocks = _blocks_of_queues(here, outer_cut, peers)
    else:
        here, blocks = _sorted(here, outer_cut, peers)

    def one(left: jax.Array, right: jax.Array, *, is_transposed: bool = False) -> jax.Array:
        shape = (E, F, D) if is_transposed else (E, D, F)
        return grouped_outer_places(
            left,
            right,
            blocks,
            outer_cut,
            first=jnp.int32(0),
            num_experts=E,
            like=jax.ShapeDtypeStruct(shape, dtype),
            is_transposed=is_transposed,
            name="expert_mlp_exchange_weights",
            cost=pl.CostEstimate(
                flops=2 * held * D * F,
                transcendentals=0,
                bytes_accessed=(E * D * F + held * (readings * D + F)) * dtype.itemsize,
            ),
        )

    down = one(here.dy, here.h, is_transposed=True)
    return [one(here.x, here.da), one(here.x, here.db), down]


def _blocks_of_queues(here: _Here, cut: OuterCut, peers: int) -> tp.Blocks:
    """List blocks of one expert's rows, which begin where the queues do."""
    length = here.x.shape[0] // peers
    many = -(-length // cut.window)
    start = jnp.arange(many) * cut.window
    whole_P = -(-here.bounds[:, -1:] // cut.unit) * cut.unit
    rows = jnp.clip(whole_P - start, 0, cut.window)
    start = (jnp.arange(peers)[:, None] * length + start).reshape(-1)
    count = peers * many
    block = tp.Block(
        jnp.zeros_like(start), start, rows.reshape(-1), jnp.arange(count), jnp.full(count, count)
    )
    table = jnp.stack(block, axis=1).astype(jnp.int32).reshape(-1)
    return tp.Blocks(table, jnp.int32(count))


def _sorted(here: _Here, cut: OuterCut, peers: int) -> tuple[_Here, tp.Blocks]:
    """Bring the rows of each expert together."""
    length, E = here.x.shape[0] // peers, here.bounds.shape[1] - 1
    is_past = here.bounds[:, None, 1:] <= jnp.arange(length)[:, None]
    plan = tp.plan(is_past.sum(2, dtype=jnp.int32).reshape(-1), E, cut.unit)
    x, dy = (a[plan.source_P] for a in (here.x, here.dy))
    da, db, h = (
        jnp.where(plan.is_held_P[:, None], a[plan.source_P], 0) for a in (here.da, here.db, here.h)
    )
    blocks = tp.blocks(plan, cut.window, unit=cut.unit, every_expert=True)
    return _Here(x, dy, da, db, h, here.bounds), blocks
