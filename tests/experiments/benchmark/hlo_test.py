"""The text of a program tells what it moves, multiplies and exchanges."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmark import hlo


def compiled(function, *arguments):
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_product_reads_both_matrices_and_writes_one():
    program = compiled(lambda x, y: x @ y, jnp.ones((64, 128)), jnp.ones((128, 32)))
    assert hlo.bytes_moved(program) == 4 * (64 * 128 + 128 * 32 + 64 * 32)
    assert hlo.product_flops(program) == 2 * 64 * 128 * 32


def test_a_slice_of_a_stack_is_all_that_is_read_of_it():
    stack = jnp.ones((12, 64, 128))
    program = compiled(lambda x, i: x[i] * 2, stack, jnp.int32(3))
    assert hlo.bytes_moved(program) == pytest.approx(4 * 2 * 64 * 128, rel=0.01)  # and the index


def test_a_program_without_operations_moves_nothing():
    assert hlo.bytes_moved(hlo.parse("")) == hlo.product_flops(hlo.parse("")) == 0


def test_the_products_of_a_gpu_program_are_counted():
    text = """
  %a = bf16[16,896,320]{2,1,0} parameter(0)
  %b = bf16[16,320,64]{2,1,0} parameter(1)
  %dot.1 = f32[16,896,64]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}
  %call = (bf16[320,128]{1,0}, s8[64]{0}) custom-call(%c, %d), custom_call_target="__cublas$gemm", \
backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"]}}
  %c = bf16[500,320]{1,0} parameter(2)
"""
    flops = 2 * (16 * 896 * 64 * 320 + 320 * 128 * 500)
    assert hlo.product_flops(hlo.parse(text)) == flops


def test_collectives_are_counted_where_they_begin():
    text = """
  %x = f32[8]{0} parameter(0)
  %s = f32[8]{0} all-reduce-start(%x), metadata={op_name="jit(f)/while/body/slot_0/add"}
  %d = f32[8]{0} all-reduce-done(%s)
  %g = f32[16]{0} all-gather(%d), dimensions={0}
"""
    operations = [op for ops in hlo.parse(text).values() for op in ops]
    assert hlo.count_collectives(operations) == {"all-reduce": 1, "all-gather": 1}
    assert [hlo.is_collective(op) for op in operations] == [False, True, False, True]
