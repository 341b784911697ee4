"""Shapes of attention, over as many keys as queries and against a cache.

Numbers are drawn so that a query prefers a few keys strongly: outputs are then of the size of
single values wherever the query stands, and a block left out or read twice shows in the error. What
no query may see, padding and slots past a row's length, is NaN where the dtype has one.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

SHARPNESS = 3.0  # standard deviation of the logits
_DRAWN = 1 << 20  # numbers drawn at a time; a cache may be half of the memory


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """A call of `decode_attention` on a cache that is stored with heads before slots.

    Attributes:
        name: for the command line.
        B, S, T, N, K, H: rows, slots of a row, new tokens, query heads, kv heads, head dimension.
        dtype: of the cache. int8 comes with a scale for each token and head, float8_e4m3fn with
            one for each channel. Queries are bfloat16 unless the cache is float32.
        lengths: slots of each row that hold a token; all of them if empty.
        page_size: slots of a page; None is a cache without pages.
        chunk_size, temperature, return_lse: as `decode_attention` takes them.
    """

    name: str
    B: int = 1
    S: int
    T: int = 1
    N: int = 40
    K: int = 8
    H: int = 128
    dtype: str = "bfloat16"
    lengths: tuple[int, ...] = ()
    page_size: int | None = None
    chunk_size: int | None = None
    temperature: tuple[int, float] | None = (8192, 0.1)
    return_lse: bool = False

    def __post_init__(self):
        """Check that every row has a length, and that pages are whole."""
        if self.lengths and (len(self.lengths) != self.B or max(self.lengths) > self.S):
            raise ValueError(f"lengths {self.lengths} must be {self.B}, none over {self.S}")
        if self.page_size is not None and self.S % self.page_size:
            raise ValueError(f"pages of {self.page_size} slots must divide the {self.S} of a row")

    @property
    def settings(self) -> dict:
        """Return the static arguments of the operation."""
        names = ("chunk_size", "temperature", "return_lse")
        return {name: getattr(self, name) for name in names}

    def build(self, key: jax.Array) -> dict[str, jax.Array]:
        """Draw the arrays of the call as they are stored; see `arguments`."""
        keys = jax.random.split(key, 6)
        q_dtype = "float32" if self.dtype == "float32" else "bfloat16"
        q_BTNH = SHARPNESS * jax.random.normal(keys[0], (self.B, self.T, self.N, self.H))
        lengths_B = jnp.asarray(self.lengths or (self.S,) * self.B, jnp.int32)
        rows, slots = self._rows()
        pages = jnp.arange(rows, dtype=jnp.int32)
        if self.page_size is not None:
            pages = jax.random.permutation(keys[5], pages)
        cache = [self._cache(each, pages, lengths_B) for each in keys[1:3]]
        arrays = {
            "q_BTNH": q_BTNH.astype(q_dtype),
            "k_BKSH": cache[0],
            "v_BKSH": cache[1],
            "lengths_B": lengths_B,
            "q_positions_BT": lengths_B[:, None] - self.T + jnp.arange(self.T),
        }
        for name, each in (("k_scale", keys[3]), ("v_scale", keys[4])):
            if self.dtype == "int8":
                scale_BKS = jax.random.uniform(each, (rows, self.K, slots), minval=0.5) / 32
                arrays[f"{name}_BKS"] = scale_BKS
            elif self.dtype == "float8_e4m3fn":
                arrays[name] = jax.random.uniform(each, (self.K, self.H), minval=0.5)
        if self.page_size is not None:
            arrays["page_table_BP"] = pages.reshape(self.B, -1)
        return arrays

    @staticmethod
    def arguments(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Return the arguments of the call from stored arrays: heads come before slots in those.

        Call it inside of the program, where the swap back cancels this one.
        """
        names = {
            "k_BKSH": "k_BSKH",
            "v_BKSH": "v_BSKH",
            "k_scale_BKS": "k_scale",
            "v_scale_BKS": "v_scale",
        }
        return {
            names.get(name, name): x.swapaxes(1, 2) if name in names else x
            for name, x in arrays.items()
        }

    def _rows(self) -> tuple[int, int]:
        """Return the leading dimension of the cache and the slots of each of its rows."""
        if self.page_size is None:
            return self.B, self.S
        return self.B * (self.S // self.page_size), self.page_size

    def _cache(self, key: jax.Array, pages: jax.Array, lengths_B: jax.Array) -> jax.Array:
        rows, slots = self._rows()
        shape = (rows, self.K, slots, self.H)
        drawn = math.gcd(math.prod(shape), _DRAWN)

        def draw(i: jax.Array) -> jax.Array:
            numbers = jax.random.normal(jax.random.fold_in(key, i), (drawn,))
            if self.dtype == "int8":
                numbers = jnp.round(numbers * 32).clip(-127, 127)
            return numbers.astype(self.dtype)

        cache = jax.lax.map(draw, jnp.arange(math.prod(shape) // drawn)).reshape(shape)
        if self.lengths and self.dtype != "int8":
            first_R = jnp.argsort(pages) * slots  # slot of its row, rows one after the other
            slot_RS = first_R[:, None] % self.S + jnp.arange(slots)
            held_RS = slot_RS < lengths_B[first_R // self.S][:, None]
            cache = jnp.where(held_RS[:, None, :, None], cache, jnp.asarray(jnp.nan, cache.dtype))
        return cache

    def _visible(self, length: int) -> list[int]:
        """Return how many slots each query of a row sees."""
        positions = range(length - self.T, length)
        return [(p % self.chunk_size if self.chunk_size else p) + 1 for p in positions]

    def pairs(self) -> int:
        """Return how many pairs of a query and a slot there are, over all rows."""
        return sum(sum(self._visible(n)) for n in self.lengths or (self.S,) * self.B)

    def flops(self) -> int:
        """Return the FLOPs of the two products of visible pairs."""
        return 4 * self.H * self.N * self.pairs()

    def bytes(self, kv_block: int = 1) -> int:
        """Return the bytes of reading the slots seen, with q and the output.

        Args:
            kv_block: slots that are read together, or not at all.
        """
        slots = 0
        for length in self.lengths or (self.S,) * self.B:
            begin = length - self.T + 1 - self._visible(length)[0]
            slots += -(-length // kv_block) * kv_block - begin // kv_block * kv_block
        of_slot = self.K * (self.H * jnp.dtype(self.dtype).itemsize + 4 * (self.dtype == "int8"))
        q_width = 4 if self.dtype == "float32" else 2
        return 2 * slots * of_slot + 2 * self.B * self.T * self.N * self.H * q_width
