"""What others wrote is bounded before it is used: kind, size, nesting, and what messages quote."""

import json
import os

import pytest

from llama4_jax.untrusted import MAX_DEPTH, load_json, parse_json, read_bytes, shown


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 900, 100_000])
@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"a":', "}")])
def test_nesting_is_bounded_however_deep(begin, end, depth):
    text = begin * depth + "1" + end * depth
    with pytest.raises(ValueError, match="the line is nested deeper than 64"):
        parse_json(text, "the line")


def test_as_much_nesting_as_allowed_is_read():
    text = "[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH
    assert json.dumps(parse_json(text, "the line")) == text


@pytest.mark.parametrize("text", [b"\xff", b"{", "[1", "9" * 5000])
def test_what_is_no_json_is_named(text):
    with pytest.raises(ValueError, match="the line is not JSON: "):
        parse_json(text, "the line")


def test_a_file_must_hold_an_object(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object, not list"):
        load_json(tmp_path / "config.json")


def test_the_size_of_a_file_is_looked_at_before_its_bytes(tmp_path):
    path = tmp_path / "vast.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"vast\.json has 1099511627776 bytes, more than"):
        load_json(path)


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link"):
        if path.name == "link":
            path.symlink_to("/dev/zero")
        with pytest.raises(ValueError, match="is a device or a pipe"):
            read_bytes(path, 10)


def test_a_pointer_of_git_lfs_is_named_as_such(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a pointer of Git LFS.*git lfs pull"):
        read_bytes(path, 1000)


@pytest.mark.parametrize("value", ["x" * 10**6, [10**4000] * 10**5, {"a" * 10**6: {}}, {"k": [[]]}])
def test_a_quoted_value_fits_a_line(value):
    assert len(shown(value)) < 1000
    assert "\n" not in shown(value)
