"""The experts' operation over a mesh: what is added to its result is added once, wherever it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax import parallel
from llama4_jax.parallel import experts
from llama4_jax.parallel.experts import sharded_expert_mlp

B, T, D, F, E = 4, 6, 8, 16, 4

# The mesh, its preset, and whether the operation itself adds the shared result.
MESHES = [
    pytest.param("", "single", True, id="one_device"),
    pytest.param("fsdp:2,expert:2", "fsdp_expert", True, id="tokens_travel"),
    pytest.param("expert:2,tensor:2", "fsdp_expert", False, id="hidden_features_divided"),
    pytest.param("expert:4", "tensor", False, id="every_shard_its_own"),
]


def make_inputs():
    rng = np.random.default_rng(0)
    shapes = {"x": (B, T, D), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    arrays = {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    arrays["shared"] = rng.normal(size=(B, T, D)).astype("float32")
    expert_BTX = rng.integers(-1, E, size=(B, T, 2))  # -1 is nobody
    gate_BTX = rng.uniform(size=(B, T, 2)).astype("float32")
    return arrays, expert_BTX, gate_BTX


def place(arrays):
    tokens, w = ("batch", "seq", None), ("experts", None, "expert_mlp")
    axes = {"x": tokens, "shared": tokens, "gate": w, "up": w, "down": (w[0], w[2], w[1])}
    return {name: parallel.shard(jnp.asarray(a), axes[name]) for name, a in arrays.items()}


def apply(arrays, expert_BTX, gate_BTX):
    a = arrays
    return sharded_expert_mlp(
        a["x"], a["gate"], a["up"], a["down"],
        expert_BTX=expert_BTX, gate_BTX=gate_BTX, shared_BTD=a.get("shared"),
    )  # fmt: skip


@pytest.mark.parametrize(("mesh", "preset", "is_inside"), MESHES)
def test_what_is_shared_is_added_once_and_its_gradient_arrives_once(
    mesh, preset, is_inside, monkeypatch
):
    given = []
    for name in ("expert_mlp", "expert_mlp_parallel"):
        operation = getattr(experts, name)

        def spy(*arrays, operation=operation, shared_TD, **options):
            given.append(shared_TD is not None)
            return operation(*arrays, shared_TD=shared_TD, **options)

        monkeypatch.setattr(experts, name, spy)

    arrays, *routing = make_inputs()
    without = {name: array for name, array in arrays.items() if name != "shared"}
    alone = apply(place(without), *map(jnp.asarray, routing))
    expected = np.asarray(alone) + arrays["shared"]
    given.clear()
    mesh = parallel.make_mesh(mesh) if mesh else None
    with parallel.use_mesh(mesh, parallel.PRESETS[preset]):
        tokens = ("batch", "seq", None)
        placed = [parallel.shard(jnp.asarray(a), tokens) for a in routing]

        def loss(arrays):
            y_BTD = apply(arrays, *placed)
            return (y_BTD**2).sum(), y_BTD

        (_, y_BTD), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(place(arrays))
    assert set(given) == {is_inside}
    np.testing.assert_allclose(y_BTD, expected, atol=2e-5)
    np.testing.assert_allclose(slope["shared"], 2 * expected, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "num_experts", "message"),
    [
        (2, 4, r"2 rows of 6 tokens .* \(fsdp:2\), some but .* \(fsdp:2,expert:2\); take as many"),
        (4, 6, r"num_experts \(6\) must be divisible by mesh axes \(fsdp:2,expert:2\); make them"),
    ],
)
def test_what_mesh_axes_do_not_divide_is_refused_with_their_sizes(rows, num_experts, message):
    axes = ("fsdp", "expert")
    rules = parallel.make_rules({"batch": axes, "experts": axes})
    x, w = jnp.zeros((rows, T, D)), jnp.zeros((num_experts, D, F))
    arrays = {"x": x, "gate": w, "up": w, "down": w.swapaxes(1, 2)}
    mesh = parallel.make_mesh("fsdp:2,expert:2")
    with parallel.use_mesh(mesh, rules), pytest.raises(ValueError, match=message):
        apply(arrays, jnp.zeros((rows, T, 1), int), jnp.ones((rows, T, 1)))
