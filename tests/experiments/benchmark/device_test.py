"""The script for a device runs each shape apart, and a hanging or crashing one takes no other."""

import json
import sys

import pytest
from absl import flags

from experiments.benchmark import device
from experiments.benchmark.device import CHECKED, TIMED, Job, jobs, run_job, run_jobs, table
from experiments.launch import FlagError
from kernels_pallas.shapes import SHAPES

RECORD = {
    "pass": "forward", "backend": "gpu", "faults": [], "relative_error": 0.003,
    "largest_error": 0.01, "repetitions": 30, "differing": 0, "seconds": 0.002, "of_limit": 0.8,
    "ratios": {"cudnn": 0.9},
}  # fmt: skip

# What a process does, by the name of its job.
STUB = f"""
import json, os, sys, time
name, path = sys.argv[1:]
record = {RECORD!r}
if name == "racing":
    record |= {{"differing": 3, "faults": ["3 of 30 runs differ in some bit: a race"]}}
with open(path, "a") as file:
    file.write(json.dumps(record) + "\\n")
    if name == "cut":
        file.write('{{"pass": "back')
if name == "hanging":
    time.sleep(60)
if name == "crashing":
    print("an illegal address", flush=True)
    os.abort()
if name == "environment":
    print(os.environ["MEMORY"])
    sys.exit(1)
sys.exit(name == "racing")
"""


def stub(job, records):
    return [sys.executable, "-c", STUB, job.name, records]


def job(name, part="check", **more):
    return Job(part=part, name=name, flags=(), **more)


def values_of(*arguments):
    values = flags.FlagValues()
    device.define_flags(values)
    values(["command", *arguments])
    return values


@pytest.mark.parametrize(
    ("name", "outcome"),
    [("sound", "ok"), ("racing", "FAULT"), ("crashing", "CRASHED"), ("cut", "ok")],
)
def test_a_process_has_an_outcome_and_keeps_its_records(name, outcome):
    result = run_job(job(name), stub)
    assert result["outcome"] == outcome
    assert [record["pass"] for record in result["records"]] == ["forward"]
    assert ("said" in result) == (outcome != "ok")


def test_a_hanging_process_is_killed_after_its_limit_and_keeps_its_records():
    result = run_job(job("hanging", limit=2), stub)
    assert result["outcome"] == "HUNG" and result["took"] < 20
    assert len(result["records"]) == 1


def test_a_job_has_its_environment():
    result = run_job(job("environment", environment={"MEMORY": ".95"}), stub)
    assert result["said"].strip() == ".95"


def test_a_crash_takes_no_other_shape_with_it_and_every_record_is_kept_at_once():
    kept = []
    todo = [job("crashing"), job("sound"), job("sound", part="time")]
    results = run_jobs(todo, 2, None, kept.append, lambda each: run_job(each, stub))
    assert [result["outcome"] for result in results] == ["CRASHED", "ok", "ok"]
    assert len(kept) == 3
    text = table(results)
    assert "CRASHED" in text and "an illegal address" in text and text.count("cudnn 0.90") == 3


def test_a_part_that_is_out_of_time_begins_nothing_more():
    def slow(each):
        return {"part": each.part, "name": each.name, "outcome": "ok", "records": [RECORD]}

    results = run_jobs([job("a"), job("b", part="time")], 1, -1, lambda _: None, slow)
    assert [result["outcome"] for result in results] == ["not run"] * 2
    assert "not run" in table(results)


def test_every_part_names_shapes_that_exist_in_their_order():
    assert {*CHECKED, *TIMED} <= {*SHAPES}
    assert [each.name for each in jobs(None)][-1] == "nano"
    assert [each.part for each in jobs("tune")] == ["tune"] * (len(TIMED) - 1)
    (alone,) = [each for each in jobs("time") if "MEM_FRACTION" in str(each.environment)]
    assert alone.name == "scout_decode_10m"


def test_checking_and_repeating_may_be_asked_for_apart():
    assert all("--do=check" in each.flags for each in jobs("check"))
    assert all("--do=repeat" in each.flags for each in jobs("repeat"))
    (one,) = jobs("odd_88")
    assert "--do=check,repeat,time" in one.flags and "--shapes=odd_88" in one.flags
    with pytest.raises(FlagError, match="--part=odd is neither"):
        jobs("odd")


def test_the_command_writes_records_prints_verdicts_and_fails_if_one_did(
    monkeypatch, tmp_path, capsys
):
    results = {
        "odd_88": {"outcome": "ok", "records": [RECORD, RECORD]},
        "odd_1": {"outcome": "HUNG", "records": [], "said": "waits"},
    }
    todo = [job("odd_88"), job("odd_1")]
    monkeypatch.setattr(device, "jobs", lambda *_: todo)
    run = lambda each: {"part": each.part, "name": each.name, **results[each.name]}  # noqa: E731
    monkeypatch.setattr(device.run_jobs, "__defaults__", (run,))
    with pytest.raises(ValueError, match="1 of 2 did not pass"):
        device.main(values_of("--chip=hopper", f"--out={tmp_path}"))
    lines = (tmp_path / "hopper.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines].count("odd_88") == 2
    assert "HUNG" in capsys.readouterr().out
    with pytest.raises(FlagError, match="give --chip"):
        device.main(values_of())
