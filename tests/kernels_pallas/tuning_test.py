"""Block sizes: the files of chips are well formed, and their names follow jax's."""

import json

import pytest

from kernels_pallas import tuning


@pytest.mark.parametrize("path", sorted(tuning.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_files_of_block_sizes_are_well_formed(path):
    table = json.loads(path.read_text("utf-8"))
    assert table["chip"] == path.stem and table["date"]
    for entry in table["entries"]:
        assert "." in entry["operation"] or entry["operation"].endswith("_attention")
        assert isinstance(entry["shape"], dict)
        assert all(isinstance(size, int) and size > 0 for size in entry["blocks"].values())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "tpu_v5e"),
        ("TPU v5p", "tpu_v5p"),
        ("TPU v6 lite", "tpu_v6e"),
        ("TPU7x", "tpu_7x"),
        ("NVIDIA H100 80GB HBM3", "nvidia_h100"),
        ("NVIDIA H200", "nvidia_h200"),
        ("cpu", "cpu"),
    ],
)
def test_chips_are_named_after_what_jax_calls_them(kind, name):
    assert tuning.chip(kind) == name


def test_what_kernels_look_up_can_be_collected():
    with tuning.recorded() as found:
        tuning.lookup("collected.forward", {"q": 3}, head_dim=8)
    assert found == {"collected.forward": {"blocks": {"q": 3}, "shape": {"head_dim": 8}}}


def test_kernels_that_share_an_operation_agree_in_what_they_have_in_common():
    with tuning.recorded() as found:
        tuning.lookup("shared.forward", {"q": 3}, depth=8, width=4, dtype="int8")
        tuning.lookup("shared.forward", {"q": 3}, depth=4, width=8, dtype="int8")
    assert found["shared.forward"]["shape"] == {"dtype": "int8"}
