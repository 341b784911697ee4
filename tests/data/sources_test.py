"""Sources are real, in a fixed order, and their held-out parts stay apart."""

import numpy as np
import pytest

from llama4_jax.data import sources


def test_the_standard_library_is_read_in_path_order_and_split_without_overlap():
    train, held_out = sources.read_code("train"), sources.read_code("held_out")
    for documents in (train, held_out):
        paths = [document.path for document in documents]
        assert paths == sorted(paths)
    assert not {d.path for d in train} & {d.path for d in held_out}
    assert 0.01 < len(held_out) / len(train) < 0.1
    assert sum(len(d.text) for d in train) > 5_000_000
    assert "argparse.py" in {d.path for d in train + held_out}


def test_junk_is_left_out_and_paths_have_forward_slashes(tmp_path):
    for path in ("a/b.py", "test/x.py", "lib2to3/y.py", "_sysconfigdata_x.py", "a/notes.txt"):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x = 1\n")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    found = [
        document.path
        for split in ("train", "held_out")
        for document in read_or_none(split, tmp_path)
    ]
    assert found == ["a/b.py"]


def read_or_none(split, root):
    try:
        return sources.read_code(split, root)
    except ValueError:
        return []


def test_a_folder_without_sources_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no UTF-8 \.py file in the 'train' part"):
        sources.read_code("train", tmp_path)


def test_the_split_depends_on_the_item_alone():
    assert [sources.split_of(str(i).encode(), 4) for i in range(8)] == [
        sources.split_of(str(i).encode(), 4) for i in reversed(range(8))
    ][::-1]
    share = np.mean([sources.split_of(str(i).encode(), 4) == "held_out" for i in range(4000)])
    assert 0.22 < share < 0.28


def test_digits_are_1797_scans_of_all_ten_digits_in_two_parts():
    train, held_out = sources.read_digits("train"), sources.read_digits("held_out")
    assert len(train) + len(held_out) == 1797
    assert 150 < len(held_out) < 300
    for scans in (train, held_out):
        assert scans.pixels_NHW.shape == (len(scans), 8, 8)
        assert scans.pixels_NHW.dtype == np.uint8
        assert (scans.pixels_NHW.min(), scans.pixels_NHW.max()) == (0, 255)
        assert set(scans.labels_N.tolist()) == set(range(10))
    seen = {pixels.tobytes() for pixels in train.pixels_NHW}
    assert not any(pixels.tobytes() in seen for pixels in held_out.pixels_NHW)
