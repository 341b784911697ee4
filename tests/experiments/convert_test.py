"""The convert command: each flag has its effect, and each mistake is refused before work starts."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
from absl import flags

from experiments import convert
from experiments.flags import FlagError
from llama4_jax import checkpoint
from llama4_jax.checkpoint import open_checkpoint
from tests.checkpoint.tiny import GOLDEN, assert_same


def values_of(*arguments):
    values = flags.FlagValues()
    convert.define_flags(values)
    values(["convert", *arguments])
    return values


def run(*arguments, stderr=subprocess.PIPE):
    command = [sys.executable, "-m", "experiments.convert", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)


def test_the_command_converts_and_says_what_it_wrote(tmp_path):
    target = tmp_path / "out"
    done = run(f"--source={GOLDEN / 'meta'}", f"--target={target}", "--to=hf")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote hf checkpoint {target} from meta {GOLDEN / 'meta'}\n"
    assert done.stderr == ""  # no bar where there is no terminal
    assert_same(open_checkpoint(target), open_checkpoint(GOLDEN / "hf"))


def test_a_terminal_sees_a_progress_bar(tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    done = run(
        f"--source={GOLDEN / 'hf'}", f"--target={tmp_path / 'out'}", "--to=hf", stderr=theirs
    )
    os.close(theirs)
    assert done.returncode == 0
    assert b"100%" in os.read(ours, 1 << 16)


def test_dtype_and_model_parallel_have_their_effect(tmp_path):
    source, target = f"--source={GOLDEN / 'hf'}", tmp_path / "out"
    options = ["--to=meta", "--dtype=float32", "--model_parallel=2"]
    convert.main(values_of(source, f"--target={target}", *options))
    assert len(list(target.glob("*.pth"))) == 2
    assert open_checkpoint(target).dtype("embed.table_VD") == np.float32


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--source is needed"),
        (["--source=a"], "--target is needed"),
        (["--source=a", "--target=b"], "--to is needed"),
        (["--source=absent", "--target=b", "--to=hf"], "--source=absent does not exist"),
        (["--source=pyproject.toml", "--target=b", "--to=hf"], "is a file, not a folder"),
        (["--source=tests", "--target=tests", "--to=hf"], "--target=tests already exists"),
        (
            ["--source=tests", "--target=b", "--to=hf", "--model_parallel=8"],
            "--model_parallel is for --to=meta, not for --to=hf",
        ),
    ],
)
def test_flags_that_cannot_work_are_refused(arguments, says):
    with pytest.raises(FlagError, match=says):
        convert.main(values_of(*arguments))


def test_the_layouts_that_help_offers_are_those_there_are():
    assert convert.FORMATS == checkpoint.FORMATS


def test_a_layout_that_does_not_exist_is_refused():
    with pytest.raises(flags.IllegalFlagValueError, match="hf"):
        values_of("--to=gguf")


def test_a_source_that_is_no_checkpoint_is_one_clear_line(tmp_path):
    done = run(f"--source={tmp_path}", f"--target={tmp_path / 'out'}", "--to=hf")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "holds no checkpoint" in done.stderr
    assert done.stderr.count("\n") == 1
