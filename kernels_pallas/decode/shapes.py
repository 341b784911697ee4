"""Shapes of decode attention, a few queries against a cache.

Numbers are drawn as those of `attention.shapes`. Slots past a row's length, which no query may see,
are NaN where the dtype has one.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kernels_pallas.attention.shapes import SHARPNESS

_DRAWN = 1 << 20  # numbers drawn at a time; a cache may be half of the memory


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
        return 2 * slots * self._slot_bytes() + self._query_bytes()

    def _slot_bytes(self) -> int:
        """Return the bytes of the keys, or of the values, of a slot."""
        return self.K * (self.H * jnp.dtype(self.dtype).itemsize + 4 * (self.dtype == "int8"))

    def _query_bytes(self) -> int:
        """Return the bytes of queries and outputs."""
        return 2 * self.B * self.T * self.N * self.H * (4 if self.dtype == "float32" else 2)


DECODE = (
    Decode(name="scout_decode_8k_b16", B=16, S=8192),
    Decode(name="scout_decode_128k", S=131_072),
    Decode(name="scout_decode_1m", S=1_048_576),
    Decode(name="scout_decode_1m_int8", S=1_048_576, dtype="int8"),
    Decode(name="scout_decode_1m_fp8", S=1_048_576, dtype="float8_e4m3fn"),
    Decode(name="scout_decode_1m_verify", S=1_048_576, T=5),
    Decode(name="scout_decode_1m_paged", S=1_048_576, page_size=256),
    Decode(name="scout_decode_10m", S=10_485_760),
    Decode(name="nano_decode", B=8, S=512, N=4, K=2, H=32, temperature=(512, 0.1)),
)

# Of no model: everything that may differ does, small enough for any device.
ODD = (
    Decode(
        name="odd_decode", B=3, S=1000, T=3, N=6, K=2, H=64, lengths=(1000, 515, 3),
        chunk_size=256, temperature=(64, 0.1), return_lse=True,
    ),
    Decode(name="odd_decode_1", S=72, N=2, K=1, H=64),
    Decode(name="odd_decode_32", B=2, S=512, N=10, K=2, lengths=(301, 33), page_size=32),
    Decode(
        name="odd_decode_fp8", B=2, S=1024, T=8, N=10, K=2, dtype="float8_e4m3fn",
        lengths=(700, 33), page_size=128, return_lse=True,
    ),
    Decode(
        name="odd_decode_int8", B=2, S=1024, T=2, N=10, K=2, dtype="int8",
        lengths=(1024, 200), page_size=128, return_lse=True,
    ),
)  # fmt: skip
