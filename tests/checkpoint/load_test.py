"""Tests of checkpoint/load.py: models from files and back, on one device and on meshes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama4_jax import parallel
from llama4_jax.checkpoint import convert, load, open_checkpoint
from llama4_jax.checkpoint.load import ModelSource
from llama4_jax.config import layer_pattern
from llama4_jax.model import Llama4
from llama4_jax.pretrained import from_pretrained, save_pretrained
from tests.checkpoint.tiny import BALANCED, DENSE_TIED, TINY, assert_holds, assert_same, write
from tests.tiny import build, scout_like

MESHES = {
    "fsdp:2": "fsdp",
    "fsdp:2,expert:4": "fsdp_expert",
    "expert:4,tensor:2": "tensor",
    "context:2,tensor:2": None,
}


def test_the_tiny_models_have_groups_and_a_tail():
    assert layer_pattern(TINY.text).tail and layer_pattern(TINY.text).num_groups == 1
    assert layer_pattern(DENSE_TIED.text).num_groups == 5


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        *((TINY, layout) for layout in ("hf", "meta", "orbax")),
        (DENSE_TIED, "hf"),
        (BALANCED, "orbax"),
    ],
)
def test_each_layer_lands_in_its_place_of_the_stack(tmp_path, config, layout):
    source = write(config, tmp_path / "checkpoint", layout)
    pretrained = from_pretrained(tmp_path / "checkpoint")
    assert pretrained.config == pretrained.model.config == config
    assert_same(ModelSource(pretrained.model), source)
    pattern, model = layer_pattern(config.text), pretrained.model
    place, group = pattern.name(1)
    block = model.decoder.groups.slots[int(place.rpartition(".")[2])]
    value = block.attention.w_q_DNH[...][group]
    np.testing.assert_array_equal(value, source.arrays["layers.1.attention.w_q_DNH"])


def test_balance_biases_come_back_and_choose_experts_in_what_was_saved(tmp_path):
    config = scout_like(num_layers=1, moe_layers=(0,), nope_layers=(), balance_bias=True)
    model = build(dataclasses.replace(config, vision=None))
    save_pretrained(model, tmp_path / "orbax", format="orbax")
    loaded = from_pretrained(tmp_path / "orbax").model
    for mine, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    tokens_BT = jnp.arange(4, 24)[None]
    plain = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 0 if "bias_E" in jax.tree_util.keystr(path) else x, loaded
    )
    logits = jax.jit(lambda m: m(tokens_BT).logits_BTV)
    assert np.abs(logits(loaded) - logits(plain)).max() > 1e-2


@pytest.mark.parametrize(("layout", "file"), [("hf", "config.json"), ("meta", "params.json")])
def test_foreign_layouts_refuse_balance_biases_before_anything_is_written(tmp_path, layout, file):
    write(BALANCED, tmp_path / "orbax", "orbax")
    message = rf"balance_bias cannot be expressed by {file}.*convert to the orbax layout instead"
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "orbax", tmp_path / "out", to=layout)
    with pytest.raises(ValueError, match=message):
        save_pretrained(from_pretrained(tmp_path / "orbax"), tmp_path / "out", format=layout)
    assert [path.name for path in tmp_path.iterdir()] == ["orbax"]


def _fresh(config):
    """A model to be changed: what `build` returns is everybody's."""
    return jax.tree.map(lambda array: array, build(config))


@pytest.mark.parametrize("layout", ["hf", "meta", "orbax"])
def test_an_array_that_no_layout_has_a_place_for_is_refused_and_not_dropped(tmp_path, layout):
    model = _fresh(TINY)
    model.decoder.groups.slots[0].attention.adapter_DR = nnx.Param(jnp.zeros((1, 32, 4)))
    message = (
        r"decoder.groups.slots.0.attention.adapter_DR \(1, 32, 4\) .* no layout has a place.*"
        r"merge it into the weight that it adds to, or remove it"
    )
    with pytest.raises(ValueError, match=message):
        save_pretrained(model, tmp_path / "out", format=layout)
    with pytest.raises(ValueError, match=message):
        ModelSource(model)
    assert not any(tmp_path.iterdir())


def test_a_model_that_is_not_what_its_config_says_is_refused(tmp_path):
    model = _fresh(TINY)
    model.embed.table_VD = nnx.Param(jnp.zeros((65, 32)))
    with pytest.raises(ValueError, match=r"table_VD has shape \(65, 32\), expected \(64, 32\)"):
        save_pretrained(model, tmp_path / "out")
    del model.final_norm
    with pytest.raises(ValueError, match=r"final_norm.scale_D \(32,\) is missing"):
        save_pretrained(model, tmp_path / "out")


