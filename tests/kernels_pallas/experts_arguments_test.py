"""What the operations of experts are given: taken as arrays, or refused before work starts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import kernels_pallas
from kernels_pallas import expert_mlp, expert_mlp_parallel
from kernels_pallas.experts.gpu_backward import cost
from kernels_pallas.experts.inputs import Inputs, cost_hint
from tests.kernels_pallas.experts_parallel_test import estimated_products

DEVICES, T, E, D, F = 4, 16, 4, 128, 256


def arrays():
    """Arguments by name: of one device, or of all for the parallel operation."""
    rng = np.random.default_rng(0)
    shapes = {
        "x_TD": (T, D),
        "w_gate_EDF": (E, D, F),
        "w_up_EDF": (E, D, F),
        "w_down_EFD": (E, F, D),
    }
    found = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return found | {
        "expert_TX": rng.integers(0, E, size=(T, 1)).astype(np.int32),
        "gate_TX": rng.uniform(size=(T, 1)).astype(np.float32),
        "shared_TD": rng.normal(size=(T, D)).astype(np.float32),
    }


def undivided(given, **how):
    given = dict(given)
    matrices = [given.pop(f"w_{name}") for name in ("gate_EDF", "up_EDF", "down_EFD")]
    return expert_mlp(given.pop("x_TD"), *matrices, **given, **how)


def divided(given, **how):
    mesh = jax.make_mesh((DEVICES,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))

    def apply(given):
        given = dict(given)
        matrices = [given.pop(f"w_{name}") for name in ("gate_EDF", "up_EDF", "down_EFD")]
        return expert_mlp_parallel(given.pop("x_TD"), *matrices, **given, **how, axes="expert")

    spec = P("expert")
    return jax.shard_map(apply, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(given)


OPERATIONS = {
    "undivided": undivided,
    "xla": functools.partial(divided, transport="xla"),
    "dma": functools.partial(divided, transport="dma"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gate_TX", lambda a: np.repeat(a, 2, 1), "gate_TX has shape .* asks for"),
        ("shared_TD", lambda a: a[:, :1], "shared_TD has shape .* asks for"),
        ("w_up_EDF", lambda a: np.repeat(a, 2, 2), "w_up_EDF has shape .* asks for"),
        ("w_down_EFD", lambda a: a[:, : F // 2], "w_down_EFD has shape .* asks for"),
        ("x_TD", lambda a: a[:, : D // 2], "w_gate_EDF has shape .* asks for"),
        ("x_TD", lambda a: a[..., None], "x_TD has shape .*; it must have 2 dimensions"),
        ("w_down_EFD", lambda a: a.astype(jnp.bfloat16), "give them one dtype"),
        ("shared_TD", lambda a: a.astype(jnp.bfloat16), "shared_TD bfloat16; cast one"),
        ("expert_TX", lambda a: a.astype(np.float32), "experts are whole numbers"),
        ("expert_TX", lambda a: a[:, :0], "choose one at least"),
    ],
)
def test_arguments_that_disagree_are_refused_by_every_way(operation, name, change, message):
    given = arrays()
    with kernels_pallas.interpreted(), pytest.raises(ValueError, match=message):
        OPERATIONS[operation](given | {name: change(given[name])})


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"transport": "nvlink"}, ValueError, "'nvlink' is unknown; choose from xla, dma"),
        ({"transport": "dma", "backend": "gpu"}, NotImplementedError, "'gpu' cannot be obeyed"),
        ({"load_factor": 0.0}, ValueError, r"load_factor \(0.0\) must be a positive number"),
        ({"load_factor": float("nan")}, ValueError, "must be a positive number"),
        ({"load_factor": float("inf")}, ValueError, "must be a positive number"),
    ],
)
def test_ways_that_do_not_exist_are_refused(how, error, message):
    with kernels_pallas.interpreted(), pytest.raises(error, match=message):
        divided(arrays(), **how)


def test_int4_wants_whole_groups():
    given = arrays()
    packed = {
        name: np.zeros((E, rows // 2, columns), np.int8)
        for name, rows, columns in (
            ("w_gate_EDF", 192, F),
            ("w_up_EDF", 192, F),
            ("w_down_EFD", F, 192),
        )
    }
    scales = kernels_pallas.WeightScales(*(np.ones((E, 1, 1), np.float32) for _ in range(3)))
    x = np.zeros((T, 192), np.float32)
    with pytest.raises(ValueError, match=r"D \(192\) and F \(256\) in groups of 128"):
        undivided(given | packed | {"x_TD": x, "weight_scales": scales})


@pytest.mark.parametrize("operation", ["undivided", "xla"])
def test_numpy_arrays_and_calls_without_tokens_are_taken(operation):
    given, apply = arrays(), OPERATIONS[operation]
    np.testing.assert_array_equal(apply(given), apply(jax.tree.map(jnp.asarray, given)))
    for name in ("x_TD", "expert_TX", "gate_TX", "shared_TD"):
        given[name] = given[name][:0]
    assert apply(given).shape == (0, D)


def test_gradients_estimate_the_same_share_of_rows_as_the_forward_pass():
    x = jnp.asarray(arrays()["x_TD"])

    def estimate(share):
        def loss(x):
            with cost_hint(occupancy=share):
                return undivided(arrays() | {"x_TD": x}, backend="tpu").sum()

        return estimated_products(jax.grad(loss), x)

    assert estimate(0.25) * 4 == estimate(1.0) > 0


def test_kernels_for_gpus_estimate_the_rows_that_are_expected():
    x, w = jnp.zeros((64, 128), jnp.bfloat16), jnp.zeros((2, 128, 192), jnp.bfloat16)
    choices = jnp.zeros((64, 1), jnp.int32)
    call = Inputs(x, w, w, w, choices, choices, jnp.int32(0), None, None)
    with cost_hint(occupancy=0.25):
        estimate = cost(call, 2, matrices=1, rows=128 + 192)
    assert estimate.flops == 2 * 16 * 128 * 192
    assert estimate.bytes_accessed == 2 * w.size + 2 * 16 * (128 + 192)
