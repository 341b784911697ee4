"""A paged cache gives the logits of a whole forward pass, wherever its pages lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax import parallel
from llama4_jax.cache.paged import Pools, page_bytes
from tests.tiny import CHUNK, build, scout_like

PAGE, PAGES = 4, 40
LENGTHS = (3, 21, 40, 13)
TEXT = scout_like().text
ROWS = len(LENGTHS)
WIDTH = 12  # pages of a row at most


def tokens_of(row, length=48):
    return np.random.default_rng(row).integers(4, TEXT.vocab_size, length)


@functools.cache
def whole_logits():
    tokens = np.stack([tokens_of(row) for row in range(ROWS)])
    return np.asarray(jax.jit(lambda m, t: m(t).logits_BTV)(build(scout_like()), tokens))


@jax.jit
def forward(model, pools, tokens_BT, positions_BT, whole_BW, chunk_BW):
    cache = pools.cache(TEXT, whole_BW, chunk_BW)
    output = model(tokens_BT, positions_BT=positions_BT, cache=cache)
    return output.logits_BTV, Pools.of(output.cache)


def make_pools(**how):
    how = {"whole_pages": PAGES, "chunk_pages": PAGES, "page_size": PAGE, "dtype": "float32"} | how
    return Pools.create(TEXT, **how)


def with_nan(pools):
    """Fill every page as a dead one is: reading it shows."""
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.dtype.kind == "f" else x, pools)


def read(model, pools, calls, seed=0):
    """Read rows in calls of (tokens, {row: (start, end)}); return the logits of each row."""
    rng = np.random.default_rng(seed)
    whole = rng.permutation(PAGES)[: ROWS * WIDTH // 2]
    whole_BW = np.zeros((ROWS, WIDTH), np.int32)
    taken = 0
    for row, length in enumerate(LENGTHS):
        count = -(-length // PAGE)
        whole_BW[row, :count] = whole[taken : taken + count]
        taken += count
    of_chunk = CHUNK // PAGE  # pages; even chunks of a row have some, odd chunks others
    chunk_Bcw = rng.permutation(PAGES)[: 2 * ROWS * of_chunk].reshape(ROWS, 2, of_chunk)
    found = [[] for _ in LENGTHS]
    for length, spans in calls:
        tokens_BT = np.zeros((ROWS, length), np.int32)
        positions_BT = np.full((ROWS, length), -1, np.int32)
        chunk_BW = np.zeros((ROWS, 2 * of_chunk), np.int32)
        for row, (start, end) in spans.items():
            tokens_BT[row, : end - start] = tokens_of(row)[start:end]
            positions_BT[row, : end - start] = np.arange(start, end)
            chunk_BW[row] = np.roll(chunk_Bcw[row], start // CHUNK, axis=0).ravel()
        logits, pools = forward(model, pools, tokens_BT, positions_BT, whole_BW, chunk_BW)
        for row, (start, end) in spans.items():
            found[row].append(np.asarray(logits)[row, : end - start])
    return [np.concatenate(parts) for parts in found]


def calls_of(most, lengths=LENGTHS):
    """Cut every row into calls of at most so many tokens, none over the end of the next chunk."""
    starts, calls = [0] * len(lengths), []
    while any(start < length for start, length in zip(starts, lengths, strict=True)):
        spans = {}
        for row, length in enumerate(lengths):
            end = min(starts[row] + most, length, (starts[row] // CHUNK + 2) * CHUNK)
            if end > starts[row]:
                spans[row] = (starts[row], end)
                starts[row] = end
        calls.append((most, spans))
    return calls


def check(logits, atol):
    for row, (found, length) in enumerate(zip(logits, LENGTHS, strict=True)):
        np.testing.assert_allclose(found, whole_logits()[row, :length], atol=atol)


# float32 logits of size 3, summed in another order
@pytest.mark.parametrize("most", [1, 3, 16])
def test_rows_read_in_pieces_equal_a_whole_forward_pass_and_no_dead_page_is_read(most):
    check(read(build(scout_like()), with_nan(make_pools()), calls_of(most)), 2e-4)


@pytest.mark.parametrize(
    ("mesh", "most"),
    [("context:2,tensor:2", 1), ("context:2,tensor:2", 16), ("data:2,expert:2", 16)],
)
def test_pages_may_lie_on_a_mesh(mesh, most):
    mesh = parallel.make_mesh(mesh)
    rules = parallel.serving_rules(dict(mesh.shape), num_kv_heads=TEXT.num_kv_heads)
    local = build(scout_like())
    with parallel.use_mesh(mesh, rules):
        shapes = parallel.abstract(lambda: type(local)(scout_like(), key=jax.random.key(0)))
        model = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), local, shapes)
        pools = jax.jit(lambda: with_nan(make_pools()))()
        check(read(model, pools, calls_of(most)), 2e-4)


# Logits have unit scale. int8 rounds by 1/254 of a head's largest number and float8 by 3 % of every
# number; five layers add up to 0.011 and 0.11. The median, because a rounding may choose another
# expert for a token, whose logits are then unlike.
@pytest.mark.parametrize(("kv_cache", "near"), [("int8", 0.02), ("fp8", 0.2)])
@pytest.mark.parametrize("most", [1, 16])
def test_eight_bit_pages_are_near(kv_cache, near, most):
    logits = read(build(scout_like()), make_pools(kv_cache=kv_cache), calls_of(most))
    for row, found in enumerate(logits):
        error = np.median(np.abs(found - whole_logits()[row, : len(found)]))
        assert 0 < error < near


def test_large_numbers_saturate_in_float8():
    store, _ = make_pools(kv_cache="fp8").slots[0]
    kept = store.encode(jnp.full((1, 1, 2, 8), 1e4)).data_GPKSH
    assert (kept.astype(jnp.float32) == 448).all()


@pytest.mark.parametrize(("kv_cache", "bytes_of_head"), [("auto", 32), ("int8", 12), ("fp8", 8)])
def test_bytes_of_a_page_are_those_of_its_layers(kv_cache, bytes_of_head):
    layers = len(TEXT.nope_layers), TEXT.num_layers - len(TEXT.nope_layers)
    of_layer = 2 * PAGE * TEXT.num_kv_heads * bytes_of_head
    found = page_bytes(TEXT, page_size=PAGE, dtype="float32", kv_cache=kv_cache)
    assert found == (layers[0] * of_layer, layers[1] * of_layer)
    assert make_pools(kv_cache=kv_cache).num_bytes == PAGES * sum(found)


def test_a_page_that_does_not_divide_a_chunk_is_refused():
    with pytest.raises(ValueError, match=r"page_size \(3\) must divide the chunk size \(8\)"):
        make_pools(page_size=3)
