"""Tests of checkpoint/hf.py: what transformers wrote is read, what we write is well formed."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from llama4_jax.checkpoint import hf
from llama4_jax.checkpoint.convert import make_plan, open_checkpoint
from llama4_jax.checkpoint.file_tensors import FileTensors
from llama4_jax.checkpoint.hf import open_hf, plan_hf
from llama4_jax.checkpoint.layout import layout_tensors
from llama4_jax.checkpoint.parameters import parameters
from llama4_jax.checkpoint.safetensors_file import read_header
from llama4_jax.checkpoint.writer import write_checkpoint
from tests.checkpoint.tiny import (
    DENSE_TIED,
    GOLDEN,
    TINY,
    MemorySource,
    assert_holds,
    assert_same,
    read_all,
    write,
)

FP8 = ml_dtypes.float8_e4m3fn


def _rewrite(directory, change):
    """Change the tensors of a one-file checkpoint with the safetensors package."""
    path = directory / "model.safetensors"
    header = read_header(path)
    tensors = {key: np.array(tensor.view()) for key, tensor in header.items()}
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def test_the_safetensors_package_reads_what_transformers_wrote_as_we_do():
    source = open_hf(GOLDEN / "hf")
    table = read_all(source, "embed.table_VD")
    experts = read_all(source, "layers.1.ffn.experts.w_up_EDF")
    for path in (GOLDEN / "hf").glob("*.safetensors"):
        tensors = safetensors.numpy.load_file(path)
        found = tensors.get("language_model.model.embed_tokens.weight", table)
        np.testing.assert_array_equal(found, table)
        key = "language_model.model.layers.1.feed_forward.experts.gate_up_proj"
        if key in tensors:
            np.testing.assert_array_equal(tensors[key][:, :, 56:], experts)


def test_a_query_matrix_is_stored_transposed_and_gate_before_up(tmp_path):
    source = write(TINY, tmp_path / "hf")
    tensors = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    layer = "language_model.model.layers.1."
    w_q_DNH = source.arrays["layers.1.attention.w_q_DNH"]
    stored = tensors[layer + "self_attn.q_proj.weight"]
    np.testing.assert_array_equal(stored, w_q_DNH.reshape(32, 32).T)
    gate_up = tensors[layer + "feed_forward.experts.gate_up_proj"]
    np.testing.assert_array_equal(
        gate_up[:, :, :24], source.arrays["layers.1.ffn.experts.w_gate_EDF"]
    )
    np.testing.assert_array_equal(
        gate_up[:, :, 24:], source.arrays["layers.1.ffn.experts.w_up_EDF"]
    )
    router = tensors[layer + "feed_forward.router.weight"]
    np.testing.assert_array_equal(router, source.arrays["layers.1.ffn.router_DE"].T)


@pytest.mark.parametrize("config", [TINY, DENSE_TIED])
def test_shards_hold_what_the_index_says_and_read_back_bit_for_bit(tmp_path, config):
    source = MemorySource(config)
    plan = plan_hf(source, None, shard_bytes=20_000)
    write_checkpoint(plan, tmp_path / "hf", files={})
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == {p.name for p in files}
    assert index["metadata"]["total_size"] == sum(2 * p.size for p in parameters(config).values())
    assert_holds(tmp_path / "hf", source)


def test_a_text_only_checkpoint_has_no_language_model_prefix(tmp_path):
    write(DENSE_TIED, tmp_path / "hf")
    keys = set(read_header(tmp_path / "hf" / "model.safetensors"))
    assert "model.embed_tokens.weight" in keys
    assert not any("language_model" in key or "lm_head" in key for key in keys)


def test_a_tied_head_and_saved_buffers_are_ignored(tmp_path):
    source = write(DENSE_TIED, tmp_path / "hf")

    def add(tensors):
        tensors["lm_head.weight"] = np.zeros((64, 32), np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(1, np.float32)

    _rewrite(tmp_path / "hf", add)
    assert_holds(tmp_path / "hf", source)


@pytest.mark.parametrize("kind", ["hf", "meta"])
def test_fp8_experts_are_dequantised_as_torch_does(kind):
    plain, source = open_checkpoint(GOLDEN / "hf"), open_checkpoint(GOLDEN / f"{kind}_fp8")
    expected = np.load(GOLDEN / "fp8.npz")
    for name in parameters(plain.config):
        value = read_all(source, name)
        assert value.dtype == ml_dtypes.bfloat16
        if name.startswith("layers.1.ffn.experts."):
            stored = expected[f"{kind}.{name.rpartition('.')[2]}"]
            np.testing.assert_array_equal(value.view(np.int16), stored)
            assert np.any(value != read_all(plain, name))
        else:
            np.testing.assert_array_equal(value, read_all(plain, name))


def test_fused_fp8_experts_and_linears_with_scales_are_read(tmp_path):
    source = write(TINY, tmp_path / "hf")
    experts = "language_model.model.layers.1.feed_forward.experts."
    query = "language_model.model.layers.0.self_attn.q_proj.weight"
    random = np.random.default_rng(0)

    def scales(*shape):
        return random.uniform(0.5, 2, shape).astype(np.float32)

    def quantise(tensors):
        for key, shape in (("gate_up_proj", (4, 1, 48)), ("down_proj", (4, 32, 1))):
            tensors[experts + key] = tensors[experts + key].astype(FP8)
            tensors[experts + key + "_scale"] = scales(*shape)
        tensors[query] = tensors[query].astype(FP8)
        tensors[query + "_scale"] = scales(32, 1)
        tensors[query.replace("weight", "input_scale")] = scales(1)

    _rewrite(tmp_path / "hf", quantise)
    tensors = {
        key: np.array(tensor.view()).astype(np.float32)
        for key, tensor in read_header(tmp_path / "hf" / "model.safetensors").items()
    }
    gate_up = tensors[experts + "gate_up_proj"] * tensors[experts + "gate_up_proj_scale"]
    down_scale = tensors[experts + "down_proj_scale"].transpose(0, 2, 1)
    expected = {
        "layers.1.ffn.experts.w_gate_EDF": gate_up[:, :, :24],
        "layers.1.ffn.experts.w_up_EDF": gate_up[:, :, 24:],
        "layers.1.ffn.experts.w_down_EFD": tensors[experts + "down_proj"] * down_scale,
        "layers.0.attention.w_q_DNH": (tensors[query] * tensors[query + "_scale"]).T.reshape(
            32, 16, 2
        ),
    }
    opened = open_hf(tmp_path / "hf")
    for name, value in expected.items():
        np.testing.assert_array_equal(read_all(opened, name), value.astype(ml_dtypes.bfloat16))
    untouched = "layers.3.ffn.experts.w_up_EDF"
    np.testing.assert_array_equal(read_all(opened, untouched), source.arrays[untouched])


def test_one_scale_for_a_whole_tensor_is_read(tmp_path):
    source = write(TINY, tmp_path / "hf")
    key = "language_model.model.layers.0.self_attn.o_proj.weight"

    def quantise(tensors):
        tensors[key] = tensors[key].astype(FP8)
        tensors[key + "_scale"] = np.array([0.5], np.float32)

    _rewrite(tmp_path / "hf", quantise)
    name = "layers.0.attention.w_o_NHD"
    value = source.arrays[name].astype(FP8).astype(np.float32) * 0.5
    np.testing.assert_array_equal(
        read_all(open_hf(tmp_path / "hf"), name), value.astype(ml_dtypes.bfloat16)
    )


def test_mixed_precision_is_kept_tensor_by_tensor(tmp_path):
    write(TINY, tmp_path / "hf")
    router = "language_model.model.layers.1.feed_forward.router.weight"

    def widen(tensors):
        tensors[router] = tensors[router].astype(np.float32)

    _rewrite(tmp_path / "hf", widen)
    source = open_hf(tmp_path / "hf")
    assert source.dtype("layers.1.ffn.router_DE") == np.float32
    write_checkpoint(make_plan(source, "hf"), tmp_path / "again", files={})
    assert_same(open_hf(tmp_path / "again"), source)


@pytest.fixture
def broken(tmp_path):
    write(TINY, tmp_path / "hf")
    return tmp_path / "hf"


NORM = "language_model.model.norm.weight"


def test_a_missing_tensor_is_named_with_its_shape(broken):
    _rewrite(broken, lambda tensors: tensors.pop(NORM))
    with pytest.raises(ValueError, match=rf"{NORM} \(32,\) is missing"):
        open_hf(broken)


def test_a_misnamed_tensor_is_found_by_its_shape(broken):
    def rename(tensors):
        tensors[NORM + "s"] = tensors.pop(NORM)

    _rewrite(broken, rename)
    with pytest.raises(ValueError, match=rf"is it misnamed as {NORM}s \(32,\)"):
        open_hf(broken)


def test_a_misshapen_tensor_is_named_with_both_shapes(broken):
    def cut(tensors):
        tensors[NORM] = tensors[NORM][:-1]

    _rewrite(broken, cut)
    with pytest.raises(ValueError, match=rf"{NORM} has shape \(31,\), expected \(32,\)"):
        open_hf(broken)


def test_a_tensor_too_many_is_named(broken):
    _rewrite(broken, lambda tensors: tensors.update(extra=np.zeros((2, 3), np.float32)))
    with pytest.raises(ValueError, match=r"extra \(2, 3\) is not part of this model"):
        open_hf(broken)


@pytest.mark.parametrize("size", [5, 1000, -10])
def test_a_truncated_file_is_named_with_both_sizes(broken, size):
    path = broken / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:size])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated.* the (whole )?file has"):
        open_hf(broken)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}',
        b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
    ],
)
def test_a_malformed_header_is_a_clear_error(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ValueError, match=r"x.safetensors"):
        read_header(path)


def test_an_index_that_lies_is_refused(tmp_path):
    source = MemorySource(TINY)
    directory = tmp_path / "hf"
    write_checkpoint(plan_hf(source, None, shard_bytes=40_000), directory, files={})
    index_path = directory / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    first = sorted(set(index["weight_map"].values()))[0]

    def rewritten(change):
        weight_map = dict(index["weight_map"])
        change(weight_map)
        index_path.write_text(json.dumps({**index, "weight_map": weight_map}))

    rewritten(lambda m: m.update({NORM: "../secret.safetensors"}))
    with pytest.raises(ValueError, match="outside the checkpoint"):
        open_hf(directory)
    rewritten(lambda m: m.update({NORM: first}))
    with pytest.raises(ValueError, match=rf"'{NORM}' is in '{first}', but it is in"):
        open_hf(directory)
    rewritten(lambda m: None)
    shutil.move(directory / first, directory / "elsewhere")
    with pytest.raises(ValueError, match=rf"{first} is missing"):
        open_hf(directory)


def test_fp8_without_a_scale_is_refused(broken):
    key = "language_model.model.layers.0.self_attn.o_proj.weight"
    _rewrite(broken, lambda tensors: tensors.update({key: tensors[key].astype(FP8)}))
    with pytest.raises(ValueError, match=r"o_proj.weight_scale \(32, 1\) is missing"):
        open_hf(broken)
    experts = "language_model.model.layers.1.feed_forward.experts.down_proj"

    def swap(tensors):
        tensors[key] = tensors[key].astype(np.float32)
        tensors[experts] = tensors[experts].astype(FP8)

    _rewrite(broken, swap)
    with pytest.raises(ValueError, match=r"experts.down_proj is float8_e4m3fn .* without a scale"):
        open_hf(broken)


def test_one_absent_unfused_expert_is_named(tmp_path):
    shutil.copytree(GOLDEN / "hf_fp8", tmp_path / "hf")
    key = "language_model.model.layers.1.feed_forward.experts.2.up_proj.weight"
    _rewrite(tmp_path / "hf", lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=r"experts.2.up_proj.weight"):
        open_hf(tmp_path / "hf")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 512, "moe_layers": list(range(0, 512, 7)), "no_rope_layers": None},
        {"num_local_experts": 10**9},
        {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1},
    ],
)
def test_a_config_of_quite_another_size_is_refused_before_tensors_are_listed(
    tmp_path, monkeypatch, changes
):
    shutil.copytree(GOLDEN / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"].update(changes)
    path.write_text(json.dumps(config))
    monkeypatch.setattr(hf, "layout_tensors", lambda *_, **__: pytest.fail("listed"))
    with pytest.raises(ValueError, match="one of the two is of another model"):
        open_hf(tmp_path / "hf")


def test_more_experts_than_tensors_are_not_looked_for_one_by_one(tmp_path):
    """The expert count alone is large: with hidden widths of one it is not a matter of size."""
    text = dataclasses.replace(TINY.text, num_experts=100_000, embed_dim=2, expert_dim=1)
    files = FileTensors("here", {})
    for tensor in layout_tensors(dataclasses.replace(TINY, vision=None, text=text), "hf").values():
        for part in tensor.parts:
            assert hf._find(tensor, part, files) == ()
    assert len(files._needed) < 100


def test_a_pointer_of_git_lfs_is_named_as_such(tmp_path):
    shutil.copytree(GOLDEN / "hf", tmp_path / "hf")
    path = sorted((tmp_path / "hf").glob("*.safetensors"))[0]
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=rf"{path.name} is a pointer of Git LFS"):
        open_hf(tmp_path / "hf")


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}',
        b'{"a":{"dtype":"F32","shape":3,"data_offsets":[0,400]}}',
        b'{"a":"dtype"}',
        b"[]",
        b'{"' + b"a" * 100_000 + b'":{"dtype":"F32","shape":[100],"data_offsets":[0,400]}}',
    ],
)
def test_a_header_that_is_none_is_a_short_line(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"model.safetensors is (not safetensors|truncated): "):
        read_header(path)
    with pytest.raises(ValueError, match=r"^.{1,500}$"):
        read_header(path)
