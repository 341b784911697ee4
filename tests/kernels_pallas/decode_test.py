import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas import chunked_attention, decode_attention, merge_attention
from kernels_pallas.decode import reference
from tests.kernels_pallas import definition

# float32: sums of a few hundred terms. bfloat16: results and probabilities rounded to 8 bits beside
# values of about 4.
TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One problem: a row for each length; slots past it hold NaN, or the type's largest number.

    Attributes:
      name: what it shows.
      lengths: of the cached rows.
      queries: T; the last of them stands at the last token of its row, unless `ahead` moves it.
      starts: position of slot 0 of each row.
      stored: dtype of the cache; None is that of the queries.
      scales: "channel", "token" or None.
      page: slots of a page, or None for no page table.
    """

    name: str
    lengths: tuple[int, ...]
    queries: int = 1
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
        """Arguments of decode_attention, and (out, lse) by definition."""
        rng = np.random.default_rng(1)
        B, T, S, N, K, H = (
            len(self.lengths), self.queries, self.slots, self.heads, self.kv_heads, self.head_dim
        )  # fmt: skip
        starts = np.array(self.starts or (0,) * B, np.int32)
        lengths = np.array(self.lengths, np.int32)
        positions = (starts + lengths - T + self.ahead)[:, None] + np.arange(T, dtype=np.int32)
        positions = np.maximum(positions, -1)
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
        garbage = 127 if stored == "int8" else np.nan
        k, v = (np.where(held[..., None, None], a, np.asarray(garbage, a.dtype)) for a in (k, v))
        if self.scales == "token":
            k_scale, v_scale = (np.where(held[..., None], a, np.nan) for a in (k_scale, v_scale))
        table = None
        if self.page:
            (k, v), table = self.paged((k, v), lengths, rng)
            if self.scales == "token":
                (k_scale, v_scale), _ = self.paged((k_scale, v_scale), lengths, None, table)
        arguments = {
            "q_BTNH": jnp.asarray(q, dtype), "k_BSKH": jnp.asarray(k), "v_BSKH": jnp.asarray(v),
            "lengths_B": lengths, "q_positions_BT": positions, "kv_start_B": starts,
            "page_table_BP": table,
        }  # fmt: skip
        if self.scales:
            arguments |= {"k_scale": jnp.asarray(k_scale), "v_scale": jnp.asarray(v_scale)}
        return arguments, want

    def paged(self, arrays, lengths, rng, table=None):
        """Cut rows into pages in shuffled order; entries that hold no token point nowhere."""
        B, S = arrays[0].shape[:2]
        per_row = S // self.page
        order = rng.permutation(B * per_row).reshape(B, per_row) if table is None else table
        needed = np.arange(per_row)[None] * self.page < lengths[:, None]
        pages = []
        for array in arrays:
            cut = array.reshape(B, per_row, self.page, *array.shape[2:])
            pool = np.zeros((B * per_row, *cut.shape[2:]), array.dtype)
            pool[order[needed]] = cut[needed]
            pages.append(pool)
        return pages, np.where(needed, order, 2**30).astype(np.int32)


CASES = [
    Case(name="lengths_differ", lengths=(1, 304, 129, 128)),
    Case(name="an_odd_number_of_slots", lengths=(301, 300, 7), slots=301),
    Case(name="an_empty_row", lengths=(0, 40)),
    Case(name="several_queries", lengths=(3, 250, 8), queries=3),
    Case(name="eight_queries_of_five_heads_each", lengths=(260,), queries=8, heads=5, kv_heads=1),
    Case(name="some_queries_are_padding", lengths=(2, 7), queries=5),
    Case(name="chunks", lengths=(300, 201, 60), queries=4, chunk=100),
    Case(name="the_last_chunk_alone", lengths=(5, 64), slots=64, starts=(640, 128), chunk=64),
    Case(
        name="far_with_temperature",
        lengths=(280, 33), starts=(10_485_000, 8_192_000), queries=2, temperature=(8192, 0.1),
    ),
    Case(name="a_part_of_the_cache_before_the_query", lengths=(300,), ahead=1000),
    Case(name="a_part_of_the_cache_after_the_query", lengths=(40,), ahead=-1000, starts=(2000,)),
    Case(name="equal_heads", lengths=(33,), heads=2, kv_heads=2, head_dim=128),
    Case(name="widest_heads", lengths=(150,), heads=2, kv_heads=1, head_dim=256),
    Case(name="int8_by_channel", lengths=(300, 70), stored="int8", scales="channel"),
    Case(name="int8_by_token", lengths=(300, 70), queries=2, stored="int8", scales="token"),
    Case(name="fp8", lengths=(300, 70), stored="float8_e4m3fn"),
    Case(name="fp8_by_token", lengths=(170, 70), stored="float8_e4m3fn", scales="token"),
    Case(name="small_pages", lengths=(300, 0, 129), slots=384, page=64, queries=2),
    Case(name="pages_of_many_blocks", lengths=(1000, 2000), slots=2048, page=1024, chunk=1500),
    Case(
        name="int8_pages_by_token",
        lengths=(300, 5), slots=384, page=128, stored="int8", scales="token",
    ),
]  # fmt: skip


def check(case, backend, dtype):
    arguments, want = case.build(dtype)
    how = {"chunk_size": case.chunk, "temperature": case.temperature, "backend": backend}
    simulated = contextlib.nullcontext() if backend == "reference" else kernels_pallas.interpreted()
    with simulated:
        got = jax.jit(lambda a: decode_attention(**a, **how, return_lse=True))(arguments)
    for name, a, b in zip(("out", "lse"), got, want, strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], err_msg=name
        )


@pytest.mark.parametrize("block", [1024, 24])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_equals_the_definition(monkeypatch, case, block):
    monkeypatch.setattr(reference, "BLOCK", block)
    check(case, "reference", "float32")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tpu_kernel_equals_the_definition_in_the_interpreter(case):
    check(case, "tpu", "float32")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gpu_kernel_equals_the_definition_in_the_interpreter(case):
    if case.slots % 8:
        with pytest.raises(NotImplementedError, match="a multiple of 8 slots, not 301"):
            check(case, "gpu", "bfloat16")
    else:
        check(case, "gpu", "bfloat16")


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_merged_parts_of_a_cache_equal_the_whole(parts):
    case = Case(name="", lengths=(300, 170, 20), queries=2, temperature=(64, 0.2))
    arguments, want = case.build("float32")
    size = case.slots // parts
    k, v, lengths = (arguments.pop(n) for n in ("k_BSKH", "v_BSKH", "lengths_B"))
    del arguments["kv_start_B"]
    results = [
        decode_attention(
            **arguments,
            k_BSKH=k[:, i : i + size],
            v_BSKH=v[:, i : i + size],
            lengths_B=np.clip(lengths - i, 0, size),
            kv_start_B=np.full(3, i, np.int32),
            temperature=case.temperature,
            return_lse=True,
        )
        for i in range(0, case.slots, size)
    ]
    got = merge_attention(*(jnp.stack(p) for p in zip(*results, strict=True)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_decoding_a_row_token_by_token_equals_attending_to_it_at_once():
    rng = np.random.default_rng(0)
    T, chunk, temperature = 40, 16, (8, 0.3)
    q, k, v = (jnp.asarray(rng.normal(size=(1, T, n, 16)), jnp.float32) for n in (4, 2, 2))
    positions = jnp.arange(T)[None]
    how = {"chunk_size": chunk, "temperature": temperature}
    whole = chunked_attention(q, k, v, q_positions_BT=positions, kv_positions_BS=positions, **how)
    for t in range(T):
        one = decode_attention(
            q[:, t : t + 1],
            k,
            v,
            lengths_B=jnp.array([t + 1]),
            q_positions_BT=jnp.array([[t]]),
            **how,
        )
        np.testing.assert_allclose(one, whole[:, t : t + 1], atol=2e-6)


def test_the_cost_of_a_step_follows_the_length_and_not_the_cache(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", 16)
    case = Case(name="", lengths=(40,), slots=2048)
    arguments, want = case.build("float32")
    # Blocks past the length would turn every result into NaN even with a weight of 0.
    seen = []
    add = reference.Partial.add

    def watched(self, logits, weigh):
        jax.debug.callback(lambda: seen.append(1))
        return add(self, logits, weigh)

    monkeypatch.setattr(reference.Partial, "add", watched)
    out = decode_attention(**arguments)
    jax.effects_barrier()
    np.testing.assert_allclose(out, want[0], atol=2e-5)
    assert len(seen) == 3, "40 slots are three blocks of 16"


def test_bad_arguments_are_refused_with_the_remedy():
    arguments, _ = Case(name="", lengths=(5,)).build("float32")

    def changed(**other):
        return decode_attention(**{**arguments, **other})

    with pytest.raises(ValueError, match=r"1 to 8 queries a row, not 9; chunked_attention"):
        changed(q_BTNH=jnp.zeros((1, 9, 4, 64)))
    with pytest.raises(ValueError, match="lengths_B has shape"):
        changed(lengths_B=np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="the cache has 2 rows and q_BTNH 1"):
        changed(k_BSKH=jnp.zeros((2, 300, 2, 64)))
    with pytest.raises(ValueError, match="k_scale has shape"):
        changed(k_scale=jnp.zeros((3,)))
    with pytest.raises(ValueError, match="store both alike"):
        changed(k_BSKH=arguments["k_BSKH"].astype(jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="needs a TPU"):
        changed(backend="tpu")
