"""Packing loses nothing, mixes nothing and keeps pictures beside their tokens."""

import itertools

import numpy as np
import pytest

from llama4_jax.data.packing import LOOKAHEAD, BatchShape, Example, Packer, pack

PAD, PATCH = 0, 9
SIDE = 2


def text(tokens):
    return Example(np.array(tokens, np.int32), np.ones(len(tokens), np.float32))


def random_examples(rng, count, *, longest=40, pictures=0.5):
    """Documents of unique tokens; a pictured one has one patch token per tile, numbered alike."""
    serial, examples = itertools.count(100), []
    for _ in range(count):
        tokens = [next(serial) for _ in range(rng.integers(2, longest))]
        weights = rng.integers(0, 2, len(tokens)).astype(np.float32)
        tiles = None
        if rng.random() < pictures:
            patches = rng.integers(1, 4)
            tokens = tokens[: int(rng.integers(1, 10))] + [PATCH] * patches + tokens[-1:]
            weights = (np.array(tokens) != PATCH).astype(np.float32)
            tiles = np.full((patches, 3, SIDE, SIDE), 0, np.float32)
            tiles += np.array([tokens[0] + i / 8 for i in range(patches)])[:, None, None, None]
        examples.append(Example(np.array(tokens, np.int32), weights, tiles))
    return examples


def segments(batches):
    """Every segment of every row as (inputs, targets, weights, positions)."""
    for batch in batches:
        for row in range(len(batch["tokens_BT"])):
            numbers = batch["segments_BT"][row]
            for number in range(1, numbers.max() + 1):
                (places,) = np.nonzero(numbers == number)
                assert np.all(np.diff(places) == 1), "a segment is contiguous"
                yield tuple(
                    batch[name][row][places]
                    for name in ("tokens_BT", "targets_BT", "loss_mask_BT", "positions_BT")
                )


SHAPES = [(1, 16, 3), (4, 16, 3), (3, 64, 30), (2, 33, 4)]


