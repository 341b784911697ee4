import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas import backend, tuning
from kernels_pallas.experts.api import expert_mlp
from kernels_pallas.experts.parallel import expert_mlp_parallel
from kernels_pallas.experts.tpu_remote import exchange
from kernels_pallas.experts.tpu_remote.exchange import collective

D, F = 128, 256


def lengths(how, rng, devices, rows):
    """Rows from each device to each, at most `rows`."""
    shape = (devices, devices)
    match how:
        case "ragged":
            return rng.integers(0, rows + 1, size=shape)
        case "full":
            return np.full(shape, rows)
        case "all to one device":
            return np.where(np.arange(devices) == 1, rows, np.zeros(shape, int))
        case "one device idle":
            return rng.integers(0, rows + 1, size=shape) * (np.arange(devices) != 2)
        case "no expert":
            return np.zeros(shape, int)


def build(how, devices, rows, experts, dtype, layers=1, hidden=F):
    """Queues and matrices of all devices; places without a row hold NaN."""
    rng = np.random.default_rng(3)
    is_row = np.arange(rows) < lengths(how, rng, devices, rows)[..., None]
    expert = np.sort(rng.integers(0, experts, size=is_row.shape), axis=-1)
    if how == "all to one device":
        expert[:] = experts - 1
    x = np.where(is_row[..., None], rng.normal(size=(*is_row.shape, D)), np.nan)
    gate = rng.uniform(0.1, 1, size=is_row.shape)
    many = (devices, layers * experts)
    gate_up = rng.normal(size=(2, *many, D, hidden)) * D**-0.5
    down = rng.normal(size=(*many, hidden, D)) * hidden**-0.5
    floats = [jnp.asarray(a, dtype) for a in (x, gate, *gate_up, down)]
    return floats, np.where(is_row, expert, -1).astype(np.int32)


class Rings:
    """Queues of all devices, which stand in rings of peers, and what runs on one of them."""

    def __init__(
        self,
        how,
        mesh_shape,
        names,
        axes,
        *,
        rows=24,
        experts=3,
        dtype=jnp.float32,
        layer=0,
        ring=1,
        hidden=F,
    ):
        self.devices = int(np.prod(mesh_shape))
        self.peers, self.rows, self.experts, self.dtype = self.devices // ring, rows, experts, dtype
        self.mesh_shape, self.names, self.axes, self.layer = mesh_shape, names, axes, layer
        sizes = (rows, experts, dtype, layer + 1, hidden)
        parts = [build(how, self.peers, *sizes) for _ in range(ring)]
        floats = [jnp.concatenate(a) for a in zip(*(part[0] for part in parts), strict=True)]
        rings_differ = 1 + jnp.arange(self.devices, dtype=dtype).reshape(-1, 1, 1, 1)
        self.x, self.gate, self.weights = floats[0] * rings_differ, floats[1], floats[2:]
        self.expert = jnp.asarray(np.concatenate([part[1] for part in parts]))

    def run(self, kernel, *queues):
        """Run a kernel on all devices, on queues and then gates, experts and matrices."""
        types = (jax.sharding.AxisType.Auto,) * len(self.names)
        mesh = jax.make_mesh(self.mesh_shape, self.names, axis_types=types)
        first, along = jnp.int32(self.layer * self.experts), P(self.names)

        def one_device(*arrays):
            result = kernel(*(a[0] for a in arrays), first, num_local=self.experts, axes=self.axes)
            return jax.tree.map(lambda a: a[None], result)

        arrays = (*queues, self.gate, self.expert, *self.weights)
        divided = jax.shard_map(
            one_device, mesh=mesh, in_specs=along, out_specs=along, check_vma=False
        )
        with backend.interpreted():
            return jax.tree.map(lambda a: np.asarray(a, np.float32), jax.jit(divided)(*arrays))

    def each(self):
        """List devices with the peers that send to it, its number for them, and its matrices."""
        chosen = slice(self.layer * self.experts, (self.layer + 1) * self.experts)
        for device in range(self.devices):
            first = device // self.peers * self.peers
            senders = np.arange(first, first + self.peers)
            yield device, senders, device % self.peers, [w[device, chosen] for w in self.weights]

    def sent(self, array, senders, here):
        """Join what some devices send to one."""
        return jnp.concatenate([array[s, here] for s in senders])


