"""What kernels copy from HBM is kept there; `make kernels` asks the compilers whether it was."""

import jax
import jax.numpy as jnp
import pytest

import kernels_pallas
from kernels_pallas import (
    chunked_attention,
    decode_attention,
    expert_mlp,
    expert_mlp_parallel,
    prefill_attention,
)
from kernels_pallas.shapes import SHAPES, Attention, Prefill


def bodies(eqn):
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each


def unpinned(jaxpr):
    """Count the operands of kernels that are declared in HBM, and name those not kept there."""
    made_by = {var: eqn.primitive.name for eqn in jaxpr.eqns for var in eqn.outvars}
    count, found = 0, []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name != "pallas_call":
            for body in bodies(eqn):
                more, names = unpinned(body)
                count, found = count + more, found + names
            continue
        mapping = eqn.params["grid_mapping"]
        blocks = mapping.block_mappings[: mapping.num_inputs]
        operands = eqn.invars[len(eqn.invars) - len(blocks) :]
        for var, block in zip(operands, blocks, strict=True):
            if str(block.transformed_block_aval.memory_space) == "hbm":
                count += 1
                if made_by.get(var) != "with_memory_space_constraint":
                    found.append(block.origin)
    return count, found


@pytest.mark.parametrize(
    ("name", "operands"),
    [
        ("odd_packed", 3 + 3 + 4),  # forward; dq; dk and dv
        ("odd_decode_32", 2 + 1),
        ("odd_decode_int8", 2 + 2 + 1),
        ("odd_prefill", 2 + 1),
        ("odd_prefill_int8", 2 + 2 + 1),
    ],
)
def test_operands_that_kernels_copy_from_hbm_are_kept_there(name, operands):
    shape = SHAPES[name]
    arrays = jax.eval_shape(shape.build, jax.random.key(0))
    how = {"backend": "tpu", "chunk_size": shape.chunk_size}

    def both(arrays):
        out, pull = jax.vjp(
            lambda q: chunked_attention(**arrays | {"q_BTNH": q}, **how), arrays["q_BTNH"]
        )
        return pull(out)

    def one(arrays):
        operation = prefill_attention if isinstance(shape, Prefill) else decode_attention
        return operation(**shape.arguments(arrays), **how)

    with kernels_pallas.interpreted():
        jaxpr = jax.make_jaxpr(both if isinstance(shape, Attention) else one)(arrays)
    assert unpinned(jaxpr.jaxpr) == (operands, [])


@pytest.mark.parametrize(
    ("name", "operands"),
    [
        ("odd_experts", 3 + (4 + 1 + 2) + 3 * 2),  # forward; rows, back; gradients of matrices
        ("odd_experts_int4", 3),
        ("odd_experts_fp8", 3),
    ],
)
def test_operands_that_kernels_of_experts_copy_from_hbm_are_kept_there(name, operands):
    shape = SHAPES[name]
    arrays = jax.eval_shape(shape.build, jax.random.key(0))
    floats = ("x_TD", "w_gate_EDF", "w_up_EDF", "w_down_EFD", "gate_TX")

    def both(arrays):
        given = {name: arrays[name] for name in floats}
        out, pull = jax.vjp(lambda given: expert_mlp(**arrays | given, backend="tpu"), given)
        return pull(out)

    def one(arrays):
        return expert_mlp(**arrays, backend="tpu")

    with kernels_pallas.interpreted():
        jaxpr = jax.make_jaxpr(both if shape.stored == "float" else one)(arrays)
    assert unpinned(jaxpr.jaxpr) == (operands, [])


def test_what_experts_exchange_by_remote_copies_is_kept_in_hbm():
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("expert")

    def one_device(x, expert):
        w = jnp.zeros((1, 128, 128))
        return expert_mlp_parallel(
            x, w, w, w, expert_TX=expert, gate_TX=x[:, :1], axes="expert", transport="dma"
        )

    run = jax.shard_map(one_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    with kernels_pallas.interpreted():
        jaxpr = jax.make_jaxpr(run)(jnp.zeros((32, 128)), jnp.zeros((32, 1), jnp.int32))
    assert unpinned(jaxpr.jaxpr) == (5, [])
