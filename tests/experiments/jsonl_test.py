"""JSON lines: errors with line numbers, and files that are complete or absent."""

import json

import pytest

from experiments import jsonl
from experiments.jsonl import (
    LineError,
    LineWriter,
    check_writable,
    naming_lines,
    partial_path,
    read_lines,
)
from llama4_jax.serve.requests import RequestError


def written(tmp_path, text, mode="w"):
    path = tmp_path / "in.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    path = written(tmp_path, b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": "\xc3\xa9"}')
    assert read_lines(path, dict) == [{"a": 1}, {"a": "é"}]


@pytest.mark.parametrize(
    ("second_line", "says"),
    [
        ("{", "in.jsonl:2: the line is not JSON: Expecting property name"),
        ("[1]", "in.jsonl:2: expected a JSON object, found list"),
        ('{"a": 2}', "in.jsonl:2: no twos"),
        (b"\xff", "in.jsonl:2: .*utf-8"),
        ('{"a": ' + "[" * 100_000, "in.jsonl:2: the line is nested deeper"),
    ],
)
def test_an_error_names_the_file_and_the_line(tmp_path, second_line, says):
    def parse(value):
        if value["a"] == 2:
            raise ValueError("no twos")

    second = second_line if isinstance(second_line, bytes) else second_line.encode()
    path = written(tmp_path, b'{"a": 1}\n' + second + b"\n")
    with pytest.raises(LineError, match=says):
        read_lines(path, parse)


def test_a_line_out_of_all_proportion_is_refused_by_number(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 10)
    with pytest.raises(LineError, match=r"in\.jsonl:2: the line has over 10 bytes"):
        read_lines(written(tmp_path, '{"a": 1}\n{"a": 12345}'), dict)


def test_an_error_of_a_request_names_the_line_that_it_came_from(tmp_path):
    path = written(tmp_path, '{"a": 1}\n\n{"a": 2}\n')
    with pytest.raises(LineError, match=r"in\.jsonl:3: request 1 is long"), naming_lines(path):
        raise RequestError("request 1 is long", 1)
    with pytest.raises(RequestError), naming_lines(None):
        raise RequestError("request 1 is long", 1)


def test_the_file_has_its_name_only_once_it_is_complete(tmp_path):
    path = tmp_path / "out.jsonl"
    with LineWriter(path, 2) as lines:
        lines.write({"text": "é"})
        assert not path.exists()
        assert partial_path(path).read_text("utf-8") == '{"text": "é"}\n'  # flushed at once
    assert json.loads(path.read_text("utf-8")) == {"text": "é"}
    assert not partial_path(path).exists()


def test_an_interrupt_keeps_what_was_written_and_says_where(tmp_path):
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt) as caught, LineWriter(path, 2) as lines:
        lines.write({"a": 1})
        raise KeyboardInterrupt
    assert not path.exists()
    assert partial_path(path).read_text() == '{"a": 1}\n'
    assert str(partial_path(path)) in caught.value.__notes__[0]


def test_an_error_before_the_first_line_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="early"), LineWriter(tmp_path / "out.jsonl", 2):
        raise ValueError("early")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_refused(tmp_path):
    path = written(tmp_path, "precious")
    with pytest.raises(ValueError, match=r"in\.jsonl exists; remove it or name another"):
        check_writable(path)


def test_the_remains_of_an_interrupted_run_are_not_overwritten(tmp_path):
    partial_path(tmp_path / "out.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"out\.jsonl\.partial holds the answers"):
        check_writable(tmp_path / "out.jsonl")


def test_an_output_in_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist; make it first"):
        check_writable(tmp_path / "missing" / "out.jsonl")