@jax.jit
def one_by_one(expert, x, gate, *weights):
    """Apply a device's experts to all it received."""
    choices = {"expert_TX": expert[:, None], "gate_TX": gate[:, None]}
    return expert_mlp(x, *weights, **choices, backend="reference")


def check(*args, **how):
    """Compare each device with its experts applied to all it received, one by one."""
    rings = Rings(*args, **how)
    bound = 1e-4 if rings.dtype == jnp.float32 else 0.05
    y = rings.run(exchange.exchange_and_apply, rings.x)
    for _, senders, here, weights in rings.each():
        expert, x, gate = (
            rings.sent(a, senders, here) for a in (rings.expert, rings.x, rings.gate)
        )
        theirs = np.asarray(one_by_one(expert, x, gate, *weights), np.float32)
        is_row = np.asarray(rings.expert[senders, here]) >= 0
        theirs = theirs.reshape(rings.peers, rings.rows, D)
        np.testing.assert_allclose(y[senders, here][is_row], theirs[is_row], atol=bound, rtol=0.02)


HOW = ["ragged", "full", "all to one device", "one device idle", "no expert"]


@pytest.mark.parametrize("how", HOW)
def test_rows_return_from_their_experts_whatever_the_routing(how):
    check(how, (4,), ("expert",), "expert")


@pytest.mark.parametrize("how", ["ragged", "all to one device"])
def test_eight_devices(how):
    check(how, (8,), ("expert",), "expert", rows=9, experts=1)


@pytest.mark.parametrize(("how", "cores"), [("ragged", 2), ("one device idle", 1)])
def test_buffers_of_several_blocks_and_cores_that_share_them(how, cores):
    sizes = {"block": 16, "group": 16, "chunk": 8, "tile": 128, "cores": cores}
    with tuning.overridden({"expert_mlp.exchange": sizes}):
        check(how, (4,), ("expert",), "expert", rows=30)


def test_bfloat16_rows_and_the_matrices_of_a_layer_among_several():
    check("ragged", (4,), ("expert",), "expert", dtype=jnp.bfloat16, layer=1)


def test_devices_are_found_along_their_axis_of_a_mesh_of_several():
    check("ragged", (2, 4), ("fsdp", "expert"), "expert", rows=9, experts=2, ring=2)


def test_experts_divided_over_two_axes():
    check("ragged", (2, 4), ("fsdp", "expert"), ("fsdp", "expert"), rows=9, experts=1)


def test_what_does_not_fit_is_refused_with_the_reason():
    def unsupported_reason(peers=4, rows=64, shape=(2, 128, 256), dtype=jnp.bfloat16, num_local=2):
        w = jax.ShapeDtypeStruct(shape, dtype)
        return exchange.unsupported_reason(peers, rows, w, num_local, jnp.dtype(jnp.bfloat16))

    assert unsupported_reason() is None
    assert "no peer" in unsupported_reason(peers=1)
    assert "int8" in unsupported_reason(dtype=jnp.int8)
    assert "multiples of 128" in unsupported_reason(shape=(2, 96, 256))
    assert "do not fit into VMEM" in unsupported_reason(shape=(2, 128 * 1024, 256))
    assert "more than 127" in unsupported_reason(num_local=128)
    assert "of SMEM" in unsupported_reason(peers=2048)


def tokens(how, devices, experts, choices, num_tokens):
    rng = np.random.default_rng(4)
    floats = (
        rng.normal(size=(devices * num_tokens, D)),
        *(rng.normal(size=(2, experts, D, F)) * D**-0.5),
        rng.normal(size=(experts, F, D)) * F**-0.5,
        rng.uniform(0.1, 1, size=(devices * num_tokens, choices)),
    )
    shape = (devices * num_tokens, choices)
    expert = {
        "at random": rng.integers(-1, experts, size=shape),
        "all one expert": np.full(shape, experts - 1),
    }[how]
    floats[0][(expert < 0).all(1)] = np.nan
    return [jnp.float32(a) for a in floats], jnp.int32(expert)


