"""Operations inside a `jax.shard_map` that checks over which mesh axes arrays vary."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import kernels_pallas
from kernels_pallas import backend
from kernels_pallas.attention.api import chunked_attention, merge_attention
from kernels_pallas.decode.api import decode_attention
from kernels_pallas.experts.api import expert_mlp
from kernels_pallas.experts.parallel import expert_mlp_parallel

SHARDS, S, N, K, H = 2, 16, 2, 1, 64


def checked(function, in_specs, out_specs):
    mesh = jax.make_mesh((SHARDS,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    run = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)
    return jax.jit(run)


def simulated(name):
    return contextlib.nullcontext() if name == "reference" else kernels_pallas.interpreted()


def rows(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, S, n, H)), dtype) for n in (N, K, K))
    return q, k, v, jnp.arange(S, dtype=jnp.int32)[None]


@pytest.mark.parametrize("name", ["reference", "tpu"])
def test_gradients_of_keys_that_all_shards_have_are_summed_over_shards_of_queries(name):
    q, k, v, positions = rows()

    def loss(q, k, v, q_positions, kv_positions):
        where = {"q_positions_BT": q_positions, "kv_positions_BS": kv_positions}
        out = chunked_attention(q, k, v, **where, chunk_size=8, backend=name)
        assert isinstance(out, jax.Array)
        return (out * jnp.cos(q)).sum()

    def slopes(*arrays):
        return jax.grad(loss, argnums=(0, 1, 2))(*arrays)

    divided, whole = P(None, "x"), P()
    run = checked(slopes, (divided, whole, whole, divided, whole), (divided, whole, whole))
    with simulated(name):
        ours = run(q, k, v, positions, positions)
        theirs = jax.jit(slopes)(q, k, v, positions, positions)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("name", ["reference", "tpu"])
def test_shards_of_a_cache_are_merged(name):
    q, k, v, positions = rows()
    lengths = jnp.int32([S - 3])

    def attend(q, k, v, lengths, positions, first):
        out, lse = decode_attention(
            q, k, v, lengths_B=jnp.clip(lengths - first, 0, S // SHARDS), kv_start_B=first,
            q_positions_BT=positions, return_lse=True, backend=name,
        )  # fmt: skip
        outs, lses = (jax.lax.all_gather(a, "x") for a in (out, lse))
        return jax.lax.pmean(merge_attention(outs, lses)[0], "x")

    keys = P(None, "x")
    run = checked(attend, (P(), keys, keys, P(), P(), P("x")), P())
    q, positions, first = q[:, -4:-3], positions[:, -4:-3], jnp.int32([0, S // SHARDS])
    with simulated(name):
        ours = run(q, k, v, lengths, positions, first)
    theirs = decode_attention(
        q, k, v, lengths_B=lengths, q_positions_BT=positions, backend="reference"
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)  # float32 sums in another order


def test_gradients_of_experts_that_all_shards_have_are_summed_and_of_divided_ones_are_not():
    rng = np.random.default_rng(0)
    x, w_gate, w_up, w_down = (
        jnp.float32(rng.normal(size=s) / 4) for s in [(S, 8), *[(2, 8, 8)] * 3]
    )
    expert, gate = jnp.int32(rng.integers(0, 2, size=(S, 1))), jnp.ones((S, 1))

    def slopes(apply):
        def loss(x, w_gate, w_up, w_down, gate, expert):
            y = apply(x, w_gate, w_up, w_down, expert_TX=expert, gate_TX=gate)
            return (y * jnp.cos(x)).sum()

        return jax.grad(loss, argnums=range(5))

    arrays, along = (x, w_gate, w_up, w_down, gate, expert), P("x")
    want = jax.jit(slopes(expert_mlp))(*arrays)
    for apply, w in ((expert_mlp, P()), (functools.partial(expert_mlp_parallel, axes="x"), along)):
        run = checked(slopes(apply), (along, w, w, w, along, along), (along, w, w, w, along))
        for a, b in zip(run(*arrays), want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)  # float32 sums in another order


def test_attention_on_gpus_says_that_it_cannot_be_checked():
    q, k, v, positions = rows(jnp.bfloat16)

    def attend(q, k, v, positions):
        where = {"q_positions_BT": positions, "kv_positions_BS": positions}
        return chunked_attention(q, k, v, **where, backend="gpu")

    with simulated("gpu"), pytest.raises(NotImplementedError, match="check_vma=False"):
        checked(attend, (P("x"),) * 4, P("x"))(
            *(jnp.tile(a, (2,) + (1,) * (a.ndim - 1)) for a in (q, k, v, positions))
        )


def test_arrays_that_vary_over_some_axes_come_to_vary_over_all_of_these():
    def types(a, b):
        a, b = backend.vary_alike((a, b))
        assert a.shape == (4,) and b.shape == (2,)
        return jax.typeof(a).manual_axis_type.varying, jax.typeof(b).manual_axis_type.varying

    def run(a, b):
        assert types(a, b) == ({"x", "y"},) * 2
        assert types(a, jnp.zeros(2)) == ({"x"},) * 2
        return b

    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P("x"), P("y")), out_specs=P("y")))(
        jnp.zeros(8), jnp.zeros(4)
    )
    assert types(jnp.zeros(4), jnp.zeros(2)) == (set(), set())
