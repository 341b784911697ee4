"""Batches hold every row once, similar lengths together, within the bounds."""

from llama4_jax.serve.batches import group as group_in_windows


def group(lengths, *, window=100, **bounds):
    return group_in_windows(lengths, window=window, **bounds)


def test_every_row_is_in_one_batch_and_neighbours_have_similar_lengths():
    lengths = [900, 3, 20, 4, 800, 5]
    batches = list(group(lengths, max_rows=2, max_tokens=10_000))
    assert batches == [[1, 3], [5, 2], [4, 0]]


def test_a_long_row_is_alone():
    assert list(group([10, 10, 5000], max_rows=8, max_tokens=1000)) == [[0, 1], [2]]


def test_padding_counts_toward_the_bound():
    # A third row of 16 makes the batch four rows of 16.
    assert list(group([16, 16, 16], max_rows=8, max_tokens=48)) == [[0, 1], [2]]


def test_no_rows_make_no_batches():
    assert list(group([], max_rows=8, max_tokens=1000)) == []


def test_a_window_is_complete_before_the_next_begins():
    batches = list(group([9, 8, 7, 1], max_rows=8, max_tokens=1000, window=2))
    assert batches == [[1, 0], [3, 2]]
