"""Tests of checkpoint/meta.py: merging ranks, alternates, and what must be refused."""

import dataclasses
import shutil

import numpy as np
import pytest

from llama4_jax.checkpoint.convert import make_plan, open_checkpoint
from llama4_jax.checkpoint.meta import open_meta
from llama4_jax.checkpoint.torch_file import TensorFileWriter, read_tensors
from llama4_jax.checkpoint.writer import write_checkpoint
from tests.checkpoint.tiny import (
    DENSE_TIED,
    GOLDEN,
    TINY,
    MemorySource,
    assert_holds,
    assert_same,
    write,
)


def _rewrite(path, change):
    """Change the tensors of a rank file."""
    tensors = {key: np.array(tensor.view()) for key, tensor in read_tensors(path).items()}
    change(tensors)
    with TensorFileWriter(path, {k: (v.shape, v.dtype) for k, v in tensors.items()}) as file:
        for value in tensors.values():
            file.write([np.ascontiguousarray(value)])


def test_eight_files_cut_by_metas_resharder_are_the_model_that_transformers_wrote():
    assert_same(open_meta(GOLDEN / "meta"), open_checkpoint(GOLDEN / "hf"))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_any_number_of_ranks_reads_back_bit_for_bit(tmp_path, ranks):
    regular = dataclasses.replace(TINY.text, num_layers=4)
    config = dataclasses.replace(TINY, text=regular)
    source = write(config, tmp_path / "meta", "meta", model_parallel=ranks)
    assert len(list((tmp_path / "meta").glob("*.pth"))) == ranks
    assert_holds(tmp_path / "meta", source)


def test_our_rank_files_hold_what_metas_resharder_put_there(tmp_path):
    source = open_checkpoint(GOLDEN / "hf")
    write_checkpoint(make_plan(source, "meta"), tmp_path / "meta", files={})
    for rank in range(8):
        name = f"consolidated.{rank:02d}.pth"
        ours, theirs = read_tensors(tmp_path / "meta" / name), read_tensors(GOLDEN / "meta" / name)
        assert ours.keys() <= theirs.keys()
        for key, tensor in ours.items():
            np.testing.assert_array_equal(tensor.view(), theirs[key].view(), err_msg=key)


def test_tied_embeddings_are_written_twice_and_read_once(tmp_path):
    source = write(DENSE_TIED, tmp_path / "meta", "meta", model_parallel=2)
    tensors = read_tensors(tmp_path / "meta" / "consolidated.01.pth")
    np.testing.assert_array_equal(
        tensors["output.weight"].view(), tensors["tok_embeddings.weight"].view()
    )
    assert_holds(tmp_path / "meta", source)


def test_names_after_metas_load_hooks_are_read_too(tmp_path):
    source = write(TINY, tmp_path / "meta", "meta", model_parallel=2)

    def rename(tensors):
        for key in list(tensors):
            prefix, _, rest = key.partition("attention.wqkv.")
            if rest == "weight":
                parts = np.split(tensors.pop(key), [16, 24])
                for name, part in zip(("wq", "wk", "wv"), parts, strict=True):
                    tensors[f"{prefix}attention.{name}.weight"] = part
            elif rest:
                tensors[prefix + "attention_norm.weight"] = tensors.pop(key)
            prefix, _, rest = key.partition("feed_forward.")
            ffn = prefix + "feed_forward."
            if rest in ("norm.weight", "mlp.layer_norm_weight"):
                tensors[prefix + "ffn_norm.weight"] = tensors.pop(key)
            elif rest == "mlp.fc1_weight":
                tensors[ffn + "w1.weight"], tensors[ffn + "w3.weight"] = np.split(
                    tensors.pop(key), 2
                )
            elif rest == "mlp.fc2_weight":
                tensors[ffn + "w2.weight"] = tensors.pop(key)
            elif rest == "w_in_shared_FD.weight":
                tensors[ffn + "shared_expert.w1.weight"] = tensors.pop(key)
            elif rest == "experts.moe_w_out_eF_D":
                tensors[ffn + "experts.w2"] = tensors.pop(key).reshape(4, 12, 32)

    for path in (tmp_path / "meta").glob("*.pth"):
        _rewrite(path, rename)
    assert_holds(tmp_path / "meta", source)


@pytest.fixture
def broken(tmp_path):
    write(TINY, tmp_path / "meta", "meta", model_parallel=2)
    return tmp_path / "meta"


def test_a_missing_rank_file_is_noticed(broken):
    (broken / "consolidated.00.pth").unlink()
    with pytest.raises(ValueError, match=r"numbered from 0 to 0 without a gap"):
        open_meta(broken)


def test_a_missing_last_rank_file_is_noticed_too(broken):
    (broken / "consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match=r"has 1 .* 32 rows of 64 tokens, which takes 2 files"):
        open_meta(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), r"norm.weight \(32,\) is missing"),
        (lambda t: t.update(x=np.zeros(3, np.float32)), r"x \(3,\) is not part of this model"),
        (
            lambda t: t.update({"norm.weight": np.zeros(31, np.float32)}),
            r"norm.weight has shape \(31,\), expected \(32,\)",
        ),
    ],
)
def test_damage_in_any_rank_file_is_named_with_file_and_shapes(broken, change, message):
    _rewrite(broken / "consolidated.01.pth", change)
    with pytest.raises(ValueError, match=rf"consolidated.01.pth does not hold[^$]*{message}"):
        open_meta(broken)


def test_fp8_without_its_scales_is_refused(tmp_path):
    shutil.copytree(GOLDEN / "meta_fp8", tmp_path / "meta")
    (tmp_path / "meta" / "fp8_scales_1.pt").unlink()
    with pytest.raises(
        ValueError, match=r"layers.1.ffn.experts.w_gate_EDF is FP8 and has no scale"
    ):
        open_meta(tmp_path / "meta")


def test_a_pattern_that_meta_cannot_express_is_refused_before_writing(tmp_path):
    text = dataclasses.replace(TINY.text, moe_layers=(0, 3))
    source = MemorySource(dataclasses.replace(TINY, text=text))
    with pytest.raises(ValueError, match=r"moe_layers .* cannot be expressed"):
        make_plan(source, "meta")
