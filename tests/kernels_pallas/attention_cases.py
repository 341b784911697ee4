"""One table of attention problems, for every backend: its arrays, made from a few numbers."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from tests.kernels_pallas import definition


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One problem.

    Attributes:
      name: what it shows.
      q_positions, kv_positions: of each row; shorter rows are filled up with padding (-1).
      segments: of each row of queries and of keys, or None.
      heads, kv_heads, head_dim: sizes.
      poisoned: padding holds NaN, in the cotangent of the result too.
    """

    name: str
    q_positions: tuple
    kv_positions: tuple
    q_segments: tuple | None = None
    kv_segments: tuple | None = None
    chunk: int | None = None
    temperature: tuple[int, float] | None = None
    scale: float | None = None
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    poisoned: bool = True

    def arrays(self, dtype, seed=0):
        """q, k, v, dout in the dtype, dlse in float32; then q and kv positions and segments."""
        rng = np.random.default_rng(seed)
        q_pos, kv_pos = _rows(self.q_positions, -1), _rows(self.kv_positions, -1)
        (B, T), S = q_pos.shape, kv_pos.shape[1]
        N, K, H = self.heads, self.kv_heads, self.head_dim
        q, k, v, dout = (
            rng.normal(size=s) for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
        )
        dlse = rng.normal(size=(B, T, N)).astype(np.float32)
        if self.poisoned:
            for array, positions in ((q, q_pos), (dout, q_pos), (k, kv_pos), (v, kv_pos)):
                array[positions < 0] = np.nan
        segments = [None if s is None else _rows(s, 0) for s in (self.q_segments, self.kv_segments)]
        q, k, v, dout = (jnp.asarray(a, dtype) for a in (q, k, v, dout))
        return (q, k, v, dout, dlse), (q_pos, kv_pos, *segments)

    def expected(self, arrays, integers):
        """(out, lse, dq, dk, dv) by definition, padding zero."""
        q, k, v, dout, dlse = (np.nan_to_num(np.asarray(a, np.float64)) for a in arrays)
        q_pos, kv_pos, q_seg, kv_seg = integers
        mask = definition.mask_of(q_pos, kv_pos, q_seg, kv_seg, self.chunk)
        how = {"temperature": self.temperature, "scale": self.scale}
        out, lse = definition.attention(q, k, v, mask, q_pos, **how)
        grads = definition.gradient(q, k, v, mask, q_pos, dout, dlse, **how)
        return out, lse, *grads


def _rows(rows, fill):
    array = np.full((len(rows), max(len(row) for row in rows)), fill, np.int32)
    for line, row in zip(array, rows, strict=True):
        line[: len(row)] = row
    return array


def _upto(n, start=0):
    return tuple(range(start, start + n))


def _packed(*lengths):
    return sum((_upto(n) for n in lengths), ()), sum(
        ((i + 1,) * n for i, n in enumerate(lengths)), ()
    )


_PACK, _PACK_SEGMENTS = _packed(37, 1, 90, 12)
_PACK2, _PACK2_SEGMENTS = _packed(100, 33)
_FAR = 10_485_760 - 21

CASES = [
    Case(name="causal", q_positions=(_upto(19),), kv_positions=(_upto(19),)),
    Case(name="several_blocks", q_positions=(_upto(300),), kv_positions=(_upto(300),)),
    Case(
        name="chunks_of_odd_size",
        q_positions=(_upto(300),), kv_positions=(_upto(300),), chunk=37,
    ),
    Case(name="one_token_chunks", q_positions=(_upto(21),), kv_positions=(_upto(21),), chunk=1),
    Case(
        name="a_boundary_at_every_offset",
        q_positions=tuple(_upto(7, 20 + i) for i in range(9)),
        kv_positions=tuple(_upto(27 + i) for i in range(9)), chunk=9,
    ),
    Case(
        name="packed_rows_whose_positions_restart",
        q_positions=(_PACK, _PACK2), kv_positions=(_PACK, _PACK2),
        q_segments=(_PACK_SEGMENTS, _PACK2_SEGMENTS),
        kv_segments=(_PACK_SEGMENTS, _PACK2_SEGMENTS), chunk=32, temperature=(8, 0.3),
    ),
    Case(
        name="far_positions_with_temperature",
        q_positions=(_upto(21, _FAR),), kv_positions=(_upto(40, _FAR - 19),),
        temperature=(8192, 0.1), head_dim=256, heads=2, kv_heads=1,  # the widest heads
    ),
    Case(
        name="far_positions_over_a_chunk_boundary",
        q_positions=(_upto(21, 10_477_568 - 9),), kv_positions=(_upto(40, 10_477_568 - 28),),
        chunk=8192, temperature=(8192, 0.1), head_dim=128,
    ),
    Case(
        name="everyone_sees_everyone",
        q_positions=((0,) * 33,) * 2, kv_positions=((0,) * 33,) * 2,
        heads=2, kv_heads=2, head_dim=88,
    ),
    Case(
        name="a_cache_with_stale_slots_before_new_tokens",
        q_positions=(_upto(9, 150),),
        kv_positions=(_upto(22, 128) + (-1,) * 250 + _upto(9, 150),), chunk=128,
    ),
    Case(
        name="keys_in_no_order",
        q_positions=(_upto(40, 3),), kv_positions=(tuple(int(i) for i in
            np.random.default_rng(3).permutation(150)),), chunk=50,
    ),
    Case(
        name="queries_before_all_keys_and_no_key_at_all",
        q_positions=(_upto(5),) * 2, kv_positions=(_upto(9, 3), (-1,) * 9),
    ),
    Case(
        name="five_queries_to_a_head_and_a_scale",
        q_positions=(_upto(40),), kv_positions=(_upto(40),), heads=5, kv_heads=1, scale=0.3,
    ),
]  # fmt: skip
