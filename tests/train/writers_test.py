import json
import pathlib
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from llama4_jax.train.writers import JsonLinesWriter, open_writers


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(folder):
    """Read the records of an event file: a length, its check sum, the message, its check sum."""
    (path,) = folder.glob("events.*")
    data, found = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


def test_metrics_are_lines_of_json(tmp_path):
    writer = open_writers(tmp_path)
    writer.write(1, {"train/loss": 2.5})
    writer.write(2, {"train/loss": 2.0})
    writer.close()
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train/loss": 2.5},
        {"step": 2, "train/loss": 2.0},
    ]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_what_is_not_finite_is_null_so_that_every_line_is_json(tmp_path):
    writer = JsonLinesWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"loss": float("nan"), "shares": [1.0, float("inf")], "count": 2})
    writer.close()
    expected = '{"step": 1, "loss": null, "shares": [1.0, null], "count": 2}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == expected


def test_a_kill_while_a_run_resumes_loses_no_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        JsonLinesWriter(path, resume_step=1)
    assert read(path) == [{"step": 1}, {"step": 2}]


def test_a_list_is_a_list_in_json_and_bars_in_tensorboard(tmp_path):
    writer = open_writers(tmp_path)
    writer.write(1, {"router/tokens/layer_03": [5, 0, 2]})
    writer.close()
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "router/tokens/layer_03": [5, 0, 2]}]
    (value,) = [v for event in events(tmp_path / "tensorboard") for v in event.summary.value]
    assert value.tag == "router/tokens/layer_03"
    assert list(value.histo.bucket) == [5, 0, 2]
    assert list(value.histo.bucket_limit) == [1, 2, 3]
    assert (value.histo.max, value.histo.num, value.histo.sum) == (3, 7, 4)


def test_a_resumed_run_drops_the_lines_beyond_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLinesWriter(path)
    for step in (1, 2, 3):
        first.write(step, {"loss": 0.0})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    second = JsonLinesWriter(path, resume_step=2)
    second.write(3, {"loss": 1.0})
    second.close()
    assert read(path) == [
        {"step": 1, "loss": 0.0},
        {"step": 2, "loss": 0.0},
        {"step": 3, "loss": 1.0},
    ]
