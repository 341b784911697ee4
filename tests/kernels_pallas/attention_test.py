import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import reference
from kernels_pallas.attention.api import chunked_attention, merge_attention

N, K, H = 4, 2, 8


def visible_by_hand(q, kv, qs, ks, chunk):
    return 0 <= kv <= q and qs == ks and (chunk is None or q // chunk == kv // chunk)


def definition(q, k, v, q_pos, kv_pos, q_seg, kv_seg, chunk, temperature):
    """Scalar loops in float64."""
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -1e30)
    for b, t, n in np.ndindex(*q.shape[:3]):
        p = q_pos[b, t]
        seen = [
            s
            for s in range(k.shape[1])
            if visible_by_hand(p, kv_pos[b, s], q_seg[b, t], kv_seg[b, s], chunk)
        ]
        if not seen:
            continue
        logits = k[b, seen, n // (N // K)] @ q[b, t, n] / np.sqrt(H)
        if temperature:
            logits *= 1 + temperature[1] * np.log(np.floor((p + 1) / temperature[0]) + 1)
        lse[b, t, n] = np.log(np.exp(logits).sum())
        out[b, t, n] = np.exp(logits - lse[b, t, n]) @ v[b, seen, n // (N // K)]
    return out, lse


def make(T, S, *, q_start=0, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(2, n, h, H)) for n, h in ((T, N), (S, K), (S, K)))
    q_pos = np.broadcast_to(q_start + np.arange(T), (2, T)).astype(np.int32)
    kv_pos = np.broadcast_to(np.arange(S), (2, S)).astype(np.int32)
    return q, k, v, q_pos, kv_pos


CASES = [
    pytest.param(11, 11, 0, None, None, id="causal"),
    pytest.param(23, 23, 0, 5, None, id="chunks_of_odd_size"),
    pytest.param(23, 23, 0, 1, None, id="one_token_chunks"),
    pytest.param(16, 16, 0, 8, (4, 0.1), id="whole_chunks_warm"),
    pytest.param(3, 20, 17, None, (4, 0.5), id="continuation_warm"),
    pytest.param(3, 20, 17, 6, None, id="continuation_over_a_boundary"),
]


@pytest.mark.parametrize(("T", "S", "start", "chunk", "temperature"), CASES)
def test_equals_scalar_loops_in_float64(T, S, start, chunk, temperature):
    q, k, v, q_pos, kv_pos = make(T, S, q_start=start)
    zeros = np.zeros_like
    out, lse = chunked_attention(
        *(jnp.float32(a) for a in (q, k, v)),
        q_positions_BT=q_pos,
        kv_positions_BS=kv_pos,
        chunk_size=chunk,
        temperature=temperature,
        return_lse=True,
    )
    want = definition(q, k, v, q_pos, kv_pos, zeros(q_pos), zeros(kv_pos), chunk, temperature)
    np.testing.assert_allclose(out, want[0], atol=2e-6)
    np.testing.assert_allclose(lse, want[1], atol=2e-6)


def test_packed_segments_and_padding_are_invisible_to_each_other():
    q, k, v, _, _ = make(12, 12)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, -1, -1]] * 2, np.int32)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0]] * 2, np.int32)
    out = chunked_attention(
        *(jnp.float32(a) for a in (q, k, v)),
        q_positions_BT=positions,
        kv_positions_BS=positions,
        q_segments_BT=segments,
        kv_segments_BS=segments,
        chunk_size=4,
    )
    want, _ = definition(q, k, v, positions, positions, segments, segments, 4, None)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_array_equal(out[:, 10:], 0)


@pytest.mark.parametrize("key_block", [8192, 7])
def test_blocks_of_queries_and_keys_change_nothing(monkeypatch, key_block):
    q, k, v, q_pos, kv_pos = make(29, 29)
    arguments = [jnp.float32(a) for a in (q, k, v)]

    def run(*arrays):
        return chunked_attention(
            *arrays, q_positions_BT=q_pos, kv_positions_BS=kv_pos, chunk_size=10, return_lse=True
        )

    whole = run(*arguments)
    whole_grad = jax.grad(lambda *a: (run(*a)[0] ** 2).sum(), (0, 1, 2))(*arguments)
    monkeypatch.setattr(reference, "QUERY_BLOCK", 8)
    monkeypatch.setattr(reference, "KEY_BLOCK", key_block)
    blocks = run(*arguments)
    blocks_grad = jax.grad(lambda *a: (run(*a)[0] ** 2).sum(), (0, 1, 2))(*arguments)
    for a, b in zip(whole + whole_grad, blocks + blocks_grad, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_padding_may_hold_nan_free_garbage_of_any_size():
    q, k, v, q_pos, kv_pos = make(6, 6)
    kv_pos = kv_pos.copy()
    kv_pos[:, 4:] = -1
    arrays = [jnp.float32(a) for a in (q, k, v)]
    huge = [arrays[0], arrays[1].at[:, 4:].set(1e30), arrays[2].at[:, 4:].set(1e30)]
    run = lambda a: chunked_attention(*a, q_positions_BT=q_pos, kv_positions_BS=kv_pos)  # noqa: E731
    np.testing.assert_array_equal(run(arrays), run(huge))


@pytest.mark.parametrize("temperature", [None, (4, 0.1)])
def test_merging_shards_of_the_keys_equals_seeing_them_all(temperature):
    q, k, v, q_pos, kv_pos = make(5, 24, q_start=19)
    q, k, v = (jnp.float32(a) for a in (q, k, v))

    def run(part):
        return chunked_attention(
            q,
            k[:, part],
            v[:, part],
            q_positions_BT=q_pos,
            kv_positions_BS=kv_pos[:, part],
            temperature=temperature,
            return_lse=True,
        )

    parts = [run(slice(i, i + 6)) for i in range(0, 24, 6)]
    merged = merge_attention(*(jnp.stack(p) for p in zip(*parts, strict=True)))
    for a, b in zip(merged, run(slice(None)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_temperature_steps_one_token_before_each_multiple_of_the_floor():
    positions = jnp.array([8190, 8191, 16382, 16383, 131_071, 1_048_575, 10_485_759])
    golden = [1.000000, 1.069315, 1.069315, 1.109861, 1.283321, 1.485981, 1.715540]
    np.testing.assert_allclose(
        reference.attention_temperature(positions, (8192, 0.1)), golden, atol=1e-6
    )


def test_shapes_that_disagree_and_half_given_segments_are_refused():
    q, k, v, q_pos, kv_pos = (jnp.asarray(a) for a in make(4, 6))
    with pytest.raises(ValueError, match="kv_positions_BS has shape"):
        chunked_attention(q, k, v, q_positions_BT=q_pos, kv_positions_BS=q_pos)
    with pytest.raises(ValueError, match="together"):
        chunked_attention(
            q, k, v, q_positions_BT=q_pos, kv_positions_BS=kv_pos, q_segments_BT=q_pos
        )
