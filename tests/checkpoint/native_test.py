"""Tests of checkpoint/native.py: the native layout."""

import json
import logging
import re

import numpy as np
import orbax.checkpoint as ocp
import pytest

from llama4_jax.checkpoint import checksums, native
from llama4_jax.checkpoint.native import config_from_json, config_to_json, open_native
from llama4_jax.config import FAMILIES
from tests.checkpoint.tiny import (
    BALANCED,
    DENSE_TIED,
    TINY,
    MemorySource,
    assert_holds,
    read_all,
    write,
)


@pytest.mark.parametrize("config", [*(f() for f in FAMILIES.values()), TINY, DENSE_TIED, BALANCED])
def test_a_config_survives_json(config):
    values = json.loads(json.dumps(config_to_json(config)))
    assert config_from_json(values, "x") == config


@pytest.mark.parametrize("config", [TINY, DENSE_TIED, BALANCED])
def test_a_native_checkpoint_reads_back_bit_for_bit_without_a_word(tmp_path, config, caplog):
    with caplog.at_level(logging.WARNING):
        source = write(config, tmp_path / "native", "orbax")
    assert not caplog.records
    assert_holds(tmp_path / "native", source)


def test_balance_biases_stay_float32_whatever_precision_is_asked_for(tmp_path):
    source = write(BALANCED, tmp_path / "native", "orbax", dtype="bfloat16")
    opened = open_native(tmp_path / "native")
    bias = read_all(opened, "layers.3.ffn.bias_E")
    assert opened.dtype("layers.3.ffn.bias_E") == bias.dtype == np.float32
    np.testing.assert_array_equal(bias, source.arrays["layers.3.ffn.bias_E"])
    assert opened.dtype("layers.3.ffn.router_DE").name == "bfloat16"


def test_an_older_config_without_the_field_has_no_biases():
    values = config_to_json(TINY)
    del values["text"]["balance_bias"]
    assert config_from_json(values, "x") == TINY


def test_an_item_per_layer_is_an_orbax_checkpoint_of_its_own(tmp_path):
    source = write(TINY, tmp_path / "native", "orbax")
    layer = tmp_path / "native" / "params" / "layers.1"
    values = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)).restore(layer)
    np.testing.assert_array_equal(
        values["layers.1.attention.w_q_DNH"], source.arrays["layers.1.attention.w_q_DNH"]
    )


def test_large_parameters_are_items_of_their_own_and_cut_into_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_ITEM_BYTES", 4000)
    monkeypatch.setattr(native, "_CHUNK_BYTES", 1000)
    source = write(TINY, tmp_path / "native", "orbax")
    items = {path.name for path in (tmp_path / "native" / "params").iterdir()}
    assert {"layers.1", "layers.1.ffn.experts.w_gate_EDF"} <= items
    chunks = tmp_path.glob("native/params/layers.1.ffn.experts.w_gate_EDF/*/*.*.*")
    assert len(list(chunks)) > 3
    assert_holds(tmp_path / "native", source)


@pytest.fixture
def broken(tmp_path):
    write(TINY, tmp_path / "native", "orbax")
    return tmp_path / "native"


def test_a_missing_array_is_named(broken):
    (broken / "params/final_norm/final_norm.scale_D/.zarray").unlink()
    with pytest.raises(ValueError, match=r"final_norm.scale_D/.zarray is missing"):
        open_native(broken)


def test_a_missing_chunk_is_named(broken):
    (broken / "params/final_norm/final_norm.scale_D/0").unlink()
    with pytest.raises(ValueError, match=r"chunk 0 of final_norm.scale_D is missing"):
        open_native(broken)


def test_another_version_is_refused(broken):
    path = broken / "llama4_jax.json"
    contents, _ = checksums.unseal(path)
    path.write_text(checksums.seal({**contents, "format": 99}))
    with pytest.raises(ValueError, match="format 99; this version reads format 1"):
        open_native(broken)
    contents["config"]["text"]["a_field_of_the_future"] = 1
    path.write_text(checksums.seal(contents))
    with pytest.raises(ValueError, match=r"another version.*a_field_of_the_future"):
        open_native(broken)


def test_a_truncated_chunk_is_named_when_it_is_read(broken):
    chunk = broken / "params/embed/embed.table_VD/0.0"
    chunk.write_bytes(chunk.read_bytes()[:-50])
    source = open_native(broken)
    with pytest.raises(ValueError, match=r"embed.table_VD/0.0 is damaged: its checksum differs"):
        source.read("embed.table_VD", (slice(0, 64), slice(0, 32)))


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def test_a_flipped_bit_anywhere_is_noticed_and_its_file_named(broken):
    random = np.random.default_rng(0)
    files = sorted(path for path in broken.rglob("*") if path.is_file())
    assert len(files) > 100
    for file in random.choice(files, 40):
        content = file.read_bytes()
        file.write_bytes(flipped(content, random.integers(len(content)), random.integers(8)))
        parts = file.relative_to(broken).parts
        with pytest.raises(ValueError) as noticed:
            opened = open_native(broken)
            read_all(opened, parts[2])  # the chunk's own parameter
        assert str(file) in str(noticed.value) or file.name == checksums.FILE, noticed.value
        assert str(file.parent) in str(noticed.value)
        file.write_bytes(content)
    assert_holds(broken, MemorySource(TINY))


def test_every_bit_of_a_list_of_checksums_and_of_the_config_counts(broken):
    for file in (broken / "llama4_jax.json", broken / "params/final_norm" / checksums.FILE):
        content = file.read_bytes()
        step = 1 + len(content) // 150
        for place in range(0, len(content), step):
            file.write_bytes(flipped(content, place, place % 8))
            with pytest.raises(ValueError, match=re.escape(str(broken))):
                open_native(broken)
        file.write_bytes(content)


def test_an_older_checkpoint_without_checksums_loads(broken):
    path = broken / "llama4_jax.json"
    contents, _ = checksums.unseal(path)
    path.write_text(json.dumps(contents))
    for file in broken.rglob(checksums.FILE):
        file.unlink()
    assert_holds(broken, MemorySource(TINY))


def test_checksums_may_not_be_missing_where_there_were_some(broken):
    (broken / "params/final_norm" / checksums.FILE).unlink()
    with pytest.raises(ValueError, match=r"final_norm/crc32.json, which .* is missing"):
        open_native(broken)


def test_only_chunks_that_are_read_are_compared_and_each_once(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_CHUNK_BYTES", 1000)
    write(TINY, tmp_path / "native", "orbax")
    source, seen = open_native(tmp_path / "native"), []
    count = lambda path: seen.append(path.name) or file_crc32(path)  # noqa: E731
    file_crc32 = checksums.file_crc32
    monkeypatch.setattr(checksums, "file_crc32", count)
    (rows, _), parameter = source._chunks["embed.table_VD"], "embed.table_VD"
    assert rows < 64
    source.read(parameter, (slice(0, rows), slice(0, 1)))
    assert seen == ["0.0"]
    source.read(parameter, (slice(0, rows + 1), slice(0, 1)))
    assert seen == ["0.0", "1.0"]
