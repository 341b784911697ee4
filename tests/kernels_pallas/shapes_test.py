"""Named shapes: the work they claim is the work that their own arrays ask for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import expert_mlp
from kernels_pallas.attention.visibility import visible
from kernels_pallas.shapes import SHAPES, Attention, Decode, Experts, Prefill

KEY = jax.random.key(0)
ATTENDING = [s for s in SHAPES.values() if not isinstance(s, Experts)]
SMALL = [s for s in ATTENDING if s.name.startswith(("odd", "nano", "vision"))]
EXPERTS = [s for s in SHAPES.values() if isinstance(s, Experts)]
SMALL_EXPERTS = [s for s in EXPERTS if s.name.startswith(("odd", "nano"))]
TINY = {"B": 1, "N": 2, "K": 1, "H": 4, "dtype": "float32"}


@functools.cache
def built(shape):
    return jax.jit(shape.build)(KEY)


def mask_of(shape, arrays):
    if isinstance(shape, Attention):
        segments = [arrays.get(name) for name in ("q_segments_BT", "kv_segments_BS")]
        q, kv = arrays["q_positions_BT"], arrays["kv_positions_BS"]
        if segments[0] is not None:
            segments = [segments[0][:, :, None], segments[1][:, None, :]]
        return visible(q[:, :, None], kv[:, None, :], *segments, shape.chunk_size)
    slots = jnp.arange(shape.S)
    held = slots < arrays["lengths_B"][:, None, None]
    return held & visible(arrays["q_positions_BT"][:, :, None], slots, None, None, shape.chunk_size)


def test_names_are_unique_and_every_shape_is_found_by_its_own():
    assert all(name == shape.name for name, shape in SHAPES.items())


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
def test_pairs_are_those_of_the_mask(shape):
    assert shape.pairs() == int(jax.jit(lambda arrays: mask_of(shape, arrays).sum())(built(shape)))


@pytest.mark.parametrize("shape", ATTENDING, ids=lambda shape: shape.name)
def test_bytes_are_at_least_those_of_the_arrays_that_are_read(shape):
    arrays = jax.eval_shape(shape.build, KEY)
    q = arrays["q_BTNH"].size * arrays["q_BTNH"].dtype.itemsize
    rest = [x for name, x in arrays.items() if name.startswith(("k_B", "v_B"))]
    stored = sum(x.size * x.dtype.itemsize for x in rest)
    is_full = isinstance(shape, Attention) or not shape.lengths
    if is_full:
        assert 2 * q + stored <= shape.bytes() <= 1.04 * (2 * q + stored)  # scales of int8
    else:
        assert shape.bytes() < 2 * q + stored


def test_a_chunk_of_three_by_hand():
    #   0 1 2 0 1   position in the chunk: 1 + 2 + 3 + 1 + 2 pairs
    shape = Attention(name="", T=5, chunk_size=3, **TINY)
    assert shape.pairs() == 9
    assert shape.flops() == 4 * 4 * 2 * 9
    assert shape.flops(backward=True) == 10 * 4 * 2 * 9
    # q and out are 32 bytes a token, k and v 16; going back also their gradients, out and lse.
    assert shape.bytes() == 5 * (32 + 32 + 16 + 16)
    assert shape.bytes(backward=True) == 5 * (4 * 32 + 4 * 16 + 8)
    # Blocks of two queries see keys 0..1, 0..3 (the block spans the chunks) and 3..4.
    assert shape.bytes_in_blocks(2) == 5 * 64 + (2 + 4 + 2) * 32


def test_blocks_of_packed_queries_read_their_own_segments():
    shape = Attention(name="", T=7, segments=(2, 4), padding=1, **TINY)
    # Tokens 0..1 of the first segment, then 2..5: blocks see 0..1, 2..3, 2..5 and padding nothing.
    assert shape.pairs() == 3 + 10
    assert shape.bytes_in_blocks(2) == 7 * 64 + (2 + 2 + 4) * 32


def test_a_cache_by_hand():
    shape = Decode(name="", S=10, T=2, lengths=(9,), chunk_size=4, **TINY)
    # Positions 7 and 8: four slots of their chunk, and the first of the next.
    assert shape.pairs() == 4 + 1
    assert shape.bytes() == 2 * 5 * 16 + 2 * 2 * 2 * 4 * 4
    assert shape.bytes(kv_block=8) == 2 * 16 * 16 + 2 * 2 * 2 * 4 * 4  # slots 0..15


def test_blocks_of_a_piece_by_hand():
    shape = Prefill(name="", S=10, T=5, lengths=(9,), chunk_size=4, **TINY)
    # Positions 4..8 in blocks of two: slots 4..5, 4..7 and 8, of 2 x 16 bytes each.
    assert shape.blocks_seen(2) == [(4, 6), (4, 8), (8, 9)]
    assert shape.bytes_in_blocks(2) == 2 * 16 * (2 + 4 + 1) + 2 * 5 * 2 * 4 * 4
    assert shape.bytes_in_blocks(2, 4) == 2 * 16 * (4 + 4 + 4) + 2 * 5 * 2 * 4 * 4


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
def test_what_nobody_sees_is_poison_and_all_else_is_not(shape):
    arrays = built(shape)
    poisoned = any(
        np.isnan(np.asarray(x).astype(np.float32)).any()
        for x in arrays.values()
        if jnp.issubdtype(x.dtype, jnp.inexact)
    )
    hidden = shape.padding if isinstance(shape, Attention) else shape.lengths
    assert poisoned == bool(hidden and getattr(shape, "dtype", None) != "int8")


def test_pages_hold_the_tokens_that_the_table_names():
    paged = SHAPES["odd_decode_fp8"]
    arrays = built(paged)
    k = np.asarray(arrays["k_BKSH"].astype(jnp.float32))[np.asarray(arrays["page_table_BP"])]
    k_BSKH = k.swapaxes(2, 3).reshape(paged.B, paged.S, paged.K, paged.H)
    for row, length in enumerate(paged.lengths):
        assert np.isfinite(k_BSKH[row, :length]).all() and np.isnan(k_BSKH[row, length:]).all()


def test_sizes_that_disagree_are_refused():
    with pytest.raises(ValueError, match="must add up to the 5 tokens"):
        Attention(name="", T=5, segments=(2, 2), **TINY)
    with pytest.raises(ValueError, match="lengths"):
        dataclasses.replace(SHAPES["odd_decode"], lengths=(1,))
    with pytest.raises(ValueError, match="pages of 128 slots"):
        dataclasses.replace(SHAPES["odd_decode_fp8"], S=1000)


@pytest.mark.parametrize("shape", EXPERTS, ids=lambda shape: shape.name)
def test_bytes_of_an_expert_are_those_of_its_arrays(shape):
    arrays = jax.eval_shape(shape.build, KEY)
    assert arrays["expert_TX"].shape == (shape.T, shape.X) == arrays["gate_TX"].shape
    stored = [x for name, x in arrays.items() if name.startswith("w")]
    of_all = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stored))
    assert of_all == shape.E * shape.matrices_bytes()


@pytest.mark.parametrize("shape", SMALL_EXPERTS, ids=lambda shape: shape.name)
def test_the_reference_takes_the_rows_of_experts_that_are_counted(shape):
    arrays = built(shape)
    real = shape.T - shape.padding
    for name in ("x_TD", "gate_TX"):
        assert np.isnan(np.asarray(arrays[name])[real:].astype(np.float32)).all()
    assert shape.sizes().sum() == real * shape.X
    run = jax.jit(functools.partial(expert_mlp, backend="reference"))
    y_TD = np.asarray(run(**arrays).astype(jnp.float32))
    base_TD = np.asarray(arrays["shared_TD"], np.float32) if shape.has_shared else 0 * y_TD
    moved_T = np.abs(y_TD - base_TD).max(1) > 0
    assert moved_T[:real].all() and not moved_T[real:].any()


def test_experts_by_hand():
    shape = Experts(name="", T=3, X=2, D=4, F=8, E=3, padding=1, dtype="float32")
    sizes = [int((shape.choices() == e).sum()) for e in range(3)]
    assert shape.sizes().tolist() == sizes and sum(sizes) == 4
    # Two tokens choose two different experts each, so two or three are hit.
    hit = sum(n > 0 for n in sizes)
    assert shape.flops() == 3 * 2 * 4 * 8 * 4 and shape.flops(backward=True) == 2 * shape.flops()
    assert shape.bytes() == hit * 3 * 4 * 8 * 4 + 2 * 3 * 4 * 4 + 2 * 4 * 8 * 4
    assert shape.bytes(backward=True) == (hit + 3) * 384 + 3 * 48 + 8 * 4 * 8 * 4


def test_routings_do_what_their_names_say():
    shape = SHAPES["odd_experts_hot"]
    assert shape.sizes().tolist() == [0, 0, 0, 697]
    sizes = SHAPES["odd_experts_empty"].sizes()
    assert (sizes[::2] == 0).all() and (sizes[1::2] > 0).all()
    assert not SHAPES["odd_experts_nobody"].sizes().any()
    assert SHAPES["scout_experts_1"].sizes().sum() == 1
    even = SHAPES["scout_experts_8k"].sizes()
    assert even.sum() == 8192 and even.min() > 400 and even.max() < 624


@pytest.mark.parametrize(
    ("known", "says"),
    [
        ({"X": 5}, "different experts"),
        ({"X": 2, "routing": "hot"}, "different experts"),
        ({"padding": 4}, "cannot exceed the 3 tokens"),
        ({"stored": "int3"}, "choose from float, int8"),
    ],
)
def test_experts_that_cannot_be_are_refused(known, says):
    with pytest.raises(ValueError, match=says):
        Experts(**{"name": "", "T": 3, "D": 4, "F": 8, "E": 4, **known})
