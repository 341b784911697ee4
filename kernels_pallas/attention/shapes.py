"""Shapes of attention over as many keys as queries.

Numbers are drawn so that a query prefers a few keys strongly: outputs are then of the size of
single values wherever the query stands, and a block left out or read twice shows in the error.
Padding, which no query may see, is NaN.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

SHARPNESS = 3.0  # standard deviation of the logits


def triangle(n: int) -> int:
    """Return the pairs of n queries and n keys that a causal mask leaves."""
    return n * (n + 1) // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """A call of `chunked_attention` on as many queries as keys.

    Attributes:
        name: for the command line.
        B, T, N, K, H: rows, tokens, query heads, kv heads, head dimension.
        chunk_size: tokens in a chunk, None for no chunks.
        temperature: (floor, coefficient).
        segments: tokens of the segments packed into each row, each with positions from 0; one
            segment if empty.
        padding: tokens at the end of each row that are none.
        is_causal: False puts all tokens at one position, where they all see each other.
        return_lse: whether the log-sum-exp is asked for too, and the output in float32 with it.
        dtype: of q, k and v.
        has_gradient: whether its gradient is of interest; that of one token's softmax is rounding.
    """

    name: str
    B: int
    T: int
    N: int
    K: int
    H: int
    chunk_size: int | None = None
    temperature: tuple[int, float] | None = None
    segments: tuple[int, ...] = ()
    padding: int = 0
    is_causal: bool = True
    return_lse: bool = False
    dtype: str = "bfloat16"
    has_gradient: bool = True

    def __post_init__(self):
        """Check that the segments fill a row."""
        if sum(self.lengths) + self.padding != self.T:
            raise ValueError(
                f"segments {self.segments} and padding {self.padding} must add up to the {self.T} "
                "tokens of a row"
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the tokens of each segment of a row."""
        return self.segments or (self.T - self.padding,)

    @property
    def settings(self) -> dict:
        """Return the static arguments of the operation."""
        names = ("chunk_size", "temperature", "return_lse")
        return {name: getattr(self, name) for name in names}

    def positions(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return int32 positions [T] of a row, and its segments [T] if it is packed."""
        none = np.full(self.padding, -1, np.int32)
        runs = [np.arange(n, dtype=np.int32) * self.is_causal for n in self.lengths]
        positions_T = np.concatenate([*runs, none])
        if not self.segments:
            return positions_T, None
        segments_T = np.repeat(np.arange(len(runs), dtype=np.int32), self.lengths)
        return positions_T, np.concatenate([segments_T, none])

    def build(self, key: jax.Array) -> dict[str, jax.Array]:
        """Draw the arrays of the call, by the names of its arguments."""
        keys = jax.random.split(key, 3)
        heads = {"q_BTNH": self.N, "k_BSKH": self.K, "v_BSKH": self.K}
        arrays = {
            name: jax.random.normal(each, (self.B, self.T, n, self.H)).astype(self.dtype)
            for each, (name, n) in zip(keys, heads.items(), strict=True)
        }
        arrays["q_BTNH"] *= jnp.asarray(SHARPNESS, self.dtype)
        positions_T, segments_T = self.positions()
        if self.padding:
            real_T = jnp.asarray(positions_T >= 0)[:, None, None]
            arrays = {name: jnp.where(real_T, x, jnp.nan) for name, x in arrays.items()}
        marks = {"positions": positions_T} | (
            {} if segments_T is None else {"segments": segments_T}
        )
        for what, marks_T in marks.items():
            marks_BT = jnp.broadcast_to(jnp.asarray(marks_T), (self.B, self.T))
            arrays |= {f"q_{what}_BT": marks_BT, f"kv_{what}_BS": marks_BT}
        return arrays

    def pairs(self) -> int:
        """Return how many pairs of a query and a key the mask leaves, over all rows."""
        if not self.is_causal:
            return self.B * sum(n * n for n in self.lengths)
        chunk = self.chunk_size or self.T
        of_row = sum(n // chunk * triangle(chunk) + triangle(n % chunk) for n in self.lengths)
        return self.B * of_row

    def flops(self, *, backward: bool = False) -> int:
        """Return the FLOPs of the products of visible pairs: two going forward, five back."""
        return (10 if backward else 4) * self.H * self.N * self.pairs()

    def bytes(self, *, backward: bool = False) -> int:
        """Return the bytes of reading each array that is needed and writing each result, once."""
        q, kv, lse = self._row_bytes()
        if backward:  # q, out, dout, dq; k, v, dk, dv; log-sum-exp
            return self.B * self.T * (4 * q + 4 * kv + lse)
        return self.B * self.T * (2 * q + 2 * kv)

    def bytes_in_blocks(self, q_block: int) -> int:
        """Return the bytes of a forward pass that takes its queries block by block.

        Queries are read and outputs written once; each block of queries reads the keys and values
        that some query of it sees.
        """
        q, kv, _ = self._row_bytes()
        positions_T = self.positions()[0][: self.T - self.padding]
        starts_T = np.repeat(np.cumsum((0, *self.lengths[:-1])), self.lengths)
        first_T = starts_T + positions_T - positions_T % (self.chunk_size or 2**30)
        last_T = starts_T + positions_T
        if not self.is_causal:
            last_T = starts_T + np.repeat(self.lengths, self.lengths) - 1
        seen = sum(
            int(last_T[i : i + q_block].max() - first_T[i : i + q_block].min() + 1)
            for i in range(0, len(positions_T), q_block)
        )
        return self.B * (self.T * 2 * q + seen * 2 * kv)

    def _row_bytes(self) -> tuple[int, int, int]:
        """Return the bytes of one token in q, in k, and in the log-sum-exp."""
        width = jnp.dtype(self.dtype).itemsize
        return self.N * self.H * width, self.K * self.H * width, self.N * 4


_SCOUT = {"N": 40, "K": 8, "H": 128}  # Maverick's are the same
_NANO = {"N": 4, "K": 2, "H": 32}

ATTENTION = (
    Attention(name="scout_chunk_32k", B=1, T=32768, chunk_size=8192, **_SCOUT),
    Attention(name="scout_chunk_8k", B=1, T=8192, chunk_size=8192, **_SCOUT),
    Attention(name="scout_nope_32k", B=1, T=32768, temperature=(8192, 0.1), **_SCOUT),
    Attention(
        name="packed_8k", B=1, T=8192, chunk_size=8192, segments=(3000, 1700, 2492, 1000), **_SCOUT
    ),
    Attention(name="vision", B=4, T=577, N=16, K=16, H=88, is_causal=False),  # an image in 4 tiles
    Attention(name="nano_chunk", B=8, T=256, chunk_size=64, **_NANO),
    Attention(name="nano_nope", B=8, T=256, temperature=(512, 0.1), **_NANO),
)

# Of no model: everything that may differ does, small enough for any device.
ODD = (
    Attention(
        name="odd_88", B=2, T=577, N=6, K=3, H=88, chunk_size=200, padding=31, return_lse=True
    ),
    Attention(
        name="odd_packed", B=1, T=700, N=8, K=2, H=64, chunk_size=256, segments=(300, 9, 350),
        padding=41, temperature=(64, 0.1), return_lse=True,
    ),
    Attention(name="odd_256", B=1, T=333, N=4, K=4, H=256, return_lse=True),
    Attention(name="odd_1", B=1, T=1, N=4, K=1, H=128, has_gradient=False),
    Attention(name="odd_128", B=1, T=128, N=2, K=2, H=64),
    Attention(name="odd_2048", B=1, T=2048, N=2, K=1, H=128),
    Attention(name="odd_blind", B=1, T=512, N=2, K=1, H=128, padding=300),  # rows that see nothing
)  # fmt: skip
