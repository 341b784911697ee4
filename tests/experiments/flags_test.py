"""Flags shared by the commands: each mistake is refused by name, and each flag has its effect."""

import subprocess
import sys

import jax
import pytest
from absl import flags

from experiments import flags as shared
from llama4_jax.serve import EngineConfig


def values_of(*arguments):
    values = flags.FlagValues()
    shared.define_model_flags(values)
    flags.DEFINE_string("prompt", None, "", flag_values=values)
    flags.DEFINE_string("input", None, "", flag_values=values)
    flags.DEFINE_bool("chat", False, "", flag_values=values)
    values(["command", *arguments])
    return values


def test_a_checkpoint_must_be_named():
    with pytest.raises(shared.FlagError, match="--checkpoint=DIR is needed"):
        shared.check_checkpoint(values_of())


def test_a_checkpoint_must_be_a_folder(tmp_path):
    with pytest.raises(shared.FlagError, match="does not exist"):
        shared.check_checkpoint(values_of(f"--checkpoint={tmp_path / 'absent'}"))
    (tmp_path / "file").write_text("")
    with pytest.raises(shared.FlagError, match="is a file, not a folder"):
        shared.check_checkpoint(values_of(f"--checkpoint={tmp_path / 'file'}"))
    assert shared.check_checkpoint(values_of(f"--checkpoint={tmp_path}")) == tmp_path


SOURCES = ("prompt", "input", "chat")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give --prompt or --input or --chat"),
        (["--prompt=a", "--input=b"], "--prompt and --input exclude each other"),
        (["--chat", "--input=b"], "--input and --chat exclude each other"),
    ],
)
def test_exactly_one_source_of_requests_is_allowed(arguments, says):
    with pytest.raises(shared.FlagError, match=says):
        shared.check_one_of(values_of(*arguments), SOURCES)


def test_an_empty_prompt_is_a_prompt():
    assert shared.check_one_of(values_of("--prompt="), SOURCES) == "prompt"


def test_no_mesh_is_one_device():
    assert shared.make_mesh(values_of()) is None


def test_the_mesh_flag_makes_that_mesh():
    mesh = shared.make_mesh(values_of("--mesh=expert:4,tensor:2"))
    assert dict(mesh.shape) == {"expert": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("mesh", "says"),
    [
        ("expert:3", "spreads over 3 devices, but this machine has 8"),
        ("expert:16", "spreads over 16 devices, but this machine has 8"),
        ("expert", "must read axis:size"),
        ("pipeline:8", "unknown mesh axis 'pipeline'"),
        ("expert:0", "must read axis:size"),
    ],
)
def test_a_mesh_that_does_not_cover_the_devices_is_refused(mesh, says):
    assert jax.device_count() == 8
    with pytest.raises(shared.FlagError, match=says):
        shared.make_mesh(values_of(f"--mesh={mesh}"))


def test_an_unknown_precision_is_refused():
    with pytest.raises(flags.IllegalFlagValueError, match="dtype=float16"):
        values_of("--dtype=float16")


PROGRAM = """
from absl import flags
from experiments import flags as shared
from llama4_jax.serve import EngineConfig
def main(values):
    mesh = shared.make_mesh(values)
    print("devices", mesh.size)
    shared.check_checkpoint(values)
shared.launch(shared.define_model_flags, main)
"""


def run_program(monkeypatch, *arguments):
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.delenv("JAX_PLATFORMS")  # jax then logs every backend that is not there
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=100
    )


def test_a_cpu_is_split_as_the_mesh_asks_and_an_error_is_one_line(monkeypatch):
    done = run_program(monkeypatch, "--mesh=data:3", "--checkpoint=absent")
    assert done.stdout == "devices 3\n"
    assert done.stderr == "error: --checkpoint=absent does not exist.\n"
    assert done.returncode == 2


def test_a_stray_argument_is_refused(monkeypatch):
    done = run_program(monkeypatch, "f(x):")
    assert done.stderr.startswith("error: 'f(x):' is no flag")
    assert done.returncode == 2


def test_the_engine_s_sizes_that_help_shows_are_its_own():
    values = flags.FlagValues()
    shared.define_engine_flags(values)
    values(["command"])
    assert shared.engine_config(values) == EngineConfig()