def divided(floats, expert, devices, apply=expert_mlp_parallel, **how):
    """Apply experts that are divided over devices."""
    mesh = jax.make_mesh((devices,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))

    def one_device(x, w_gate, w_up, w_down, gate, expert):
        return apply(x, w_gate, w_up, w_down, expert_TX=expert, gate_TX=gate, axes="expert", **how)

    along = P("expert")
    run = jax.shard_map(
        one_device, mesh=mesh, in_specs=(along,) * 6, out_specs=along, check_vma=False
    )
    return run(*floats, expert)


def whole(*floats, expert):
    """Apply undivided experts."""
    return expert_mlp(*floats[:4], expert_TX=expert, gate_TX=floats[4], backend="reference")


def with_gradient(function, floats):
    """Return a function's result, and gradients of a weighted sum of it."""

    def loss(*floats):
        y = function(*floats)
        return (jnp.cos(jnp.arange(y.size).reshape(y.shape)) * y).sum(), y

    run = jax.jit(jax.value_and_grad(loss, argnums=range(5), has_aux=True))
    (_, y), grads = run(*floats)
    return y, grads


@pytest.mark.parametrize(
    ("how", "experts", "choices", "num_tokens"),
    [("at random", 8, 2, 8), ("all one expert", 4, 1, 4)],
)
def test_as_many_rounds_as_it_takes_and_their_gradient(how, experts, choices, num_tokens):
    floats, expert = tokens(how, 4, experts, choices, num_tokens)

    with backend.interpreted():
        ours, our_grads = with_gradient(lambda *f: divided(f, expert, 4, transport="dma"), floats)
    theirs, their_grads = with_gradient(functools.partial(whole, expert=expert), floats)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for a, b in zip(our_grads, their_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)  # sums of 256 in another order


def test_one_layer_of_stacked_matrices():
    floats, expert = tokens("at random", 4, 4, 1, num_tokens=8)
    stacked = [
        floats[0],
        *(jnp.stack([0 * w, w]).reshape(2, 4, 1, *w.shape[1:]).swapaxes(0, 1) for w in floats[1:4]),
        floats[4],
    ]

    def squeezed(*arrays, **how):
        return expert_mlp_parallel(
            arrays[0], *(w[0] for w in arrays[1:4]), group=jnp.int32(1), **how
        )

    with backend.interpreted():
        ours, our_grads = with_gradient(
            lambda *f: divided(f, expert, 4, apply=squeezed, transport="dma"), stacked
        )
    theirs, their_grads = with_gradient(functools.partial(whole, expert=expert), floats)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for n, (a, b) in enumerate(zip(our_grads, their_grads, strict=True)):
        if n in (1, 2, 3):
            np.testing.assert_array_equal(a[:, 0], 0)
            a = a[:, 1, 0]
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("transport", ["xla", "dma"])
def test_rows_go_as_they_are_told_and_gradients_by_collectives(transport):
    floats, expert = tokens("at random", 4, 4, 1, num_tokens=8)

    def forward(*floats):
        return divided(floats, expert, 4, transport=transport)

    with backend.interpreted():
        text = str(jax.make_jaxpr(forward)(*floats))
        both = str(jax.make_jaxpr(lambda *f: with_gradient(forward, f))(*floats))
    is_dma = transport == "dma"
    assert ("all_to_all" in text) != is_dma and "all_to_all" in both
    assert ("name=expert_mlp_exchange" in text) == ("name=expert_mlp_exchange" in both) == is_dma


@pytest.mark.parametrize(
    ("axes", "number"),
    [(("data",), 0), (("expert",), 1), (("expert", "data"), 2), (("one", "expert"), 1)],
)
def test_barriers_are_numbered_densely_by_the_axes_that_have_several_devices(axes, number):
    mesh = jax.make_mesh((2, 1, 4), ("data", "one", "expert"))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert collective(axes) == number


def test_a_transport_that_cannot_be_is_refused():
    floats, expert = tokens("at random", 4, 4, 1, num_tokens=8)
    with pytest.raises(NotImplementedError, match="it needs a TPU, and this is cpu"):
        divided(floats, expert, 4, transport="dma")