@pytest.mark.parametrize("batch_size, row_length, num_tiles", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_every_slot_of_every_example_appears_exactly_once(batch_size, row_length, num_tiles, seed):
    examples = random_examples(np.random.default_rng(seed), 60)
    shape = BatchShape(
        batch_size=batch_size,
        row_length=row_length,
        pad_id=PAD,
        num_tiles=num_tiles,
        tile_size=SIDE,
    )
    slots = [
        slot
        for inputs, targets, weights, _ in segments(pack(examples, shape))
        for slot in zip(inputs.tolist(), targets.tolist(), weights.tolist(), strict=True)
    ]
    expected = [
        slot
        for e in examples
        for slot in zip(
            e.tokens_T[:-1].tolist(), e.tokens_T[1:].tolist(), e.weights_T[1:].tolist(), strict=True
        )
    ]
    assert sorted(slots) == sorted(expected)


def test_no_target_belongs_to_another_document():
    examples = random_examples(np.random.default_rng(1), 60, pictures=0)
    owner = {token: i for i, e in enumerate(examples) for token in e.tokens_T.tolist()}
    shape = BatchShape(batch_size=4, row_length=50, pad_id=PAD)
    for inputs, targets, _, _ in segments(pack(examples, shape)):
        assert len({owner[token] for token in [*inputs.tolist(), *targets.tolist()]}) == 1
        np.testing.assert_array_equal(inputs[1:], targets[:-1])


def test_positions_restart_in_every_segment_and_padding_is_marked_everywhere():
    examples = random_examples(np.random.default_rng(2), 40)
    shape = BatchShape(batch_size=3, row_length=30, pad_id=PAD, num_tiles=9, tile_size=SIDE)
    batches = list(pack(examples, shape))
    for _, _, _, positions in segments(batches):
        np.testing.assert_array_equal(positions, np.arange(len(positions)))
    for batch in batches:
        padding = batch["segments_BT"] == 0
        np.testing.assert_array_equal(padding, batch["positions_BT"] == -1)
        assert not batch["loss_mask_BT"][padding].any()
        assert (batch["tokens_BT"][padding] == PAD).all()


@pytest.mark.parametrize("batch_size, row_length, num_tiles", SHAPES)
def test_tiles_stand_in_the_order_of_their_patch_tokens(batch_size, row_length, num_tiles):
    examples = random_examples(np.random.default_rng(3), 60)
    shape = BatchShape(
        batch_size=batch_size,
        row_length=row_length,
        pad_id=PAD,
        num_tiles=num_tiles,
        tile_size=SIDE,
    )
    by_first = {int(e.tokens_T[0]): e for e in examples}
    seen = 0
    for batch in pack(examples, shape):
        expected = [
            by_first[int(inputs[0])].tiles_NCHW
            for inputs, _, _, _ in segments([batch])
            if PATCH in inputs
        ]
        expected = np.concatenate([np.zeros((0, 3, SIDE, SIDE)), *expected])
        assert batch["tiles_NCHW"].shape == (num_tiles, 3, SIDE, SIDE)
        assert (batch["tokens_BT"] == PATCH).sum() == len(expected)
        np.testing.assert_array_equal(batch["tiles_NCHW"][: len(expected)], expected)
        assert not batch["tiles_NCHW"][len(expected) :].any()
        seen += len(expected)
    assert seen == sum(e.num_tiles for e in examples)


def test_a_long_text_goes_on_in_the_next_row():
    shape = BatchShape(batch_size=2, row_length=4, pad_id=PAD)
    (batch,) = pack([text(range(10, 17))], shape)
    assert batch["tokens_BT"].tolist() == [[10, 11, 12, 13], [14, 15, PAD, PAD]]
    assert batch["targets_BT"].tolist() == [[11, 12, 13, 14], [15, 16, PAD, PAD]]
    assert batch["positions_BT"].tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]]
    assert batch["segments_BT"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["loss_mask_BT"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["loss_mask_BT"].dtype == np.float32
    assert "tiles_NCHW" not in batch


def test_a_text_without_weight_on_its_targets_carries_no_loss():
    example = Example(np.array([5, 6, 7], np.int32), np.array([1, 0, 2], np.float32))
    (batch,) = pack([example], BatchShape(batch_size=1, row_length=3, pad_id=PAD))
    assert batch["loss_mask_BT"].tolist() == [[0, 2, 0]]


def test_text_fills_rows_without_padding():
    examples = random_examples(np.random.default_rng(4), 300, pictures=0)
    shape = BatchShape(batch_size=4, row_length=64, pad_id=PAD)
    batches = list(pack(examples, shape))[:-1]
    filled = np.mean([batch["segments_BT"] > 0 for batch in batches])
    assert filled > 0.98


def test_a_picture_that_finds_no_tile_waits_without_stopping_the_text():
    pictured = [
        Example(
            np.array([100 + i, PATCH, 7], np.int32),
            np.ones(3, np.float32),
            np.ones((1, 3, SIDE, SIDE), np.float32),
        )
        for i in range(LOOKAHEAD // 2)
    ]
    shape = BatchShape(batch_size=2, row_length=40, pad_id=PAD, num_tiles=1, tile_size=SIDE)
    first, *_ = pack([*pictured, text(range(200, 290))], shape)
    assert (first["tokens_BT"] == PATCH).sum() == 1
    assert (first["segments_BT"] > 0).all()


def test_oversized_pictures_are_refused_with_both_numbers():
    big = Example(np.arange(9, dtype=np.int32), np.ones(9), np.ones((3, 3, SIDE, SIDE)))
    with pytest.raises(ValueError, match="3 tiles but a batch has only 2"):
        next(pack([big], BatchShape(batch_size=1, row_length=8, pad_id=PAD, num_tiles=2)))
    with pytest.raises(ValueError, match=r"8 slots .* row_length is 7"):
        next(pack([big], BatchShape(batch_size=1, row_length=7, pad_id=PAD, num_tiles=3)))


def test_an_example_needs_two_tokens_and_a_weight_for_each():
    with pytest.raises(ValueError, match="not 1 tokens and 1 weights"):
        text([3])
    with pytest.raises(ValueError, match="not 3 tokens and 2 weights"):
        Example(np.zeros(3, np.int32), np.zeros(2, np.float32))


def test_a_packer_goes_on_from_a_saved_state():
    examples = random_examples(np.random.default_rng(5), 80)
    shape = BatchShape(batch_size=2, row_length=48, pad_id=PAD, num_tiles=4, tile_size=SIDE)

    class Source:
        def __init__(self, place):
            self.place = place

        def draw(self):
            if self.place == len(examples):
                return None
            self.place += 1
            return examples[self.place - 1], self.place - 1

    source = Source(0)
    packer = Packer(shape, source.draw)
    for _ in range(5):
        packer.next_batch()
    state, place = packer.get_state(), source.place
    resumed = Packer(shape, Source(place).draw)
    resumed.set_state(state, lambda ticket: examples[ticket])
    assert state, "the test should save examples that wait"
    while (batch := packer.next_batch()) is not None:
        for name, array in resumed.next_batch().items():
            np.testing.assert_array_equal(array, batch[name])
    assert resumed.next_batch() is None
