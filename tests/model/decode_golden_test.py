"""Prefill in pieces, decode, padding and greedy continuation against transformers, in float32."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.model import Cache, Llama4
from tests.golden import closed_form
from tests.golden.closed_form import PAD, TEXT_CASES
from tests.golden.filled import QUICK_COMPILE, build
from tests.golden.stored import golden

TOLERANCE = 1e-4

# 37 tokens cut into calls; chunks end at 8, 16, 24 and 32. Few lengths, to compile few programs.
SPLITS = {
    "one by one": (1,) * 37,
    "prefill, then one by one": (20, *(1,) * 17),
    "whole chunks": (8, 8, 8, 8, 5),
    "across edges": (5, 5, 20, 1, 5, 1),
    "from the middle of a chunk over two edges": (1, 1, 1, 20, 8, 5, 1),
    "up to an edge and over it": (5, 1, 1, 1, 8, 1, 20),
}


quick_jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)


@quick_jit
def step(model: Llama4, ids_BT: jax.Array, cache: Cache):
    out = model(ids_BT, cache=cache)
    return out.logits_BTV, out.cache


@quick_jit
def forward(model: Llama4, ids_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
    return model(ids_BT, positions_BT=positions_BT).logits_BTV


def empty_cache(model: Llama4, rows: int = 1, length: int = 64) -> Cache:
    return Cache.create(model.config.text, batch_size=rows, max_length=length, dtype="float32")


def in_pieces(model: Llama4, ids_T: np.ndarray, pieces: Iterable[int]) -> np.ndarray:
    cache, start, logits = empty_cache(model), 0, []
    for size in pieces:
        piece_BT = jnp.asarray(ids_T[None, start : start + size], jnp.int32)
        logits_BTV, cache = step(model, piece_BT, cache)
        logits.append(np.asarray(logits_BTV[0]))
        start += size
    assert start == len(ids_T)
    return np.concatenate(logits)


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_any_split_gives_the_logits_of_one_pass(name):
    model, stepwise = build(TEXT_CASES[name]), golden("hf_decode")[name + ".stepwise"]
    for split, pieces in SPLITS.items():
        logits = in_pieces(model, closed_form.tokens(37), pieces)
        stored = golden("hf_text")[name]
        np.testing.assert_allclose(logits, stored, atol=TOLERANCE, err_msg=split)
        np.testing.assert_allclose(logits[:, ::8], stepwise, atol=TOLERANCE, err_msg=split)


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_greedy_continuation_matches_transformers(name):
    model, expected = build(TEXT_CASES[name]), golden("hf_decode")[name + ".greedy"]
    # The closest call of the reference run is far from what float32 can confuse.
    assert golden("hf_decode")[name + ".greedy_margin"] > 100 * TOLERANCE
    cache, found = empty_cache(model), []
    for token in closed_form.tokens(13):
        logits_BTV, cache = step(model, jnp.full((1, 1), token, jnp.int32), cache)
    for _ in expected:
        found.append(int(logits_BTV[0, -1].argmax()))
        logits_BTV, cache = step(model, jnp.full((1, 1), found[-1], jnp.int32), cache)
    assert found == expected.tolist()


@pytest.mark.parametrize("name", ["scout_no_temperature", "scout"])
def test_padding_on_either_side_changes_nothing(name):
    pads = (1, 3, 8)
    ids_BT = np.full((3, 45), PAD, np.int32)
    positions_BT = np.full((3, 45), -1, np.int32)
    for row, pad in enumerate(pads):
        ids_BT[row, pad : pad + 37] = closed_form.tokens(37)
        positions_BT[row, pad : pad + 37] = np.arange(37)
    logits_BTV = np.asarray(forward(build(TEXT_CASES[name]), ids_BT, positions_BT))
    stored = golden("hf_text")[name]
    stride = closed_form.VOCAB_SIZE // stored.shape[-1]
    for row, pad in enumerate(pads):
        logits = logits_BTV[row, pad : pad + 37]
        np.testing.assert_allclose(logits[:, ::stride], stored, atol=TOLERANCE)
        # transformers counts its temperature from the padding, so only without it does it agree.
        if name == "scout_no_temperature":
            padded = golden("hf_decode")[f"left_padded_{pad}"]
            np.testing.assert_allclose(logits[:, ::8], padded, atol=TOLERANCE)


def test_rows_of_different_lengths_decode_as_if_alone():
    model, lengths = build(TEXT_CASES["scout"]), (20, 13, 7)
    rows = [closed_form.tokens(37, row) for row in range(3)]
    ids_BT = np.stack(rows).astype(np.int32)
    alone = np.asarray(forward(model, ids_BT, np.tile(np.arange(37, dtype=np.int32), (3, 1))))
    np.testing.assert_allclose(alone[0], golden("hf_text")["scout"], atol=TOLERANCE)
    positions_BT = np.where(np.arange(20) < np.array(lengths)[:, None], np.arange(20), -1)
    prefill = quick_jit(lambda m, i, p, c: m(i, positions_BT=p, cache=c).cache)
    cache = prefill(model, ids_BT[:, :20], positions_BT.astype(np.int32), empty_cache(model, 3))
    np.testing.assert_array_equal(cache.lengths_B, lengths)
    for t in range(17):
        next_BT = np.stack([row[n + t : n + t + 1] for row, n in zip(rows, lengths, strict=True)])
        logits_BTV, cache = step(model, next_BT.astype(np.int32), cache)
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(logits_BTV[row, 0], alone[row, n + t], atol=TOLERANCE)
