"""What a schedule of blocks multiplies and copies, counted from the positions, not by the kernel.

A kernel's own cost estimate is an assertion. Here the blocks that some query may see are counted on
the host from the same summaries that the kernel reads, for the block sizes that it looked up.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import visibility
from kernels_pallas.shapes import Attention, Decode, Prefill

# Rows that a block of threads of the GPU kernels owns; they are no choice of the tuning table.
GPU_ROWS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a pass does.

    Attributes:
      flops: of the products of whole blocks.
      bytes: to and from memory. Query heads that share keys share copies of them on TPUs; on GPUs
        each copies for itself, and the cache between has most of it.
      needed: the bytes if every block of queries read the keys it needs and no others. Of a
        backward pass this is not defined, and the bytes of its blocks stand for it.
      blocks: the sizes, for the table.
      around: of the bytes, those that XLA moves before, between and after the kernels.
      steps: bytes that one step of a TPU kernel copies, of each that has a name, in their order.
    """

    flops: int
    bytes: int
    needed: int
    blocks: str
    around: int = 0
    steps: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """One kernel of attention.

    Attributes:
      operations: under which the TPU's and the GPU's look up their block sizes.
      owner: "q" if a program keeps a block of queries and walks over keys, or "kv".
      products: matrix products of a pair of blocks.
      owned: arrays of the owner's size that are read or written once.
      walked: arrays of the other side that are read for each pair of blocks.
    """

    operations: tuple[str, ...]
    owner: str
    products: int
    owned: int
    walked: int


# Forward: q, out against k, v. Backward: q, dout, dq, and out and dout once more for their product,
# against k, v; then k, v, dk, dv against q, dout.
FORWARD = (
    Walk(operations=("chunked_attention.forward",), owner="q", products=2, owned=2, walked=2),
)
BACKWARD = (
    Walk(
        operations=("chunked_attention.backward_dq", "chunked_attention.dq"),
        owner="q", products=3, owned=5, walked=2,
    ),
    Walk(
        operations=("chunked_attention.backward_dkv", "chunked_attention.dkv"),
        owner="kv", products=4, owned=4, walked=2,
    ),
)  # fmt: skip


def fitted(n: int, size: int) -> int:
    """Return the block size that cuts n tokens evenly into blocks of about a size."""
    return -(-n // max(1, round(n / size)))


def blocks_that_meet(
    positions_T: np.ndarray,
    segments_T: np.ndarray | None,
    chunk_size: int | None,
    q_block: int,
    kv_block: int,
) -> tuple[jax.Array, jax.Array]:
    """Return which blocks of queries and keys of a row may see each other, and which do wholly.

    Both are [blocks of queries, blocks of keys], of the summaries that the kernels read.
    """
    positions_BT = jnp.asarray(positions_T)[None]
    segments_BT = None if segments_T is None else jnp.asarray(segments_T)[None]
    none = jnp.zeros((1, len(positions_T), 1, 1))
    x = visibility.Inputs(none, none, none, positions_BT, positions_BT, segments_BT, segments_BT)
    q, kv = visibility.summarize(x, chunk_size, q_block, kv_block)
    rows = jax.tree.map(lambda field: field[0, :, None], q)
    columns = jax.tree.map(lambda field: field[0, None, :], kv)
    return visibility.may_see(rows, columns), visibility.sees_all(rows, columns)


def pairs_of_blocks(shape: Attention, q_block: int, kv_block: int) -> int:
    """Count the pairs of a block of queries and one of keys that may see each other."""
    met, _ = blocks_that_meet(*shape.positions(), shape.chunk_size, q_block, kv_block)
    return shape.B * int(met.sum())


def attention_work(
    shape: Attention, direction: str, platform: str, found: Mapping[str, Any]
) -> Work | None:
    """Count chunked attention.

    Args:
      shape: the call.
      direction: "forward" or "backward".
      platform: "tpu" or "gpu".
      found: block sizes by operation, as `tuning.recorded` collects them.
    """
    width = jnp.dtype(shape.dtype).itemsize
    q_bytes, kv_bytes = shape.N * shape.H * width, shape.K * shape.H * width  # of one token
    copied_bytes = q_bytes if platform == "gpu" else kv_bytes
    flops = traffic = q_block = kv_block = 0
    texts = []
    for walk in FORWARD if direction == "forward" else BACKWARD:
        name = next((name for name in walk.operations if name in found), None)
        if name is None:
            return None
        sizes = found[name]["blocks"]
        if platform == "gpu":
            rows = GPU_ROWS if shape.H <= 128 or walk.owner == "kv" else GPU_ROWS // 2
            q_block, kv_block = sizes.get("q_block", rows), sizes.get("kv_block", GPU_ROWS)
        else:
            q_block, kv_block = fitted(shape.T, sizes["q"]), fitted(shape.T, sizes["kv"])
        pairs = pairs_of_blocks(shape, q_block, kv_block)
        flops += 2 * walk.products * shape.H * shape.N * pairs * q_block * kv_block
        mine, others, other_block = q_bytes, copied_bytes, kv_block
        if walk.owner == "kv":
            mine, others, other_block = kv_bytes, q_bytes, q_block
        traffic += (
            walk.owned * shape.B * shape.T * mine + walk.walked * pairs * other_block * others
        )
        texts.append(f"{q_block}x{kv_block}")
    needed, steps = traffic, {}
    if direction == "forward":
        sharing = dataclasses.replace(shape, K=shape.N) if platform == "gpu" else shape
        needed = sharing.bytes_in_blocks(q_block)
        steps = {"chunked_attention_forward": (2 * kv_block * shape.H * width,)}
    return Work(flops=flops, bytes=traffic, needed=needed, blocks=" ".join(texts), steps=steps)


def _itemsize(shape: Decode | Prefill) -> int:
    return jnp.dtype(shape.dtype).itemsize


def decode_work(
    shape: Decode, direction: str, platform: str, found: Mapping[str, Any]
) -> Work | None:
    """Count decode attention; see `attention_work`."""
    del direction, platform
    if "decode_attention" not in found:
        return None
    kv_block = min(found["decode_attention"]["blocks"]["kv"], shape.page_size or shape.S)
    return Work(
        flops=shape.flops(),
        bytes=shape.bytes(kv_block),
        needed=shape.bytes(),
        blocks=str(kv_block),
        steps={"decode_attention": (2 * kv_block * shape.K * shape.H * _itemsize(shape),)},
    )


def prefill_work(
    shape: Prefill, direction: str, platform: str, found: Mapping[str, Any]
) -> Work | None:
    """Count prefill attention; see `attention_work`."""
    del direction
    if "prefill_attention" not in found:
        return None
    sizes = found["prefill_attention"]["blocks"]
    rows = GPU_ROWS if shape.H <= 128 else GPU_ROWS // 2
    q_block, kv_block = min(sizes.get("q", rows), shape.T), sizes.get("kv", sizes.get("kv_block"))
    visits = sum(
        -(-end // kv_block) - begin // kv_block for begin, end in shape.blocks_seen(q_block)
    )
    shared = shape if platform == "tpu" else dataclasses.replace(shape, K=shape.N)
    return Work(
        flops=4 * shape.H * shape.N * visits * q_block * kv_block,
        bytes=shared.bytes_in_blocks(q_block, kv_block),
        needed=shared.bytes_in_blocks(q_block),
        blocks=f"{q_block}x{kv_block}",
        steps={"prefill_attention": (2 * kv_block * shape.H * _itemsize(shape),)},
    )
