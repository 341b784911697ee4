"""How many queries and keys TPU kernels of attention take at a time: what VMEM holds of them."""

from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl

from kernels_pallas import backend, chips, tuning
from kernels_pallas.attention.visibility import Inputs
from kernels_pallas.tpu_primitives import LANES, round_up

VMEM_LIMIT = chips.LEAST_VMEM - 16 * 2**20  # the compiler has the rest
KV_BLOCK = 512
SMEM_BUDGET = chips.TPU7X.smem * 3 // 4  # every TPU has as much


class Shape(NamedTuple):
    """The sizes of one call, and of the blocks it is cut into."""

    B: int
    T: int
    S: int
    K: int
    G: int
    H: int
    bq: int
    bkv: int

    @property
    def nq(self) -> int:
        """Return how many blocks of queries there are."""
        return pl.cdiv(self.T, self.bq)

    @property
    def nkv(self) -> int:
        """Return how many blocks of keys there are."""
        return pl.cdiv(self.S, self.bkv)


class Holds(NamedTuple):
    """How many blocks a program has in VMEM, those that are copied ahead too.

    Attributes:
        queries, keys: [G, bq, H] and [bkv, H] in the dtype of the arrays.
        query_sums, key_sums: the same in float32; an output may be float32, whatever the arrays.
        rows: [G, bq, 128] in float32.
    """

    queries: int
    keys: int
    query_sums: int
    key_sums: int
    rows: int

    def bytes(self, s: Any, itemsize: int) -> int:
        """Return what they take, with columns of marks and the logits of two heads."""
        H = round_up(s.H, LANES)
        of_queries = H * (self.queries * itemsize + 4 * self.query_sums) + 4 * LANES * self.rows
        of_keys = H * (self.keys * itemsize + 4 * self.key_sums)
        marks = 4 * LANES * 4 * max(s.bq, s.bkv)
        return s.G * s.bq * of_queries + s.bkv * of_keys + marks + 4 * 4 * s.bq * s.bkv


class Programs(NamedTuple):
    """Whose row and block of queries is that of program [b, h, i] of [parts * B, K, blocks].

    Where heads and rows are an odd number, which two cores of a TPU cannot share, the blocks of
    each are cut into parts, which take turns at them, so that all see as much.
    """

    B: int
    blocks: int
    parts: int

    @staticmethod
    def of(s: Any) -> "Programs":
        """Cut into as many parts as there are cores, if blocks can be shared and rows cannot."""
        blocks, cores = pl.cdiv(s.T, s.bq), backend.num_cores()
        parts = 1 if s.B * s.K % cores == 0 or blocks % cores else cores
        return Programs(s.B, blocks // parts, parts)

    def row(self, b: Any) -> Any:
        """Return the row of the batch."""
        return b if self.parts == 1 else jax.lax.rem(b, self.B)

    def block(self, b: Any, i: Any) -> Any:
        """Return the block of queries."""
        return i if self.parts == 1 else i * self.parts + jax.lax.div(b, self.B)


def fit(n: int, size: int, tile: int) -> int:
    """Return the block size, or all of n if that is not much more."""
    return round_up(n if n <= 1.5 * size else size, tile)


def cut(x: Inputs, operation: str, *, q_tile: int, kv_tile: int, holds: Holds) -> Shape:
    """Choose the blocks: those measured, or the usual ones, fitted to T, S and VMEM."""
    (B, T, N, H), (S, K) = x.q_BTNH.shape, x.k_BSKH.shape[1:3]
    sizes = tuning.lookup(
        f"chunked_attention.{operation}",
        {"q": query_block(N // K), "kv": KV_BLOCK},
        head_dim=H,
        group=N // K,
        dtype=str(x.q_BTNH.dtype),
    )
    bq, bkv = fit(T, sizes["q"], q_tile), fit(S, sizes["kv"], kv_tile)
    shape = Shape(B, T, S, K, N // K, H, bq, bkv)
    return fit_vmem(shape, holds, x.q_BTNH.dtype.itemsize, q_tile)


def fit_vmem(s: Any, holds: Holds, itemsize: int, q_tile: int) -> Any:
    """Take fewer queries at a time until VMEM holds them, or there are no fewer."""
    while holds.bytes(s, itemsize) > VMEM_LIMIT and s.bq > q_tile:
        s = s._replace(bq=round_up(s.bq // 2, q_tile))
    return s


def vmem_reason(s: Any, holds: Holds, itemsize: int) -> str | None:
    """Return why a program cannot hold its blocks, or None if it can."""
    needed = holds.bytes(s, itemsize)
    if needed <= VMEM_LIMIT:
        return None
    return (
        f"{s.bq} queries of {s.G} heads of {s.H} take {needed} bytes of VMEM, over {VMEM_LIMIT}; "
        "shard the heads of queries, or take a smaller dtype"
    )


def query_block(group: int) -> int:
    """Return how many queries make a block: with all heads of a group, some thousands of rows."""
    per_head = max(4096 // group, 1)
    return max(128, min(512, 1 << (per_head.bit_length() - 1)))


def scalar_bytes(s: Shape) -> int:
    """Return how much SMEM the summaries of one batch row take; rows come in eights."""
    return 8 * 4 * (s.nq + s.nkv)
