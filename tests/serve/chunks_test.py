"""PrefillChunks hold every token once, in few shapes, and never cut a tile."""

import numpy as np
import pytest

from llama4_jax.serve.chunks import Row, bucket, split_prompts

PATCH = 999


def row(tokens, tokens_per_tile=4):
    tokens_T = np.asarray(tokens, np.int32)
    slots = np.flatnonzero(tokens_T == PATCH).reshape(-1, tokens_per_tile)
    tiles = np.arange(1, len(slots) + 1, dtype=np.float32)[:, None, None, None]
    return Row(tokens_T=tokens_T, tiles_NCHW=tiles, tile_spans_N2=slots[:, [0, -1]])


def chunks_of(rows, *, chunk_length=16, num_rows=None):
    return list(
        split_prompts(rows, num_rows=num_rows or len(rows), chunk_length=chunk_length, pad_id=0)
    )


@pytest.mark.parametrize(("size", "rounded"), [(0, 1), (1, 1), (2, 2), (3, 4), (8, 8), (9, 16)])
def test_a_bucket_is_the_next_power_of_two(size, rounded):
    assert bucket(size) == rounded


def test_chunks_hold_every_token_once_and_in_order():
    lengths = (1, 70, 16, 33)
    rows = [row(range(1, n + 1)) for n in lengths]
    chunks = chunks_of(rows, num_rows=6)
    for index in range(6):
        length = lengths[index] if index < 4 else 0
        tokens = [t for p in chunks for t in p.tokens_BT[index][p.positions_BT[index] >= 0]]
        positions = [p for chunk in chunks for p in chunk.positions_BT[index] if p >= 0]
        assert tokens == list(range(1, length + 1))
        assert positions == list(range(length))


def test_a_stretch_stands_at_the_left_of_its_chunk():
    for chunk in chunks_of([row(range(5)), row(range(21))]):
        for positions_T, length in zip(chunk.positions_BT, chunk.lengths_B, strict=True):
            assert (positions_T[:length] >= 0).all()
            assert (positions_T[length:] == -1).all()


def test_shapes_are_powers_of_two_up_to_the_chunk_length():
    cuts = [chunks_of([row(range(n))], chunk_length=64) for n in range(1, 200)]
    shapes = {chunk.tokens_BT.shape[1] for chunks in cuts for chunk in chunks}
    assert shapes == {16, 32, 64}


def test_a_tile_is_never_cut_and_comes_with_its_first_patch():
    text = list(range(1, 15))  # 14 tokens, so that the first tile would straddle place 16
    rows = [row(text + [PATCH] * 8 + [1]), row([PATCH] * 4 + text + [PATCH] * 4)]
    first, second, *rest = chunks_of(rows)
    assert list(first.lengths_B) == [14, 16]
    assert list(first.tiles_NCHW.ravel()) == [1]  # row 1's first
    assert list(second.lengths_B) == [9, 6]
    assert list(second.tiles_NCHW.ravel()) == [1, 2, 2, 0]  # row 0's two, row 1's second, a blank
    assert rest == []


def test_a_tile_longer_than_a_chunk_lengthens_the_chunk():
    (chunk,) = chunks_of([row([PATCH] * 32, tokens_per_tile=32)])
    assert chunk.tokens_BT.shape == (1, 32)


def test_chunks_without_patches_carry_no_tiles():
    chunks = chunks_of([row([PATCH] * 4 + [1] * 40)])
    assert [chunk.tiles_NCHW is None for chunk in chunks] == [False, True, True]
