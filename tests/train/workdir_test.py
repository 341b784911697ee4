import subprocess
import sys

import pytest

from llama4_jax.train import lock_workdir

HOLDER = """
import pathlib, sys
from llama4_jax.train.workdir import lock_workdir
with lock_workdir(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_in_use_is_refused_until_its_holder_is_killed(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, folder]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"in use by another run, process {holder.pid};"):
            lock_workdir(folder).__enter__()
        holder.kill()
    with lock_workdir(folder):
        pass


def test_a_folder_is_free_again_after_the_block_even_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), lock_workdir(tmp_path):
        raise RuntimeError
    with lock_workdir(tmp_path), pytest.raises(ValueError, match="in use"):
        lock_workdir(tmp_path).__enter__()
