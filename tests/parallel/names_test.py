import jax
import jax.numpy as jnp
import pytest

from llama4_jax import parallel
from llama4_jax.model import Llama4
from llama4_jax.parallel.axes import AXES, check
from llama4_jax.parallel.rules import MESH_AXES
from tests.tiny import scout_like


def test_a_misspelt_logical_axis_is_an_error_that_lists_the_valid_ones():
    with pytest.raises(ValueError, match="unknown logical axis 'bach'; choose one of batch"):
        check(("bach", None))
    with pytest.raises(ValueError, match="unknown logical axis"):
        parallel.make_rules({"bach": ("data",)})


def test_rules_may_name_only_the_mesh_axes_there_are():
    with pytest.raises(ValueError, match="names mesh axis 'pipeline'"):
        parallel.make_rules({"batch": ("pipeline",)})


@pytest.mark.parametrize("preset", parallel.PRESETS)
def test_presets_name_known_axes_and_no_mesh_axis_twice_in_a_weight(preset):
    rules = parallel.PRESETS[preset]
    assert {name for name, _ in rules.table} <= set(AXES)
    expert_weight = [rules.mesh_axes(n) for n in ("experts", "expert_embed", "expert_mlp")]
    flat = sum(expert_weight, ())
    assert len(flat) == len(set(flat))


def test_a_mesh_is_read_from_its_description_in_canonical_order():
    assert parallel.parse_mesh(" tensor:2, expert:4 ") == {"tensor": 2, "expert": 4}
    mesh = parallel.make_mesh("tensor:2,expert:4")
    assert dict(mesh.shape) == {"expert": 4, "tensor": 2}
    assert set(mesh.axis_names) <= set(MESH_AXES)
    assert dict(parallel.make_mesh("").shape) == {"data": 1}


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("expert=4", "must read axis:size"),
        ("expert:0", "must read axis:size"),
        ("pipeline:2", "unknown mesh axis 'pipeline'; choose from data"),
        ("fsdp:2,fsdp:4", "named twice"),
        ("fsdp:16", "needs 16 devices but there are 8"),
    ],
)
def test_bad_mesh_descriptions_are_refused_with_the_remedy(description, message):
    with pytest.raises(ValueError, match=message):
        parallel.make_mesh(description)


@pytest.mark.parametrize(
    ("mesh", "kv_heads", "preset"),
    [
        ("expert:8", 8, "expert"),
        ("expert:2,tensor:4", 8, "expert"),
        ("expert:4,tensor:2", 2, "tensor"),
        ("tensor:2,context:4", 8, "long_context"),
    ],
)
def test_serving_divides_heads_over_experts_where_there_are_enough(mesh, kv_heads, preset):
    rules = parallel.serving_rules(parallel.parse_mesh(mesh), num_kv_heads=kv_heads)
    assert rules == parallel.PRESETS[preset]


def test_a_weight_that_does_not_divide_is_refused_with_both_numbers():
    config = scout_like(num_experts=6)
    mesh = parallel.make_mesh("expert:4")
    with (
        parallel.use_mesh(mesh, parallel.PRESETS["fsdp_expert"]),
        pytest.raises(ValueError, match=r"experts \(6\) must be divisible by .*expert.* \(4\)"),
    ):
        jax.eval_shape(lambda key: Llama4(config, key=key), jax.random.key(0))


def test_an_activation_that_does_not_divide_is_kept_whole():
    with parallel.use_mesh(parallel.make_mesh("fsdp:8"), parallel.PRESETS["fsdp"]):
        assert parallel.mesh_axes("batch", 16) == ("fsdp",)
        assert parallel.mesh_axes("batch", 3) == ()
        x = parallel.shard(jnp.zeros((3, 4)), ("batch", "embed"))
    assert x.sharding.shard_shape(x.shape) == (3, 4)


def test_without_a_mesh_nothing_is_divided():
    assert not parallel.has_mesh()
    assert parallel.mesh_axes("batch", 8) == ()
    x = jnp.ones((2, 3))
    assert parallel.shard(x, ("batch", "embed")) is x
