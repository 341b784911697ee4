import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels_pallas import backend, tuning
from kernels_pallas.experts import tpu_parallel
from kernels_pallas.experts.api import expert_mlp
from kernels_pallas.experts.parallel import expert_mlp_parallel

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
        case "nobody":
            return np.zeros(shape, int)


def build(how, devices, rows, experts, dtype, layers=1):
    """Queues and matrices of all devices; places without a row hold NaN."""
    rng = np.random.default_rng(3)
    is_row = np.arange(rows) < lengths(how, rng, devices, rows)[..., None]
    expert = np.sort(rng.integers(0, experts, size=is_row.shape), axis=-1)
    if how == "all to one device":
        expert[:] = experts - 1
    x = np.where(is_row[..., None], rng.normal(size=(*is_row.shape, D)), np.nan)
    gate = rng.uniform(0.1, 1, size=is_row.shape)
    many = (devices, layers * experts)
    gate_up = rng.normal(size=(2, *many, D, F)) * D**-0.5
    down = rng.normal(size=(*many, F, D)) * F**-0.5
    floats = [jnp.asarray(a, dtype) for a in (x, gate, *gate_up, down)]
    return floats, np.where(is_row, expert, -1).astype(np.int32)


def check(how, mesh_shape, names, axes, *, rows=24, experts=3, dtype=jnp.float32, layer=0, ring=1):
    """Compare each ring of devices with its experts applied to all it received, one by one."""
    devices = int(np.prod(mesh_shape))
    peers = devices // ring
    parts = [build(how, peers, rows, experts, dtype, layer + 1) for _ in range(ring)]
    floats = [jnp.concatenate(arrays) for arrays in zip(*(part[0] for part in parts), strict=True)]
    expert = np.concatenate([part[1] for part in parts])
    floats[0] *= 1 + jnp.arange(devices, dtype=dtype).reshape(-1, 1, 1, 1)  # rings differ
    mesh = jax.make_mesh(mesh_shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))

    def one_device(*arrays):
        return tpu_parallel.exchange_and_apply(
            *(a[0] for a in arrays), jnp.int32(layer * experts), num_local=experts, axes=axes
        )[None]

    order = (0, 1, 5, 2, 3, 4)
    arrays = [[*floats, jnp.asarray(expert)][i] for i in order]
    run = jax.shard_map(
        one_device, mesh=mesh, in_specs=(P(names),) * 6, out_specs=P(names), check_vma=False
    )
    with backend.interpreted():
        y = np.asarray(jax.jit(run)(*arrays), np.float32)

    x, gate, *weights = floats
    chosen = slice(layer * experts, (layer + 1) * experts)
    for device in range(devices):
        senders = range(device // peers * peers, (device // peers + 1) * peers)
        here = device % peers
        theirs = expert_mlp(
            jnp.concatenate([x[s, here] for s in senders]),
            *(w[device, chosen] for w in weights),
            expert_TX=jnp.concatenate([expert[s, here] for s in senders])[:, None],
            gate_TX=jnp.concatenate([gate[s, here] for s in senders])[:, None],
            backend="reference",
        )
        theirs = np.asarray(theirs, np.float32).reshape(peers, rows, D)
        for n, s in enumerate(senders):
            is_row = expert[s, here] >= 0
            bound = 1e-4 if dtype == jnp.float32 else 0.05
            np.testing.assert_allclose(y[s, here][is_row], theirs[n][is_row], atol=bound, rtol=0.02)


HOW = ["ragged", "full", "all to one device", "one device idle", "nobody"]


@pytest.mark.parametrize("how", HOW)
def test_rows_come_home_from_their_experts_whatever_the_routing(how):
    check(how, (4,), ("expert",), "expert")


@pytest.mark.parametrize("how", ["ragged", "all to one device"])
def test_eight_devices(how):
    check(how, (8,), ("expert",), "expert", rows=9, experts=1)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("how", ["ragged", "one device idle"])
def test_queues_of_several_windows_and_cores_that_share_them(how, cores):
    sizes = {"window": 16, "group": 16, "chunk": 8, "tile": 128, "cores": cores}
    with tuning.overridden({"expert_mlp.exchange": sizes}):
        check(how, (4,), ("expert",), "expert", rows=30)


def test_bfloat16_rows_and_the_matrices_of_a_layer_among_several():
    check("ragged", (4,), ("expert",), "expert", dtype=jnp.bfloat16, layer=1)


def test_devices_are_found_along_their_axis_of_a_mesh_of_several():
    check("ragged", (2, 4), ("fsdp", "expert"), "expert", rows=9, experts=2, ring=2)


def test_experts_divided_over_two_axes():
    check("ragged", (2, 4), ("fsdp", "expert"), ("fsdp", "expert"), rows=9, experts=1)


def test_what_does_not_fit_is_refused_with_the_reason():
    def refusal(peers=4, rows=64, shape=(2, 128, 256), dtype=jnp.bfloat16, num_local=2):
        w = jax.ShapeDtypeStruct(shape, dtype)
        return tpu_parallel.refusal(peers, rows, w, num_local, jnp.dtype(jnp.bfloat16))

    assert refusal() is None
    assert "no peer" in refusal(peers=1)
    assert "int8" in refusal(dtype=jnp.int8)
    assert "multiples of 128" in refusal(shape=(2, 96, 256))
    assert "do not fit into VMEM" in refusal(shape=(2, 128 * 1024, 256))
    assert "more than 127" in refusal(num_local=128)
    assert "of SMEM" in refusal(peers=2048)


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
        "never the first device": rng.integers(experts // devices, experts, size=shape),
    }[how]
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


@pytest.mark.parametrize(
    ("how", "devices", "choices"),
    [
        ("at random", 4, 2),
        ("all one expert", 4, 1),
        ("never the first device", 4, 1),
        ("all one expert", 8, 1),
    ],
)
def test_as_many_rounds_as_it_takes_and_their_gradient(how, devices, choices):
    floats, expert = tokens(how, devices, 2 * devices, choices, num_tokens=8)

    def both(function):
        def loss(*floats):
            y = function(*floats)
            return (jnp.cos(jnp.arange(y.size).reshape(y.shape)) * y).sum(), y

        return jax.jit(jax.value_and_grad(loss, argnums=range(5), has_aux=True))(*floats)

    with backend.interpreted():
        (_, ours), our_grads = both(lambda *f: divided(f, expert, devices, transport="dma"))
    (_, theirs), their_grads = both(
        lambda *f: expert_mlp(*f[:4], expert_TX=expert, gate_TX=f[4], backend="reference")
    )
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
        ours = divided(stacked, expert, 4, apply=squeezed, transport="dma")
    theirs = expert_mlp(*floats[:4], expert_TX=expert, gate_TX=floats[4], backend="reference")
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_transport_that_cannot_be_is_refused():
    floats, expert = tokens("at random", 4, 4, 1, num_tokens=8)
    with pytest.raises(NotImplementedError, match="it needs a TPU, and this is cpu"):
        divided(floats, expert, 4, transport="dma")
