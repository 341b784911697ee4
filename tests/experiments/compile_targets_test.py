"""The command that compiles Scout's programs chooses them, shows them, and fails with them."""

import json

import pytest
from absl import flags

from experiments import compile_targets
from experiments.benchmark import figures, names, programs, suites, topologies
from experiments.launch import FlagError
from tests.experiments.benchmark.sound import changed


def values_of(*arguments):
    values = flags.FlagValues()
    compile_targets.define_flags(values)
    values(["command", *arguments])
    return values


def test_the_names_that_help_offers_are_those_there_are():
    assert tuple(suites.SUITES) == names.SUITES
    assert tuple(topologies.TARGETS) == names.CHIPS
    assert {*names.KERNEL_CHIPS, *names.PROGRAM_CHIPS} <= {*names.CHIPS}


def test_programs_are_chosen_by_name_and_depth():
    (decode,) = compile_targets.wanted(values_of("--only=decode", "--layers=12"), "v5p")
    assert decode.layers == 12 and decode.kind == "decode"
    shallow, *_ = compile_targets.wanted(values_of(), "h100")
    assert shallow.layers == programs.SHALLOW


@pytest.mark.parametrize("argument", ["--only=decoed", "--layers=6"])
def test_a_wrong_choice_is_refused(argument):
    with pytest.raises(FlagError):
        compile_targets.wanted(values_of(argument), "v5p")


def test_every_program_has_a_line_and_a_record_and_faults_end_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(topologies, "prepare", lambda: None)
    monkeypatch.setattr(topologies.Target, "devices", lambda *_: [])
    monkeypatch.setattr(programs, "trace", lambda program, _: program)

    def compile_traced(program, text):
        assert text.name == f"v5p-{program.name}-{program.layers}.hlo"
        if program.name == "prefill":
            raise NotImplementedError("too wide")
        return changed(instructions=100 * program.layers)

    monkeypatch.setattr(figures, "compile_traced", compile_traced)
    path = tmp_path / "figures.json"
    values = values_of(
        "--target=v5p", "--only=decode-shallow,decode,prefill", f"--output={path}", "--hlo=texts"
    )
    with pytest.raises(ValueError, match="2 of 3 have faults"):
        compile_targets.main(values)
    said = capsys.readouterr().out
    assert "FAULT v5p decode tensor:4: grows with depth: 4800 instructions" in said
    assert "FAULT v5p prefill tensor:4: does not compile: too wide" in said
    written = json.loads(path.read_text())
    assert written["suite"] == "targets" and len(written["records"]) == 3
    assert written["records"][0]["figures"]["scratch"] == changed().scratch
