"""What pip installs works outside the checkout, its commands included."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.house import tree

QUICK_START = """
import llama4_jax
from llama4_jax import Request, from_pretrained, generate
nano = from_pretrained("nano")
(answer,) = generate(nano, [Request(prompt="import os")], max_new_tokens=4)
print(llama4_jax.__version__, answer.finish_reason)
"""
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")


def run(*command: str | pathlib.Path, cwd: pathlib.Path, status: int = 0, **more: str) -> str:
    """Run a command without this checkout on its path; return what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    return done.stdout


def test_one_command_lists_and_runs_all_others(tmp_path):
    listed = run(sys.executable, "-m", "llama4_jax", cwd=tmp_path, PYTHONPATH=str(tree.ROOT))
    for name in tree.experiment_files():
        assert f"  {name} " in listed
    shown = run(
        sys.executable, "-m", "llama4_jax", "convert", "--helpshort", cwd=tmp_path,
        status=1, PYTHONPATH=str(tree.ROOT),
    )  # fmt: skip
    assert "--source" in shown


def test_an_unknown_command_names_those_there_are(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "generat"],
        cwd=tree.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "'generat' is no command" in done.stderr
    assert "generate" in done.stderr


@pytest.mark.slow
def test_a_built_wheel_serves_from_an_empty_environment(tmp_path):
    wheels = tmp_path / "wheels"
    run(sys.executable, *PIP, "wheel", "--no-deps", "-w", wheels, tree.ROOT, cwd=tmp_path)
    (wheel,) = wheels.glob("llama4_jax-*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "empty", cwd=tmp_path)
    programs = tmp_path / "empty" / "bin"
    python = programs / "python"
    run(python, *PIP, "install", wheel, cwd=tmp_path)
    assert run(python, "-c", QUICK_START, cwd=tmp_path).split() == ["0.1.0", "length"]
    hidden = "import importlib.util as u; print(u.find_spec('experiments'))"
    assert run(python, "-c", hidden, cwd=tmp_path).strip() == "None"
    llama4 = programs / "llama4"
    for name in tree.experiment_files():
        assert run(llama4, name, "--helpshort", cwd=tmp_path, status=1)
    asked = ("--checkpoint=nano", "--prompt=import os", "--max_new_tokens=4")
    assert run(llama4, "generate", *asked, cwd=tmp_path)
    assert "6 checks passed" in run(llama4, "demo", cwd=tmp_path)
    run(llama4, "convert", "--source=nano", "--target=meta", "--to=meta", cwd=tmp_path)
    run(llama4, "pretrain", "--recipe=nano", "--workdir=w", "--steps=2", cwd=tmp_path)


@pytest.mark.slow
def test_the_kernels_are_a_package_of_their_own(tmp_path):
    source = tree.ROOT / "kernels_pallas"
    run(sys.executable, *PIP, "wheel", "--no-deps", "-w", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("kernels_pallas-*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "empty", cwd=tmp_path)
    python = tmp_path / "empty" / "bin" / "python"
    run(python, *PIP, "install", wheel, cwd=tmp_path)
    program = (
        "import jax.numpy as jnp, kernels_pallas as k; x = jnp.ones((1, 8, 2, 16));"
        "at = {'q_positions_BT': jnp.arange(8)[None], 'kv_positions_BS': jnp.arange(8)[None]};"
        "print(k.chunked_attention(x, x, x, **at, chunk_size=4).shape)"
    )
    assert run(python, "-c", program, cwd=tmp_path).strip() == "(1, 8, 2, 16)"
