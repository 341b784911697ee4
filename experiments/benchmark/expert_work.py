"""What the schedules of experts multiply and copy, counted from who goes where, not by the kernels.

The kernels are asked only which sizes they chose. Rows are counted as they are multiplied: in whole
chunks on TPUs, in tiles of 64 on GPUs, so that FLOPs exceed those of the rows themselves by about
half a chunk for each expert that is hit. What XLA does around the kernels is counted too: it brings
rows to their experts and back.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.schedule import Work
from kernels_pallas.experts import tpu_outer, tpu_rows
from kernels_pallas.experts.dispatch import most_units
from kernels_pallas.experts.tpu_blocks import BlockSizes
from kernels_pallas.shapes import Experts

LANES = 128  # numbers beside a row that a kernel reads as one
GPU_TILE = 64  # rows that a warpgroup multiplies
GPU_FEW = 256  # rows up to which a block has one such tile instead of two
GPU_TOGETHER = 16  # blocks of an expert that read columns of its matrices in turn, through L2
MEGABLOX_TILES = (512, 1024, 1024)  # rows, input channels, columns: MaxText's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """A kernel that takes rows through matrices.

    Attributes:
      depth, width: columns of its rows and of its results.
      matrices: of an expert.
      operation: under which it looks up its sizes.
      beside: whether it keeps a number for each row, too.
      tiles: bytes of an entry of the arrays of its width that are read along.
      outs: bytes of an entry of each array that it writes.
    """

    depth: int
    width: int
    matrices: int
    operation: str
    beside: bool = False
    tiles: tuple[int, ...] = ()
    outs: tuple[int, ...]


def width_of(shape: Experts) -> int:
    """Return the bytes of a number of a token."""
    return jnp.dtype(shape.dtype).itemsize


def products(shape: Experts, direction: str) -> list[Product]:
    """List the kernels on rows that the TPU backend runs in a pass."""
    D, F, size = shape.D, shape.F, width_of(shape)
    if direction == "forward":
        return [
            Product(depth=D, width=F, matrices=2, operation="forward", beside=True, outs=(size,)),
            Product(depth=F, width=D, matrices=1, operation="forward", outs=(size,)),
        ]
    return [
        Product(
            depth=D, width=F, matrices=1, operation="backward_hidden", beside=True,
            tiles=(size,) * 2, outs=(size,) * 3,
        ),
        Product(depth=F, width=D, matrices=1, operation="backward_tokens", outs=(4,)),
        Product(
            depth=F, width=D, matrices=1, operation="backward_tokens", tiles=(4,), outs=(size,)
        ),
    ]  # fmt: skip


def _row_sizes(shape: Experts, of: Product) -> BlockSizes | None:
    """Ask which sizes the kernel takes; on the device of the mesh in force."""
    array: Any = jax.ShapeDtypeStruct
    is_transposed = of.operation != "forward"
    halves = 2 if shape.stored == "int4" else 1
    stored = {"float": shape.dtype, "fp8": "float8_e4m3fn"}.get(shape.stored, "int8")
    sides = (of.width, of.depth) if is_transposed else (of.depth // halves, of.width)
    w = array((shape.E, *sides), stored)
    scales = None
    if shape.stored != "float":
        groups = (of.depth // LANES,) if shape.stored == "int4" else ()
        scales = [array((shape.E, *groups, of.width), jnp.float32)] * of.matrices
    by = tpu_rows.Matrices(
        [w] * of.matrices, scales, is_transposed, shape.stored, array((), "int32")
    )
    of_bytes = {width_of(shape): shape.dtype, 4: "float32"}
    rows = tpu_rows.RowOperands(
        [array((1, of.depth), shape.dtype)],
        array((1, LANES), jnp.float32) if of.beside else None,
        [array((1, of.width), of_bytes[size]) for size in of.tiles],
    )
    outs = [jnp.dtype(of_bytes[size]) for size in of.outs]
    return tpu_rows.row_sizes(of.operation, rows, by, outs, shape.T * shape.X, shape.E)


def _blocks(sizes_E: np.ndarray, size: int) -> list[list[int]]:
    """Cut the rows of each expert that has some into blocks."""
    return [[min(size, n - at) for at in range(0, n, size)] for n in sizes_E.tolist() if n]


def _chunked(blocks: list[list[int]], chunk: int) -> int:
    """Return the rows that are multiplied: whole chunks of each block."""
    return sum(-(-rows // chunk) * chunk for each in blocks for rows in each)


def tpu_work(shape: Experts, direction: str) -> Work | None:
    """Count the TPU kernels and what XLA does around them; see `schedule.Work`.

    Widths are filled up to whole lanes.
    """
    needed = shape.bytes(backward=direction == "backward")
    D, F = (-(-n // LANES) * LANES for n in (shape.D, shape.F))
    copied = 0 if (D, F) == (shape.D, shape.F) else shape.E * shape.matrices_bytes()
    shape = dataclasses.replace(shape, D=D, F=F)
    size, R = width_of(shape), shape.T * shape.X
    unit = 32 // size
    sizes_E = -(-shape.sizes() // unit) * unit
    flops = traffic = 0
    texts = []
    steps: dict[str, tuple[int, ...]] = {}
    for of in products(shape, direction):
        sizes = _row_sizes(shape, of)
        if sizes is None:
            return None
        blocks = _blocks(sizes_E, sizes.block)
        flops += 2 * of.matrices * of.depth * of.width * _chunked(blocks, sizes.chunk)
        share = of.matrices * shape.matrices_bytes() // 3
        of_row = sizes.cores * (of.depth * size + 4 * LANES * of.beside)
        of_row += of.width * sum((*of.tiles, *of.outs))
        traffic += sum(map(len, blocks)) * share + int(sizes_E.sum()) * of_row
        texts.append(f"{sizes.block}x{sizes.tile}/{sizes.chunk}")
        kernel = f"expert_mlp_{of.operation}"
        steps[kernel] = (*steps.get(kernel, ()), share * sizes.tile // of.width)
    if direction == "backward":
        outer = _outer_work(shape, sizes_E)
        if outer is None:
            return None
        flops, traffic = flops + outer[0], traffic + outer[1]
        texts.append(outer[2])
    around = _around(shape, direction, most_units(R, shape.E, unit) * unit) + 2 * copied
    return Work(
        flops=flops,
        bytes=traffic + around,
        needed=needed,
        around=around,
        blocks=" ".join(dict.fromkeys(texts)),
        steps=steps,
    )


def _around(shape: Experts, direction: str, places: int) -> int:
    """Count what XLA moves around the TPU kernels, an operation at a time.

    Forward tokens are gathered into places, gates written beside them, results gathered back and
    those of no expert set to zero. Backward so are the gradient of the result, and tokens, which
    are then multiplied with gates; of the gradient of those come that of tokens and, with the
    tokens themselves, that of gates.
    """
    row = shape.D * width_of(shape)
    tokens, rows, gates = shape.T * row, shape.T * shape.X * row, places * 4 * LANES
    if direction == "forward":
        return 2 * places * row + gates + 3 * rows + tokens * (2 if shape.has_shared else 1)
    return 6 * places * row + gates + 3 * rows + 2 * tokens


def _outer_work(shape: Experts, sizes_E: np.ndarray) -> tuple[int, int, str] | None:
    """Count the three gradients of matrices: FLOPs, bytes, sizes."""
    D, F, size = shape.D, shape.F, width_of(shape)
    array: Any = jax.ShapeDtypeStruct
    x, dy = array((1, D), shape.dtype), array((1, F), shape.dtype)
    sizes = tpu_outer.outer_sizes(x, dy, shape.T * shape.X, shape.E)
    if sizes is None:
        return None
    blocks, steps = _blocks(sizes_E, sizes.block), F // (sizes.tile * sizes.cores)
    # The rows of x stay while tiles follow each other, unless an expert has several blocks of them.
    readings = sum(sum(each) * (1 if len(each) == 1 else steps) for each in blocks)
    traffic = size * (sizes.cores * readings * D + int(sizes_E.sum()) * F + shape.E * D * F)
    flops = 2 * D * F * _chunked(blocks, sizes.chunk)
    return 3 * flops, 3 * traffic, f"{sizes.block}x{sizes.tile}/{sizes.chunk}"


def gpu_work(shape: Experts, direction: str) -> Work:
    """Count the GPU kernels.

    A row is counted once for each run of blocks that takes turns at the columns of an expert's
    matrices, and so are those: the L2 cache serves the others.
    """
    D, F, size = shape.D, shape.F, width_of(shape)
    sizes_E = shape.sizes()
    is_backward = direction == "backward"
    groups = 1 if shape.T * shape.X <= GPU_FEW and not is_backward else 2
    blocks = _blocks(sizes_E, groups * GPU_TILE)
    tiles = _chunked(blocks, GPU_TILE)
    runs = sum(-(-len(each) // GPU_TOGETHER) for each in blocks)
    R = int(sizes_E.sum())
    traffic = runs * shape.matrices_bytes()
    if is_backward:
        # dy, a, b, da, db, hidden; da, db, dx; then x, da, db and hidden, dy for the matrices.
        traffic += R * size * (D + 5 * F + 2 * F + D + D + 2 * F + F + D)
        traffic += shape.E * shape.matrices_bytes()
    else:
        traffic += R * size * (D + 2 * F + D)
    around = (3 if is_backward else 2) * 2 * R * D * size
    return Work(
        flops=(12 if is_backward else 6) * D * F * tiles,
        bytes=traffic + around,
        needed=shape.bytes(backward=is_backward),
        around=around,
        blocks=f"{groups * GPU_TILE}",
    )


def expert_work(
    shape: Experts, direction: str, platform: str, found: Mapping[str, Any]
) -> Work | None:
    """Count a pass of `expert_mlp`; see `schedule.attention_work`."""
    if not any(name.startswith("expert_mlp.") for name in found):
        return None
    return gpu_work(shape, direction) if platform == "gpu" else tpu_work(shape, direction)


def megablox_work(shape: Experts, direction: str) -> Work | None:
    """Count megablox' grouped products, which walk over tiles of all sorted rows.

    A tile of rows is visited once for each expert that has some of it, and reads those of its
    matrix anew: with several steps along the sum no two visits have a tile of it in common.
    """
    if direction == "backward":
        return None
    size, R = width_of(shape), shape.T * shape.X
    most, deep, wide = MEGABLOX_TILES
    rows = min(most, -(-R // 16) * 16)
    ends_E = np.cumsum(shape.sizes())
    visits = [
        (expert, tile)
        for expert, (end, n) in enumerate(zip(ends_E, shape.sizes(), strict=True))
        for tile in range((end - n) // rows, -(-end // rows) if n else 0)
    ]
    flops = traffic = 0
    for depth, width in ((shape.D, shape.F),) * 2 + ((shape.F, shape.D),):
        steps, columns = -(-depth // deep), -(-width // wide)
        lefts, rights = len(visits), len(visits)
        if steps == 1:
            lefts = len({tile for _, tile in visits})
            rights = len({expert for expert, _ in visits})
        flops += 2 * len(visits) * rows * steps * deep * columns * wide
        traffic += size * (columns * lefts * rows * depth + rights * depth * width)
        traffic += size * -(-R // rows) * rows * width
    # Rows times gates, the product of the two sides, and results added to tokens.
    traffic += size * (2 * R * shape.D + 3 * R * shape.F + R * shape.D + 2 * shape.T * shape.D)
    return Work(
        flops=flops,
        bytes=traffic,
        needed=shape.bytes(),
        blocks="x".join(map(str, (rows, deep, wide))),
    )
