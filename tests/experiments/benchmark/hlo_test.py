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


def run_bytes(function, *arguments, **how):
    text = jax.jit(function, **how).lower(*arguments).compile().as_text()
    program = hlo.parse(text)
    return hlo.bytes_of_run(program, hlo.entry_of(text)), hlo.copies_of_kept(text, program)


def test_a_loop_moves_what_its_body_does_as_often_as_it_runs():
    def scan(x, stack):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, stack)[0]

    few, many = (run_bytes(scan, jnp.ones((8, 256)), jnp.ones((n, 256, 256)))[0] for n in (3, 12))
    assert few > 4 * 3 * 256 * 256
    assert many == pytest.approx(4 * few, rel=0.05)


def test_of_alternatives_the_cheapest_is_counted():
    text = """
%cheap (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %n = f32[4]{0} negate(%p)
}

%dear (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  %m = f32[4]{0} negate(%q)
  ROOT %o = f32[4]{0} negate(%m)
}

ENTRY %main (a: f32[4], b: pred[]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %b = pred[] parameter(1)
  ROOT %c = f32[4]{0} conditional(%b, %a, %a), true_computation=%dear, false_computation=%cheap
}
"""
    assert hlo.bytes_of_run(hlo.parse(text), "main") == 32


def test_a_kernel_counts_as_it_says_and_other_memories_as_nothing():
    text = """
ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %near = f32[4]{0:T(128)S(1)} negate(%a)
  %k = f32[4]{0} custom-call(%near), custom_call_target="tpu_custom_call", \
backend_config={"cost_estimate":{"flops":"9","bytes_accessed":"1000"}}
  ROOT %r = f32[4]{0} negate(%near)
}
"""
    assert hlo.bytes_of_run(hlo.parse(text), "main") == 16 + 1000 + 16


def test_pages_that_are_updated_in_place_are_no_copies_and_turned_ones_are():
    pages, new = jnp.ones((3, 5, 2, 8, 16)), jnp.zeros((2, 8, 16))
    update = lambda pages, new: pages.at[1, 2].set(new)  # noqa: E731
    assert not run_bytes(update, pages, new, donate_argnums=0)[1]

    def spoil(pages, new):
        turned = jax.lax.optimization_barrier(pages.swapaxes(0, 1)).swapaxes(0, 1)
        return update(turned, new)

    (fault, *_) = run_bytes(spoil, jnp.ones_like(pages), new, donate_argnums=0)[1]
    assert "bytes of pages" in fault
