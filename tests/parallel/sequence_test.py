"""Keys travel as far as some query sees, and packed rows over devices attend as whole ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax import parallel
from llama4_jax.config import Visibility
from llama4_jax.parallel.sequence import ring_hops, self_attention

CHUNK, LENGTH, SHARDS = 8, 48, 4


@pytest.mark.parametrize(
    ("tokens", "chunk", "order", "hops"),
    [
        (12, None, "row", 3),  # everything earlier: the whole ring
        (12, 8, "any", 3),
        (8, 8, "row", 0),  # whole chunks
        (16, 8, "row", 0),
        (8, 8, "segments", 1),  # a segment's chunk may begin 7 tokens before the shard
        (7, 8, "segments", 1),
        (6, 8, "segments", 2),
        (12, 8, "row", 1),
        (2, 8, "segments", 3),  # no more than there are
        (12, 1, "segments", 0),  # every token on its own
    ],
)
def test_hops_by_hand(tokens, chunk, order, hops):
    assert ring_hops(SHARDS, tokens, chunk, order) == hops


def packed():
    """Return q, k, v, positions and segments of a row of three documents and padding."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((1, LENGTH, 4, 16), (1, LENGTH, 2, 16), (1, LENGTH, 2, 16))
    qkv = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    lengths = (5, 27, 13)
    positions = np.concatenate([*map(np.arange, lengths), [-1] * (LENGTH - sum(lengths))])
    segments = np.repeat([0, 1, 2, 3], [*lengths, LENGTH - sum(lengths)])
    return *qkv, jnp.asarray(positions[None], jnp.int32), jnp.asarray(segments[None], jnp.int32)


def attend(order, chunk):
    def run(q, k, v, positions, segments):
        return self_attention(
            q, k, v,
            positions_BT=positions, segments_BT=segments, order=order, visibility=Visibility(chunk),
        )  # fmt: skip

    return jax.jit(run)


@pytest.mark.parametrize("chunk", [CHUNK, None])
@pytest.mark.parametrize("order", ["segments", "any"])
def test_packed_rows_over_devices_attend_as_whole_ones(order, chunk):
    arrays = packed()
    is_real = np.asarray(arrays[3])[..., None, None] >= 0
    expected = attend(order, chunk)(*arrays)
    with parallel.use_mesh(parallel.make_mesh("context:4"), parallel.PRESETS["long_context"]):
        found = attend(order, chunk)(*arrays)
    np.testing.assert_allclose(
        np.where(is_real, found, 0), np.where(is_real, expected, 0), rtol=1e-5, atol=1e-6
    )


def test_what_is_known_of_positions_saves_travel():
    def permutes(order):
        with parallel.use_mesh(parallel.make_mesh("context:4"), parallel.PRESETS["long_context"]):
            jaxpr = attend(order, CHUNK).trace(*packed()).jaxpr
        text = str(jaxpr)
        (length,) = {int(part.split()[0]) for part in text.split("length=")[1:]}
        return length

    assert permutes("segments") == 1 and permutes("any") == 3