@pytest.mark.parametrize("description", MESHES)
def test_a_mesh_gets_every_shard_right(tmp_path, description):
    source = write(TINY, tmp_path / "hf")
    mesh, preset = parallel.make_mesh(description), MESHES[description]
    rules = parallel.PRESETS[preset] if preset else None
    pretrained = from_pretrained(tmp_path / "hf", mesh=mesh, rules=rules)
    assert_same(ModelSource(pretrained.model), source)
    with parallel.use_mesh(mesh, pretrained.rules):
        built = parallel.abstract(lambda: Llama4(TINY, key=jax.random.key(0)))
    for ours, theirs in zip(jax.tree.leaves(pretrained.model), jax.tree.leaves(built), strict=True):
        assert ours.sharding == theirs.sharding
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(pretrained.model))


def test_a_shard_is_read_once_and_alone(tmp_path, monkeypatch):
    write(TINY, tmp_path / "hf")
    largest, reads = [0], [0]
    read = load._read

    def counting(source, slot, index):
        value = read(source, slot, index)
        largest[0] = max(largest[0], value.size)
        reads[0] += value.size
        return value

    monkeypatch.setattr(load, "_read", counting)
    model = from_pretrained(tmp_path / "hf", mesh=parallel.make_mesh("expert:2,tensor:2")).model
    leaves = jax.tree.leaves(model)
    assert reads[0] == sum(leaf.size for leaf in leaves)
    assert largest[0] == max(leaf.addressable_shards[0].data.size for leaf in leaves)


def test_dtype_is_that_of_parameters_and_config(tmp_path):
    write(TINY, tmp_path / "hf")
    pretrained = from_pretrained(tmp_path / "hf", dtype="float32")
    assert pretrained.config.dtype == "float32"
    assert {leaf.dtype for leaf in jax.tree.leaves(pretrained.model)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("layout", ["hf", "meta", "orbax"])
def test_what_is_saved_is_what_was_loaded_with_its_tokenizer_files(tmp_path, layout):
    source = write(TINY, tmp_path / "first")
    (tmp_path / "first" / "special_tokens_map.json").write_text("{}")
    mesh = parallel.make_mesh("expert:2,tensor:2")
    pretrained = from_pretrained(tmp_path / "first", mesh=mesh)
    save_pretrained(pretrained, tmp_path / "second", format=layout)
    assert_holds(tmp_path / "second", source)
    assert (tmp_path / "second" / "special_tokens_map.json").read_text() == "{}"


def test_a_bare_model_is_saved_in_another_precision(tmp_path):
    write(TINY, tmp_path / "narrow")
    model = from_pretrained(tmp_path / "narrow").model
    save_pretrained(model, tmp_path / "hf", dtype="float32")
    source = open_checkpoint(tmp_path / "hf")
    assert source.config.dtype == "float32"
    assert source.dtype("embed.table_VD") == np.float32
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 3]


def _generation(tmp_path, **values):
    write(TINY, tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(values))
    return from_pretrained(tmp_path / "hf").generation


def test_sampling_defaults_come_from_the_generation_config(tmp_path):
    generation = _generation(
        tmp_path, do_sample=True, temperature=0.6, top_p=0.9, top_k=0, eos_token_id=[7, 8]
    )
    assert (generation.temperature, generation.top_p, generation.top_k) == (0.6, 0.9, None)
    assert generation.stop_ids == (7, 8)


def test_without_do_sample_the_default_is_greedy(tmp_path):
    generation = _generation(tmp_path, temperature=0.6, eos_token_id=7)
    assert (generation.temperature, generation.stop_ids) == (0.0, (7,))


def test_a_checkpoint_without_tokenizer_or_generation_config_loads(tmp_path):
    write(TINY, tmp_path / "native", "orbax")
    pretrained = from_pretrained(tmp_path / "native")
    assert pretrained.tokenizer is None and pretrained.chat_template is None
    assert pretrained.generation.stop_ids == TINY.eos_ids


def test_a_folder_without_a_checkpoint_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"holds no checkpoint: none of config.json with"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a directory"):
        from_pretrained(tmp_path / "absent")


def test_a_weight_that_does_not_divide_over_the_mesh_is_named(tmp_path):
    text = dataclasses.replace(TINY.text, vocab_size=65)
    write(dataclasses.replace(TINY, text=text), tmp_path / "hf")
    with pytest.raises(ValueError, match=r"vocab \(65\) must be divisible"):
        from_pretrained(tmp_path / "hf", mesh=parallel.make_mesh("tensor:2"))
