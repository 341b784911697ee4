import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import (
    backend,
    chunked_attention,
    decode_attention,
    merge_attention,
    tuning,
)
from kernels_pallas.decode import reference
from tests.kernels_pallas.cache_cases import Case, check

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
    Case(name="the_chunk_of_small_pages", lengths=(300, 90), slots=320, page=16, chunk=64),
    Case(name="pages_of_an_odd_size", lengths=(700, 300), slots=1104, page=552, queries=2),
    Case(
        name="int8_small_pages_by_token",
        lengths=(300, 5), slots=384, page=64, stored="int8", scales="token", chunk=200,
    ),
    Case(
        name="int8_pages_by_token",
        lengths=(300, 5), slots=384, page=128, stored="int8", scales="token",
    ),
]  # fmt: skip


@pytest.mark.parametrize("block", [512, 24])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_equals_the_definition(monkeypatch, case, block):
    monkeypatch.setattr(reference, "BLOCK", block)
    check(decode_attention, case, "reference", "float32")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tpu_kernel_equals_the_definition_in_the_interpreter(case):
    check(decode_attention, case, "tpu", "float32")


def test_both_cores_of_a_tpu_share_a_cache(monkeypatch):
    monkeypatch.setattr(backend, "device_kind", lambda: "TPU v5")
    check(decode_attention, CASES[0], "tpu", "float32")


def test_a_tpu_multiplies_blocks_of_float8s_as_they_are_beside_bfloat16(monkeypatch):
    monkeypatch.setattr(backend, "device_kind", lambda: "TPU v5 lite")
    case = Case(
        name="", lengths=(384, 256), slots=384, queries=2, stored="float8_e4m3fn", scales="token"
    )  # blocks that all queries see, and that some do
    with tuning.overridden({"decode_attention": {"kv": 128}}):
        check(decode_attention, case, "tpu", "bfloat16")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gpu_kernel_equals_the_definition_in_the_interpreter(case):
    if case.slots % 8:
        with pytest.raises(NotImplementedError, match="a multiple of 8 slots, not 301"):
            check(decode_attention, case, "gpu", "bfloat16")
    else:
        check(decode_attention, case, "gpu", "bfloat16")


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

    with pytest.raises(ValueError, match=r"1 to 8 queries a row, not 9; prefill_attention"):
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
