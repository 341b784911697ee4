"""Every code of a cache of float8s stands for its number in TPU kernels, as key and as value."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas
from kernels_pallas import backend, decode_attention, prefill_attention

K, H, S = 2, 128, 128  # the channels of a token hold every code
T = 8
# By row: how many slots are read, and where there are codes of NaN.
LENGTHS = np.array([S, 1, 1, S, S], np.int32)
READ, UNREAD = slice(0, 1), slice(1, S)
NAN_AT = [(None, None), (None, None), ("kv", UNREAD), ("k", READ), ("v", READ)]


def cache(kind):
    """[rows, S, K, H] float8s, of keys or values: a row's tokens are alike but for NaN."""
    codes = np.arange(256, dtype=np.uint8)
    finite = np.where(codes & 0x7F == 0x7F, 0, codes)
    rows = np.tile(finite, (len(NAN_AT), S, 1))
    for row, (kinds, slots) in enumerate(NAN_AT):
        if kinds is not None and kind in kinds:
            rows[row, slots] = codes
    stored = jax.lax.bitcast_convert_type(jnp.asarray(rows), jnp.float8_e4m3fn)
    return stored.reshape(len(NAN_AT), S, K, H)


@pytest.mark.parametrize(
    ("operation", "device"),
    [
        (decode_attention, "TPU7x"),
        (decode_attention, "TPU v5 lite"),  # whose multiplier takes another float8
        (prefill_attention, "TPU7x"),
    ],
)
def test_a_query_that_is_one_channel_finds_its_code(operation, device, monkeypatch):
    monkeypatch.setattr(backend, "device_kind", lambda: device)
    B, G = len(LENGTHS), H // T
    # Query t, head g of a group: channel t * G + g.
    q = jnp.broadcast_to(jnp.eye(H).reshape(T, 1, G, H), (B, T, K, G, H))
    q = q.reshape(B, T, K * G, H).astype(jnp.bfloat16)

    @jax.jit
    def attend(k, v):
        positions = jnp.full((B, T), S - 1)
        how = {"lengths_B": jnp.asarray(LENGTHS), "q_positions_BT": positions, "backend": "tpu"}
        return operation(q, k, v, scale=math.log(2), return_lse=True, **how)

    k, v = cache("k"), cache("v")
    with kernels_pallas.interpreted():
        out, lse = attend(k, v)
    out = np.asarray(out).reshape(B, T, K, G, H)
    logits = np.asarray(lse).reshape(B, T, K, G).swapaxes(1, 2).reshape(B, K, H)
    numbers = np.asarray(v[0, 0], np.float32)
    want = np.broadcast_to(numbers[:, None], (T, K, G, H))
    for row in (1, 2):  # a token is its values, and its logit a key
        np.testing.assert_array_equal(out[row], want)
        np.testing.assert_allclose(logits[row], numbers * math.log(2), rtol=3e-7)
    # Sums over tokens whose logits, up to 448, may be rounded apart; numbers are 1 / 16 apart.
    np.testing.assert_allclose(out[0], want, rtol=1e-4)
    np.testing.assert_allclose(logits[0], numbers * math.log(2) + math.log(S), rtol=3e-7, atol=1e-6)
    assert np.isnan(out[3]).all(), "a key that is NaN is in the sum of every logit"
    is_nan = np.isnan(np.asarray(v[4, 0], np.float32))
    np.testing.assert_allclose(out[4], np.where(is_nan[:, None], np.nan, want), rtol=1e-4)
