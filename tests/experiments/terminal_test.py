"""What takes time is seen on a terminal, and nowhere else."""

import io
import os
import pty
import subprocess
import sys
import termios

from experiments import terminal
from tests.house import tree
from tests.serve import tiny


def test_bars_and_waiting_are_silent_without_a_terminal(capsys):
    with terminal.bytes_on_terminal(100) as advance:
        advance(100)
    terminal.Waiting().end()
    assert capsys.readouterr() == ("", "")


def test_waiting_is_taken_back_by_the_first_token(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    waiting = terminal.Waiting()
    assert screen.getvalue() == terminal.Waiting.TEXT
    waiting.end()
    waiting.end()
    blank = "\r" + " " * len(terminal.Waiting.TEXT) + "\r"
    assert screen.getvalue() == terminal.Waiting.TEXT + blank


def test_loading_and_answering_are_seen_on_a_terminal(tmp_path):
    checkpoint = tiny.write_checkpoint(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"tokens": [5, 6]}\n')
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    command = [
        sys.executable, "-m", "experiments.score", f"--checkpoint={checkpoint}",
        f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out.jsonl",
    ]  # fmt: skip
    subprocess.run(command, cwd=tree.ROOT, stderr=slave, check=True)
    seen = os.read(master, 1 << 16).decode()
    os.close(master)
    os.close(slave)
    assert "B/s" in seen and "1/1" in seen and "answer" in seen
