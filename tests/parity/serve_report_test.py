"""Figures are chosen by name, told one by one, and kept as soon as they are known."""

import json

import pytest

from tests.parity import serve_report


def test_names_choose_figures_in_their_order_and_unknown_ones_are_refused():
    assert serve_report.wanted("", ["E1", "E2"]) == ["E1", "E2"]
    assert serve_report.wanted(" E3,E1", ["E1", "E2", "E3"]) == ["E1", "E3"]
    with pytest.raises(ValueError, match="E4 is no figure; choose from E1, E2"):
        serve_report.wanted("E1,E4", ["E1", "E2"])


def test_a_stop_loses_no_figure_that_was_known(tmp_path, capsys):
    output = tmp_path / "figures.json"

    def fails():
        raise KeyboardInterrupt

    figures = {"E1": lambda: {"times_as_fast": 3.14159, "its_batch": 8}, "E2": fails}
    with pytest.raises(KeyboardInterrupt):
        serve_report.tell(figures, {"threads": 2}, output)
    kept = json.loads(output.read_text("utf-8"))
    assert kept["E1"]["times_as_fast"] == 3.14159 and kept["threads"] == 2 and "E2" not in kept
    assert "E1   times as fast: 3.142, its batch: 8\n" in capsys.readouterr().out


def test_values_within_values_are_laid_out_in_one_line():
    values = {"at_80%": {"seconds": 1.5}, "held": [(1, 2.0), (3, 4.0)]}
    assert serve_report.line(values) == "at 80%: (seconds: 1.5), held: 1 2 3 4"
