import jax
import jax.numpy as jnp
import pytest

from experiments.benchmark.hlo_bytes import bytes_moved


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_a_product_reads_both_matrices_and_writes_one():
    text = compiled(lambda x, y: x @ y, jnp.ones((64, 128)), jnp.ones((128, 32)))
    assert bytes_moved(text) == 4 * (64 * 128 + 128 * 32 + 64 * 32)


def test_a_slice_of_a_stack_is_all_that_is_read_of_it():
    stack = jnp.ones((12, 64, 128))
    text = compiled(lambda x, i: x[i] * 2, stack, jnp.int32(3))
    assert bytes_moved(text) == pytest.approx(4 * 2 * 64 * 128, rel=0.01)  # and the index


def test_a_program_without_operations_moves_nothing():
    assert bytes_moved("") is None
