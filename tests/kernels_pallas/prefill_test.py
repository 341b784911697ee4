import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import (
    backend,
    decode_attention,
    merge_attention,
    prefill_attention,
    tuning,
)
from kernels_pallas.decode import reference as decode_reference
from kernels_pallas.prefill import reference, tpu
from tests.kernels_pallas.cache_cases import Case, check

CASES = [
    Case(name="ragged", queries=40, lengths=(1, 300, 40, 0), padding=(0, 7, 0, 20), slots=304),
    Case(name="pages_of_16", queries=70, lengths=(290, 33, 128), slots=304, page=16),
    Case(name="pages_of_64", queries=33, lengths=(384, 0, 129), slots=384, page=64),
    Case(
        name="a_piece_over_several_chunks",
        queries=90, lengths=(300, 205), slots=320, page=64, chunk=32, padding=(0, 11),
    ),
    Case(name="one_chunk_of_many", queries=20, lengths=(300, 90), slots=320, page=16, chunk=64),
    Case(name="large_pages", queries=30, lengths=(700, 300), slots=1152, page=576, chunk=400),
    Case(
        name="far_with_temperature",
        queries=12, lengths=(250, 33), slots=256, page=64,
        starts=(10_485_000, 8_192_000), temperature=(8192, 0.1),
    ),
    Case(
        name="a_part_of_the_cache_before_and_one_after_the_queries",
        queries=17, lengths=(64, 40), slots=64, page=64, starts=(0, 2000), ahead=-30,
    ),
    Case(name="five_heads_to_one", queries=30, lengths=(150,), heads=5, kv_heads=1, head_dim=128),
    Case(name="widest_heads", queries=9, lengths=(70,), slots=128, kv_heads=4, head_dim=256),
    Case(
        name="int8_by_channel",
        queries=20, lengths=(300, 70), slots=320, page=64, stored="int8", scales="channel",
    ),
    Case(
        name="int8_by_token",
        queries=20, lengths=(300, 70), slots=320, page=64, stored="int8", scales="token",
    ),
    Case(
        name="fp8_by_token",
        queries=20, lengths=(170, 70), slots=192, page=64, stored="float8_e4m3fn", scales="token",
        chunk=48,
    ),
    Case(name="fp8", queries=20, lengths=(304, 70), slots=320, stored="float8_e4m3fn"),
]  # fmt: skip


@pytest.mark.parametrize("block", [256, 24])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_equals_the_definition(monkeypatch, case, block):
    monkeypatch.setattr(reference, "BLOCK", block)
    monkeypatch.setattr(reference, "SLOTS", 2 * block)
    check(prefill_attention, case, "reference", "float32")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tpu_kernel_equals_the_definition_in_the_interpreter(case):
    with tuning.overridden({"prefill_attention": {"q": 16, "kv": 128}}):
        check(prefill_attention, case, "tpu", "float32")


@pytest.mark.parametrize(
    ("page", "block", "copy"),
    [(16, 512, 16), (64, 512, 64), (576, 384, 192), (8000, 640, 320), (10_000, 640, 80)],
)
def test_a_tpu_takes_blocks_that_few_copies_make(page, block, copy):
    assert (tpu.block_size(page, 512, 100 * page), math.gcd(page, block)) == (block, copy)


@pytest.mark.parametrize("case", CASES[8:9], ids=lambda case: case.name)
def test_both_cores_of_a_tpu_share_the_queries_of_one_head(monkeypatch, case):
    monkeypatch.setattr(backend, "device_kind", lambda: "TPU v5")
    with tuning.overridden({"prefill_attention": {"q": 16, "kv": 128}}):
        check(prefill_attention, case, "tpu", "float32")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gpu_kernel_equals_the_definition_in_the_interpreter(case):
    with tuning.overridden({"prefill_attention": {"kv_block": 64}}):
        check(prefill_attention, case, "gpu", "bfloat16")


@pytest.mark.parametrize("queries", [5, 12])
def test_parts_of_a_cache_that_were_attended_one_way_or_the_other_merge_to_the_whole(queries):
    case = Case(
        name="", queries=queries, lengths=(250, 130, 20), slots=256, page=64,
        temperature=(64, 0.2), chunk=200,
    )  # fmt: skip
    arguments, want = case.build("float32")
    table, lengths = (np.asarray(arguments.pop(n)) for n in ("page_table_BP", "lengths_B"))
    del arguments["kv_start_B"]
    parts = []
    for i in range(4):
        attend = decode_attention if i % 2 and queries <= 8 else prefill_attention
        part = attend(
            **arguments,
            page_table_BP=table[:, i : i + 1],
            lengths_B=np.clip(lengths - 64 * i, 0, 64),
            kv_start_B=np.full(3, 64 * i, np.int32),
            temperature=case.temperature,
            chunk_size=case.chunk,
            return_lse=True,
        )
        parts.append(part)
    outs, lses = zip(*parts, strict=True)
    for got, wanted in zip(merge_attention(jnp.stack(outs), jnp.stack(lses)), want, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_the_cost_follows_what_is_seen_and_not_the_cache(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", 16)
    monkeypatch.setattr(reference, "SLOTS", 16)
    seen = []
    add = decode_reference.Partial.add

    def watched(self, logits, weigh):
        jax.debug.callback(lambda: seen.append(1))
        return add(self, logits, weigh)

    monkeypatch.setattr(decode_reference.Partial, "add", watched)
    case = Case(name="", lengths=(80,), queries=32, slots=2048, chunk=32)
    arguments, want = case.build("float32")
    out = prefill_attention(**arguments, chunk_size=32)
    jax.effects_barrier()
    np.testing.assert_allclose(out, want[0], atol=2e-5)
    assert len(seen) == 2 + 1, "queries 48..63 see slots 32..63, queries 64..79 see 64..79"


def test_no_pool_is_copied():
    case = Case(name="", lengths=(60,), queries=20, slots=4096, page=16)
    arguments, _ = case.build("float32")
    pool = [jnp.swapaxes(arguments.pop(n), 1, 2) for n in ("k_BSKH", "v_BSKH")]

    def attend(pool, arguments):
        k, v = (a.swapaxes(1, 2) for a in pool)
        return prefill_attention(**arguments, k_BSKH=k, v_BSKH=v, backend="reference")

    compiled = jax.jit(attend).lower(pool, arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < pool[0].nbytes / 2


def test_bad_arguments_are_refused_with_the_remedy():
    arguments, _ = Case(name="", lengths=(5,), queries=9).build("float32")

    def changed(**other):
        return prefill_attention(**{**arguments, **other})

    with pytest.raises(ValueError, match="needs a query"):
        changed(q_BTNH=jnp.zeros((1, 0, 4, 64)))
    with pytest.raises(ValueError, match="q_positions_BT has shape"):
        changed(q_positions_BT=np.zeros((1, 8), np.int32))
    with pytest.raises(ValueError, match="k_scale has shape"):
        changed(k_scale=jnp.zeros((3,)))
    with pytest.raises(NotImplementedError, match="TPU"):
        changed(backend="tpu")
