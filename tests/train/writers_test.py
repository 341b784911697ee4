import json

from llama4_jax.train.writers import JsonLinesWriter, open_writers


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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
