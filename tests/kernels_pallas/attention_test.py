import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas import backend, chunked_attention, merge_attention, tuning
from kernels_pallas.attention import reference, visibility
from tests.kernels_pallas import definition
from tests.kernels_pallas.attention_cases import CASES, Case

# In float32 the error is that of sums of a few hundred terms. In bfloat16 a result is rounded to 8
# bits, and so are probabilities and their gradients before they are multiplied, beside values of
# about 4: 2^-8 * 4 for what is stored, as much again for what went in.
TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2}


def run(case, arrays, integers, backend):
    q, k, v, dout, dlse = arrays
    q_pos, kv_pos, q_seg, kv_seg = integers

    def attend(q, k, v):
        return chunked_attention(
            q,
            k,
            v,
            q_positions_BT=q_pos,
            kv_positions_BS=kv_pos,
            q_segments_BT=q_seg,
            kv_segments_BS=kv_seg,
            chunk_size=case.chunk,
            temperature=case.temperature,
            scale=case.scale,
            return_lse=True,
            backend=backend,
        )

    (out, lse), pull = jax.vjp(attend, q, k, v)
    return out, lse, *pull((dout.astype(out.dtype), jnp.asarray(dlse)))


def check(case, backend, dtype):
    arrays, integers = case.arrays(dtype)
    want = case.expected(arrays, integers)
    simulated = contextlib.nullcontext() if backend == "reference" else kernels_pallas.interpreted()
    with simulated:
        got = jax.jit(lambda arrays: run(case, arrays, integers, backend))(arrays)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), b, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], err_msg=name
        )


def ids(case):
    return case.name


