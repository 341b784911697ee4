import functools
import re

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import kernels_pallas
from kernels_pallas.experts import parallel
from kernels_pallas.experts.api import expert_mlp
from kernels_pallas.experts.dispatch import arrange, list_blocks
from kernels_pallas.experts.inputs import Arguments
from kernels_pallas.experts.parallel import buffer_rows, expert_mlp_parallel

D, F, T = 32, 48, 12  # tokens of one device


def chosen(how, devices, experts, choices):
    rng = np.random.default_rng(2)
    shape = (devices * T, choices)
    match how:
        case "evenly":
            return np.arange(shape[0] * choices).reshape(shape) % experts
        case "at random":
            return np.stack([rng.permutation(experts)[:choices] for _ in range(shape[0])])
        case "all one expert":
            return np.full(shape, experts - 1)
        case "never the first device":
            return rng.integers(experts // devices, experts, size=shape)
        case "no expert":
            return np.full(shape, experts)


def build(devices, experts, choices, how):
    rng = np.random.default_rng(0)
    arrays = (
        rng.normal(size=(devices * T, D)),
        *(rng.normal(size=(2, experts, D, F)) * D**-0.5),
        rng.normal(size=(experts, F, D)) * F**-0.5,
        rng.uniform(0.1, 1, size=(devices * T, choices)),
    )
    expert = jnp.int32(chosen(how, devices, experts, choices))
    return [jnp.float32(a) for a in arrays], expert


def whole(x, w_gate, w_up, w_down, gate, *, expert):
    return expert_mlp(x, w_gate, w_up, w_down, expert_TX=expert, gate_TX=gate)


def divided(x, w_gate, w_up, w_down, gate, *, expert, devices, **how):
    mesh = jax.make_mesh((devices,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))

    def one_device(x, w_gate, w_up, w_down, gate, expert):
        return expert_mlp_parallel(
            x, w_gate, w_up, w_down, expert_TX=expert, gate_TX=gate, axes="expert", **how
        )

    along = P("expert")
    run = jax.shard_map(
        one_device, mesh=mesh, in_specs=(along,) * 6, out_specs=along, check_vma=False
    )
    return run(x, w_gate, w_up, w_down, gate, expert)


CHOICES = ["evenly", "at random", "all one expert", "never the first device", "no expert"]


@pytest.mark.parametrize(
    ("devices", "how", "choices"),
    [*((4, how, 2) for how in CHOICES), (4, "at random", 1), (8, "all one expert", 1)],
)
def test_divided_experts_equal_whole_ones_whatever_the_routing(devices, how, choices):
    arrays, expert = build(devices, 2 * devices, choices, how)

    def both(function):
        def loss(*arrays):
            y = function(*arrays, expert=expert)
            return (jnp.cos(jnp.arange(y.size).reshape(y.shape)) * y).sum(), y

        return jax.jit(jax.value_and_grad(loss, argnums=range(5), has_aux=True))(*arrays)

    (_, ours), our_grads = both(functools.partial(divided, devices=devices))
    (_, theirs), their_grads = both(whole)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)  # sums of 48 in another order
    for a, b in zip(our_grads, their_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("load_factor", [0.1, 1.0, 8.0])
def test_the_size_of_buffers_changes_no_result(load_factor):
    arrays, expert = build(4, 8, 2, "at random")
    ours = divided(*arrays, expert=expert, devices=4, load_factor=load_factor)
    np.testing.assert_allclose(ours, whole(*arrays, expert=expert), atol=1e-5)


def test_buffers_hold_a_multiple_of_the_mean_and_not_the_worst_case():
    devices, tokens = 8, 400
    floats = [
        np.zeros(shape, np.float32) for shape in [(devices * tokens, D), (8, D, F), (8, F, D)]
    ]
    x, w_in, w_out = floats
    arrays = (x, w_in, w_in, w_out, x[:, :1])
    expert = np.zeros((devices * tokens, 1), np.int32)

    def sent(**how):
        run = functools.partial(divided, expert=expert, devices=devices, **how)
        text = str(jax.make_jaxpr(run)(*arrays))
        return {int(rows) for rows in re.findall(rf"f32\[8,(\d+),{D}\] = all_to_all", text)}

    assert sent(load_factor=2.0) == {100}
    assert sent() == {86}  # 50 and 5 times its square root
    assert sent(load_factor=0.5) == {25}


@pytest.mark.parametrize(
    ("devices", "rows"), [(8, 8), (16, 8), (64, 64), (16, 64), (16, 1024), (16, 8192)]
)
def test_even_routing_takes_one_round_however_few_the_rows(devices, rows):
    size = buffer_rows(rows, devices, 1.25)
    assert size <= max(16, 1.7 * rows / devices)
    shares = np.full(devices, 1 / devices)
    sent = np.random.default_rng(0).multinomial(rows, shares, size=(200, devices))
    assert np.ceil(sent.max((1, 2)) / size).mean() <= 1.1


@pytest.mark.parametrize("devices", [4, 8])
def test_devices_that_exchange_nothing_take_as_many_rounds(devices):
    """Along an axis that shards no expert, all wait for whoever needs most rounds."""
    types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, devices // 2), ("data", "expert"), axis_types=types)
    tokens, experts = 40, devices // 2
    chosen = np.zeros((devices, tokens, 1), np.int32)
    chosen[: devices // 2] = np.arange(tokens)[:, None] % experts  # evenly, but for the others

    def rounds(expert):
        plan = parallel._Static("expert", 1, 0.5, None, "xla")
        none = jnp.zeros((tokens, 1))
        given = Arguments.checked(none, *(jnp.zeros((1, 1, 1)),) * 3, expert[0], none, *(None,) * 3)
        return parallel._Buffers.of(plan, given).rounds[None]

    spec = P(("data", "expert"))
    run = jax.shard_map(rounds, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    # A device of the others sends all its rows to one, half the mean in a round.
    np.testing.assert_array_equal(run(chosen), np.full(devices, devices))


def test_a_load_factor_that_moves_nothing_is_refused():
    arrays, expert = build(4, 8, 1, "evenly")
    with pytest.raises(ValueError, match=r"load_factor \(0\)"):
        divided(*arrays, expert=expert, devices=4, load_factor=0)


def estimated_products(function, *arrays):
    """FLOPs that the kernels in a function say they take."""

    def inside(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                yield equation.params["cost_estimate"].flops
            else:
                for inner in jax.tree.leaves(list(equation.params.values())):
                    if isinstance(inner, (jex.Jaxpr, jex.ClosedJaxpr)):
                        yield from inside(getattr(inner, "jaxpr", inner))

    with kernels_pallas.interpreted():
        return sum(inside(jax.make_jaxpr(function)(*arrays).jaxpr))


def test_kernels_estimate_the_rows_that_are_expected_and_not_the_places_of_buffers():
    devices, depth, width, tokens = 4, 128, 256, 40
    rng = np.random.default_rng(0)
    x = rng.normal(size=(devices * tokens, depth))
    w_gate, w_up = rng.normal(size=(2, devices, depth, width))
    w_down, gate = rng.normal(size=(devices, width, depth)), np.ones((devices * tokens, 1))
    arrays = [jnp.float32(a) for a in (x, w_gate, w_up, w_down, gate)]
    expert = jnp.zeros((devices * tokens, 1), jnp.int32)

    def apply(*arrays):
        return divided(*arrays, expert=expert, devices=devices, backend="tpu")

    forward = 6 * tokens * depth * width  # each device has the mean
    assert estimated_products(apply, *arrays) == forward

    def pull(*arrays):
        y, slopes = jax.vjp(apply, *arrays)
        return slopes(y)

    # Forward, forward again, and six products, which are twice the three of the forward pass.
    assert estimated_products(pull, *arrays) == 4 * forward


def test_places_of_a_buffer_that_hold_no_row_are_in_no_block():
    held = np.repeat(np.arange(4), 20)
    for empty in (0, 10, 500):
        expert = jnp.int32(np.concatenate([held, np.full(empty, -1)]))
        for unit in (1, 8):
            assert list_blocks(arrange(expert, 4, unit), 8, unit=unit).total == 4 * 3
