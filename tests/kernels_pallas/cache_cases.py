"""Problems of attention to a cache, with their answers by definition: for decode and prefill."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from tests.kernels_pallas import definition

# float32: sums of a few hundred terms. bfloat16: results and probabilities rounded to 8 bits beside
# values of about 4.
TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One problem: a row for each length; slots that nobody sees hold garbage.

    Attributes:
      name: what it shows.
      lengths: of the cached rows.
      queries: T; the last of them stands at the last token of its row, unless `ahead` moves it.
      padding: queries at the end of each row that are none; the others stand before the last token.
      starts: position of slot 0 of each row.
      stored: dtype of the cache; None is that of the queries.
      scales: "channel", "token" or None.
      page: slots of a page, or None for no page table.
    """

    name: str
    lengths: tuple[int, ...]
    queries: int = 1
    padding: tuple[int, ...] | None = None
    slots: int = 304
    starts: tuple[int, ...] | None = None
    ahead: int = 0
    chunk: int | None = None
    temperature: tuple[int, float] | None = None
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    stored: str | None = None
    scales: str | None = None
    page: int | None = None

    def build(self, dtype):
        """Arguments of the operation, and (out, lse) by definition."""
        rng = np.random.default_rng(1)
        B, T, S, N, K, H = (
            len(self.lengths), self.queries, self.slots, self.heads, self.kv_heads, self.head_dim
        )  # fmt: skip
        starts = np.array(self.starts or (0,) * B, np.int32)
        lengths = np.array(self.lengths, np.int32)
        order = np.arange(T, dtype=np.int32) + np.array(self.padding or (0,) * B)[:, None]
        positions = (starts + lengths - T + self.ahead)[:, None] + order
        positions = np.where(order < T, np.maximum(positions, -1), -1).astype(np.int32)
        q = np.asarray(jnp.asarray(rng.normal(size=(B, T, N, H)), dtype))
        q = np.where(positions[..., None, None] < 0, np.nan, q.astype(np.float64))
        stored = self.stored or dtype
        spread = 40 if stored == "int8" else 1
        k, v = (np.asarray(jnp.asarray(spread * rng.normal(size=(B, S, K, H)), stored))
                for _ in range(2))  # fmt: skip
        held = np.arange(S)[None] < lengths[:, None]
        scale_shape = {"channel": (K, H), "token": (B, S, K), None: ()}[self.scales]
        k_scale, v_scale = (rng.uniform(0.5, 1.5, scale_shape) / spread for _ in range(2))
        k_scale, v_scale = k_scale.astype(np.float32), v_scale.astype(np.float32)

        def true(x, scale):
            scale = scale[..., None] if self.scales == "token" else scale
            return np.where(held[..., None, None], x.astype(np.float64) * scale, 0)

        slots = starts[:, None] + np.arange(S)
        mask = definition.mask_of(positions, np.where(held, slots, -1), None, None, self.chunk)
        if self.scales is None:
            k_scale, v_scale = np.float64(1), np.float64(1)
        want = definition.attention(
            np.nan_to_num(q), true(k, k_scale), true(v, v_scale), mask, positions,
            self.temperature,
        )  # fmt: skip
        seen = mask.any(1)
        k, v = (poisoned(a, seen[..., None, None]) for a in (k, v))
        if self.scales == "token":
            k_scale, v_scale = (poisoned(a, seen[..., None]) for a in (k_scale, v_scale))
        table = None
        if self.page:
            table = rng.permutation(B * S // self.page).reshape(B, -1).astype(np.int32)
            k, v = (self.paged(a, table) for a in (k, v))
            if self.scales == "token":
                k_scale, v_scale = (self.paged(a, table) for a in (k_scale, v_scale))
            needed = seen.reshape(*table.shape, self.page).any(-1)
            table = np.where(needed, table, 2**30)
        arguments = {
            "q_BTNH": jnp.asarray(q, dtype), "k_BSKH": jnp.asarray(k), "v_BSKH": jnp.asarray(v),
            "lengths_B": lengths, "q_positions_BT": positions, "kv_start_B": starts,
            "page_table_BP": table,
        }  # fmt: skip
        if self.scales:
            arguments |= {"k_scale": jnp.asarray(k_scale), "v_scale": jnp.asarray(v_scale)}
        return arguments, want

    def paged(self, array, table):
        """Put rows into the pages that the table names."""
        cut = array.reshape(*table.shape, self.page, *array.shape[2:])
        pool = np.empty((table.size, *cut.shape[2:]), array.dtype)
        pool[table] = cut
        return pool


def poisoned(array, seen):
    """Put what must not matter where nobody looks."""
    garbage = 127 if array.dtype == np.int8 else np.nan
    return np.where(seen, array, np.asarray(garbage, array.dtype))


def check(operation, case, backend, dtype):
    """Hold an operation to the definition."""
    arguments, want = case.build(dtype)
    how = {"chunk_size": case.chunk, "temperature": case.temperature, "backend": backend}
    simulated = contextlib.nullcontext() if backend == "reference" else kernels_pallas.interpreted()
    with simulated:
        got = jax.jit(lambda a: operation(**a, **how, return_lse=True))(arguments)
    for name, a, b in zip(("out", "lse"), got, want, strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], err_msg=name
        )