@pytest.mark.parametrize("blocks", [None, 16], ids=["whole", "in_blocks"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_reference_equals_the_definition(monkeypatch, case, blocks):
    if blocks:
        monkeypatch.setattr(reference, "BLOCK", blocks)
        monkeypatch.setattr(reference, "MAX_DENSE", 0)
    check(case, "reference", "float32")


@pytest.mark.parametrize("case", CASES[:3], ids=ids)
def test_reference_takes_bfloat16(case):
    check(case, "reference", "bfloat16")


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_tpu_kernels_equal_the_definition_in_the_interpreter(case):
    check(case, "tpu", "float32")


def test_both_cores_of_a_tpu_share_the_queries_of_one_head(monkeypatch):
    monkeypatch.setattr(backend, "device_kind", lambda: "TPU v5")
    at = tuple(range(60))
    case = Case(name="", q_positions=(at,), kv_positions=(at,), heads=2, kv_heads=1)
    small = {"q": 16, "kv": 128}
    with tuning.overridden({"chunked_attention.forward": small}):
        check(case, "tpu", "float32")
        arrays, integers = case.arrays("float32")
        with kernels_pallas.interpreted():
            traced = jax.make_jaxpr(lambda arrays: run(case, arrays, integers, "tpu"))(arrays)
    assert "grid=(2, 1, 2)" in str(traced)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_gpu_kernels_equal_the_definition_in_the_interpreter(case):
    check(case, "gpu", "bfloat16")


def self_attention(T, backend=None, *, poison=slice(0), dtype="float32", **how):
    """Attention among T tokens with ordinary positions; values of `poison` are NaN."""
    case = Case(name="", q_positions=(tuple(range(T)),), kv_positions=(tuple(range(T)),))
    (q, k, v, _, _), (q_pos, kv_pos, _, _) = case.arrays(dtype)
    k, v = k.at[:, poison].set(jnp.nan), v.at[:, poison].set(jnp.nan)
    return chunked_attention(
        q, k, v, q_positions_BT=q_pos, kv_positions_BS=kv_pos, backend=backend, **how
    )


def test_blocks_that_nobody_sees_are_not_computed(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", 16)
    monkeypatch.setattr(reference, "MAX_DENSE", 0)
    out = self_attention(64, chunk_size=32, poison=slice(0, 32))
    assert np.isfinite(out[:, 32:]).all(), "0 * NaN is NaN, had the block been multiplied"


@pytest.mark.parametrize("temperature", [None, (4, 0.1)])
def test_merging_shards_of_the_keys_equals_seeing_them_all(temperature):
    (case,) = (c for c in CASES if c.name == "keys_in_no_order")
    (q, k, v, *_), (q_pos, kv_pos, *_) = case.arrays("float32")

    def attend(part):
        return chunked_attention(
            q,
            k[:, part],
            v[:, part],
            q_positions_BT=q_pos,
            kv_positions_BS=kv_pos[:, part],
            temperature=temperature,
            return_lse=True,
        )

    parts = [attend(slice(i, i + 50)) for i in range(0, 150, 50)]
    merged = merge_attention(*(jnp.stack(p) for p in zip(*parts, strict=True)))
    for a, b in zip(merged, attend(slice(None)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_the_gradient_passes_through_a_merge_of_shards():
    (case,) = (c for c in CASES if c.name == "keys_in_no_order")
    (q, k, v, *_), (q_pos, kv_pos, *_) = case.arrays("float32")

    def loss(size, q, k, v):
        parts = [
            chunked_attention(
                q,
                k[:, i : i + size],
                v[:, i : i + size],
                q_positions_BT=q_pos,
                kv_positions_BS=kv_pos[:, i : i + size],
                return_lse=True,
            )
            for i in range(0, 150, size)
        ]
        out, lse = merge_attention(*(jnp.stack(p) for p in zip(*parts, strict=True)))
        return (out**2).sum() + jnp.sin(lse).sum()

    whole = jax.grad(loss, (1, 2, 3))(150, q, k, v)
    for a, b in zip(jax.grad(loss, (1, 2, 3))(50, q, k, v), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)  # sums of 40 terms as large as 8


def test_merging_shards_that_all_see_nothing_gives_nothing():
    outs, lses = jnp.zeros((3, 2, 5)), jnp.full((3, 2), visibility.NEGATIVE)
    out, lse = merge_attention(outs, lses)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, np.float32(visibility.NEGATIVE))


def test_temperature_steps_one_token_before_each_multiple_of_the_floor():
    positions = jnp.array([8190, 8191, 16382, 16383, 131_071, 1_048_575, 10_485_759])
    golden = [1.000000, 1.069315, 1.069315, 1.109861, 1.283321, 1.485981, 1.715540]
    np.testing.assert_allclose(
        visibility.attention_temperature(positions, (8192, 0.1)), golden, atol=1e-6
    )


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_summaries_of_blocks_agree_with_the_mask(case):
    (q, k, v, *_), integers = case.arrays("float32")
    x = visibility.Inputs(q, k, v, *integers)
    q_block, kv_block = 8, 16
    q_blocks, kv_blocks = visibility.summarize(x, case.chunk, q_block, kv_block)
    mask = definition.mask_of(*integers, case.chunk)
    for b, i, j in np.ndindex(*q_blocks.begin.shape, kv_blocks.begin.shape[1]):
        part = mask[b, i * q_block : (i + 1) * q_block, j * kv_block : (j + 1) * kv_block]
        one_q = visibility.QueryBlocks(*(int(a[b, i]) for a in q_blocks))
        one_kv = visibility.KeyBlocks(*(int(a[b, j]) for a in kv_blocks))
        if part.any():
            assert visibility.may_see(one_q, one_kv)
            assert one_q.begin <= j < one_q.end
            assert one_kv.begin <= i < one_kv.end
        if visibility.sees_all(one_q, one_kv):
            assert part.all()
            assert part.shape == (q_block, kv_block), "a partial block is never seen whole"


def test_summaries_skip_all_that_a_long_chunked_row_cannot_see():
    positions = jnp.arange(4096)[None]
    none = jnp.zeros((1, 4096, 1, 1))
    x = visibility.Inputs(none, none, none, positions, positions, None, None)
    q_blocks, kv_blocks = visibility.summarize(x, 512, 64, 128)
    i, j = np.arange(64), np.arange(32)
    np.testing.assert_array_equal(q_blocks.begin[0], i // 8 * 4)
    np.testing.assert_array_equal(q_blocks.end[0], i // 2 + 1)
    np.testing.assert_array_equal(kv_blocks.begin[0], j * 2)
    np.testing.assert_array_equal(kv_blocks.end[0], j // 4 * 8 + 8)


@pytest.mark.parametrize("chunk", [None, 8, 50])
def test_no_block_of_packed_rows_is_copied_in_vain(chunk):
    (case,) = (c for c in CASES if c.name == "packed_rows_whose_positions_restart")
    (q, k, v, *_), integers = case.arrays("float32")
    q_blocks, kv_blocks = visibility.summarize(visibility.Inputs(q, k, v, *integers), chunk, 8, 16)
    mask = definition.mask_of(*integers, chunk)
    for b, i, j in np.ndindex(*q_blocks.begin.shape, kv_blocks.begin.shape[1]):
        one_q = visibility.QueryBlocks(*(int(a[b, i]) for a in q_blocks))
        one_kv = visibility.KeyBlocks(*(int(a[b, j]) for a in kv_blocks))
        part = mask[b, i * 8 : (i + 1) * 8, j * 16 : (j + 1) * 16]
        assert visibility.may_see(one_q, one_kv) == part.any(), (b, i, j)


def test_shapes_that_disagree_and_half_given_segments_are_refused():
    case = Case(name="", q_positions=((0, 1),), kv_positions=((0, 1, 2),))
    (q, k, v, *_), (q_pos, kv_pos, *_) = case.arrays("float32")
    attend = lambda **how: chunked_attention(q, k, v, q_positions_BT=q_pos, **how)  # noqa: E731
    with pytest.raises(ValueError, match="kv_positions_BS has shape"):
        attend(kv_positions_BS=q_pos)
    with pytest.raises(ValueError, match="together"):
        attend(kv_positions_BS=kv_pos, q_segments_BT=q_pos)
    with pytest.raises(ValueError, match="kv_segments_BS has shape"):
        attend(kv_positions_BS=kv_pos, q_segments_BT=q_pos, kv_segments_BS=q_pos)
    with pytest.raises(ValueError, match=r"chunk_size \(0\)"):
        attend(kv_positions_BS=kv_pos, chunk_size=0)
    with pytest.raises(ValueError, match="floor"):
        attend(kv_positions_BS=kv_pos, temperature=(0, 0.1))


def test_a_named_backend_runs_or_says_why_not():
    with pytest.raises(ValueError, match="'cuda' is unknown; choose from reference, tpu, gpu"):
        self_attention(4, "cuda")
    for name, dtype in (("tpu", "float32"), ("gpu", "bfloat16")):
        with pytest.raises(NotImplementedError, match=f"needs a {name.upper()}, and this is"):
            self_attention(4, name, dtype=dtype)


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0), (0, 0)])
def test_without_queries_or_keys_nothing_is_seen(queries, keys):
    q, kv = jnp.ones((1, queries, 2, 8), jnp.bfloat16), jnp.ones((1, keys, 1, 8), jnp.bfloat16)
    positions = {
        "q_positions_BT": jnp.arange(queries)[None],
        "kv_positions_BS": jnp.arange(keys)[None],
    }
    out, lse = chunked_attention(q, kv, kv, **positions, return_lse=True)
    np.testing.assert_array_equal(out, np.zeros((1, queries, 2, 8)))
    np.testing.assert_array_equal(lse, np.full((1, queries, 2), np.float32(visibility.NEGATIVE)))
    assert chunked_attention(q, kv, kv, **positions).dtype == jnp.bfloat16
