"""What `from_pretrained` returns remembers its mesh and needs nothing around the calls it makes."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama4_jax
from llama4_jax import Request, from_pretrained, save_pretrained, score
from llama4_jax.checkpoint.location import NANO
from llama4_jax.layers.param import leaf_name
from tests.serve import tiny

MESH = "expert:4,tensor:2"
REQUESTS = [Request(tokens=tiny.random_tokens(n, n)) for n in (5, 19)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def spread(folder):
    return from_pretrained(folder, mesh=MESH)


def test_a_mesh_is_given_in_words_and_remembered(spread):
    assert dict(spread.mesh.shape) == {"expert": 4, "tensor": 2}
    assert not all(x.sharding.is_fully_replicated for x in jax.tree.leaves(spread.model))


def test_scoring_needs_no_mesh_around_it(folder, spread):
    alone, together = (score(model, REQUESTS) for model in (from_pretrained(folder), spread))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_a_model_on_a_mesh_is_saved_as_it_was_loaded(spread, folder, tmp_path):
    save_pretrained(spread, tmp_path / "saved")
    name = "model.safetensors"
    assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "saved" / "tokenizer.json").exists()


def test_a_pretrained_model_shows_itself_in_a_line(spread):
    text = repr(spread)
    count = sum(x.size for x in jax.tree.leaves(spread.model))
    assert len(text) < 200 and "\n" not in text
    assert f"tiny: {count:,} parameters" in text and f"mesh {MESH}" in text
    assert "with tokenizer" in text and "float32" in text


def test_a_mesh_that_cannot_be_says_why(folder):
    with pytest.raises(ValueError, match="needs 16 devices but there are 8"):
        from_pretrained(folder, mesh="expert:16")


def test_the_names_of_the_package_lead_to_one_object():
    assert {name for name in llama4_jax.__all__ if not hasattr(llama4_jax, name)} == set()


@pytest.mark.parametrize(
    "dtype", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16"), np.dtype("float32")]
)
def test_a_precision_has_many_names(folder, dtype):
    loaded = from_pretrained(folder, dtype=dtype)
    assert loaded.config.dtype == jnp.dtype(dtype).name
    assert {x.dtype for x in jax.tree.leaves(loaded.model)} >= {jnp.dtype(dtype)}


def test_a_precision_that_no_model_computes_in_is_refused(folder):
    with pytest.raises(ValueError, match="'int8' must be float32 or bfloat16"):
        from_pretrained(folder, dtype=jnp.int8)


def test_a_tokenizer_shows_itself_in_a_line(spread):
    assert repr(spread.tokenizer) == "HFTokenizer(349 ids, 93 special)"


def test_a_model_that_is_not_finite_is_not_saved_and_the_leaf_is_named(spread, tmp_path):
    def damage(path, array):
        return array * np.inf if leaf_name(path) == "final_norm.scale_D" else array

    model = jax.tree_util.tree_map_with_path(damage, spread.model)
    with pytest.raises(ValueError, match=r"not saved: final_norm.scale_D holds NaN or inf"):
        save_pretrained(dataclasses.replace(spread, model=model), tmp_path / "saved")
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_with_ids_beyond_the_table_is_refused_with_both_sizes(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    shutil.copy(NANO / "tokenizer.json", tmp_path / "model")
    with pytest.raises(ValueError, match="has ids up to 2047, but the model's table has 352 rows"):
        from_pretrained(tmp_path / "model")
