"""Records are laid out in columns, with what is wrong below them, and faults end a command."""

import json

import pytest

from experiments.benchmark import report
from experiments.benchmark.report import Column, Table

TABLE = Table(
    names=report.texts("target:6 shape:8"),
    values=(
        Column("GB", "figures.bytes", ">5", 1e9),
        Column("s", "figures.seconds", ">4", "{:.1f}".format),
        Column(" beside", "", "<", lambda record: record.get("beside", "none")),
    ),
    notes="GB: moved.",
)
SOUND = {"target": "v5p", "shape": "line", "figures": {"bytes": 12_345_678_901}, "faults": []}


def test_a_value_is_divided_by_its_unit_and_one_that_is_missing_says_so():
    assert TABLE.header() == "target shape       GB    s  beside"
    assert TABLE.line(SOUND) == "v5p    line     12.35  n/a none"
    timed = {**SOUND, "figures": {"bytes": 0, "seconds": 2.25}, "beside": "splash"}
    assert TABLE.line(timed) == "v5p    line         0  2.2 splash"


@pytest.mark.parametrize(
    ("known", "says"),
    [
        ({"skipped": "does not fit"}, "does not fit"),
        ({"faults": ["fails"]}, "FAULT"),
        ({}, "-"),
    ],
)
def test_a_record_without_values_says_why(known, says):
    record = {"target": "v5p", "shape": "line", "faults": [], **known}
    assert TABLE.line(record) == f"v5p    line     {says}"


def test_what_is_wrong_stands_below_its_line_and_ends_the_command(capsys, tmp_path):
    wrong = {**SOUND, "mesh": "tensor:4", "faults": ["too large", "too slow"]}
    shown = TABLE.show(iter([SOUND, wrong]))
    assert shown == [SOUND, wrong]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == TABLE.header() and lines[1:3] == [TABLE.line(each) for each in shown]
    assert lines[3:5] == [f"FAULT v5p line tensor:4: {fault}" for fault in wrong["faults"]]
    assert lines[-1] == TABLE.notes
    path = tmp_path / "found.json"
    with pytest.raises(ValueError, match="1 of 2 have faults"):
        report.conclude({"suite": "compile", "records": shown}, path)
    written = json.loads(path.read_text())
    assert written["records"] == shown and {"date", "jax"} <= {*written}
    report.conclude({"records": [SOUND]}, None)


def test_records_are_on_disk_as_soon_as_they_are_known(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    kept = report.appended(path, "cpu", iter([SOUND, SOUND]))
    next(kept)
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["device"] == "cpu" and json.loads(line)["shape"] == "line"
