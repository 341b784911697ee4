"""What kernels copy from HBM is kept there; `make kernels` asks the compilers whether it was."""

import jax
import pytest

import kernels_pallas
from kernels_pallas import chunked_attention, decode_attention, prefill_attention
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
