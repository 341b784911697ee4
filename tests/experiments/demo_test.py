"""The demo: a model that cannot read digits fails that check, and the shipped one passes all."""

import os
import subprocess
import sys

import pytest
from absl import flags

from experiments import demo
from tests.serve import tiny


def test_a_failed_check_fails_the_demo(tmp_path, capsys, monkeypatch):
    """A random model continues, agrees with itself on a mesh and converts, but reads nothing."""
    folder = tiny.write_checkpoint(tmp_path)
    (folder / "examples").mkdir()
    tiny.picture(0).save(folder / "examples" / "digit_4.png")
    monkeypatch.setattr(demo, "CODE", "def f(x):\n")
    values = flags.FlagValues()
    demo.define_flags(values)
    values(["demo", f"--checkpoint={folder}"])
    with pytest.raises(ValueError, match=r"1 of 3 checks failed\."):
        demo.main(values)
    out = capsys.readouterr().out
    assert "FAILED digit_4.png" in out
    assert "ok     all 72 tokens are the same" in out
    assert "ok     every parameter has kept every bit" in out


@pytest.mark.slow  # two minutes on two cores
def test_the_shipped_model_passes_every_check():
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-m", "experiments.demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    assert "checks passed in" in done.stdout.splitlines()[-1]
