"""How a command ends: in a status that stops a line of commands, and in one line at most."""

import os
import signal
import subprocess
import sys
import warnings

import pytest
from absl import flags

from experiments import launch
from experiments.flags import FlagError

PROGRAM = """
import signal, time
from experiments import launch, terminal
def main(values):
    # A child of a shell without a terminal ignores SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        print("caf\\u00e9 \\ud83d", flush=True)
        terminal.print_line({"text": "caf\\u00e9"})
        time.sleep(100)
    except KeyboardInterrupt as error:
        error.add_note("what is done is in x.partial")
        raise
launch.launch(lambda values: None, main)
"""


def start(**environment):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("number", "status", "says"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_an_interrupted_command_ends_in_its_status_and_without_a_traceback(number, status, says):
    with start() as process:
        process.stdout.readline()
        process.send_signal(number)
        _, stderr = process.communicate()
    assert process.returncode == status
    assert stderr == f"{says}\nwhat is done is in x.partial\n"


@pytest.mark.parametrize(
    ("encoding", "text", "line"),
    [
        ("ascii", "caf\\xe9 \\ud83d", '{"text": "caf\\u00e9"}'),
        ("utf-8", "caf\u00e9 \\ud83d", '{"text": "caf\u00e9"}'),
    ],
)
def test_no_character_ends_a_command_whatever_the_terminal_can_show(encoding, text, line):
    with start(PYTHONIOENCODING=encoding) as process:
        assert [process.stdout.readline() for _ in range(2)] == [f"{text}\n", f"{line}\n"]
        process.kill()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "error: memory: there is none left; --verbosity=1 shows"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: 9G\nmore"),
            "error: RuntimeError: RESOURCE_EXHAUSTED: 9G;",
        ),
        (NotImplementedError("int4 needs a TPU"), "error: NotImplementedError: int4 needs a TPU;"),
        (ImportError("No module named 'libtpu'"), "error: ImportError: No module named 'libtpu';"),
        (RecursionError("too deep"), "error: RecursionError: too deep;"),
        (ValueError("a is b"), "error: a is b"),
        (OSError("no"), "error: no"),
    ],
)
def test_the_foreseeable_kinds_of_errors_are_a_line(monkeypatch, capsys, error, says):
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def main(_):
        raise error

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["program"])
    assert launch._status(main, ["program"]) == 1
    assert capsys.readouterr().err.startswith(says)


def test_a_bug_is_no_line(monkeypatch):
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["program"])
    with pytest.raises(ZeroDivisionError):
        launch._status(lambda _: 1 / 0, ["program"])


def test_a_warning_is_a_line():
    program = "import warnings\nfrom experiments.launch import launch\n"
    program += "launch(lambda _: None, lambda _: warnings.warn('num_beams is not applied'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "warning: num_beams is not applied\n")


def test_a_reader_that_has_seen_enough_ends_a_command_quietly():
    program = PROGRAM.replace("time.sleep(100)", "print('x' * 100_000)")
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


# ----------------------------------------------------------------------------------- programs


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """An environment that says nothing of compiled programs."""
    mine = {n: v for n, v in os.environ.items() if not n.startswith("JAX_")}
    mine["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    monkeypatch.setattr(os, "environ", mine)
    return mine


def test_compiled_programs_are_kept_in_the_user_s_cache_folder(environment, tmp_path):
    launch._keep_programs(None)
    folder = environment["JAX_COMPILATION_CACHE_DIR"]
    assert folder.startswith(str(tmp_path / "cache" / "llama4_jax")) and os.path.isdir(folder)


def test_the_flag_and_jax_s_own_variable_name_another_folder(environment, tmp_path):
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "own")
    launch._keep_programs(None)
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "own")
    launch._keep_programs(str(tmp_path / "asked"))
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "asked")
    (tmp_path / "file").touch()
    with pytest.raises(FlagError, match=r"--compilation_cache=.*/file/x cannot be made"):
        launch._keep_programs(str(tmp_path / "file" / "x"))


def test_a_home_that_cannot_be_written_to_keeps_nothing_and_is_no_error(environment, tmp_path):
    (tmp_path / "cache").touch()
    launch._keep_programs(None)
    assert environment["JAX_ENABLE_COMPILATION_CACHE"] == "false"


COMPILES = """
from experiments import launch
def main(values):
    import jax
    jax.jit(lambda x: x + 1)(1)
launch.launch(lambda values: None, main)
"""


@pytest.mark.parametrize(("asked", "kept"), [("DIR", True), ("off", False)])
def test_a_command_keeps_what_it_compiles_unless_told_not_to(environment, tmp_path, asked, kept):
    folder = tmp_path / "programs"
    environment |= {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_COMPILATION_CACHE_DIR": str(folder if asked == "off" else tmp_path / "other"),
        "JAX_PLATFORMS": "cpu",
    }
    flag = f"--compilation_cache={folder if asked == 'DIR' else asked}"
    subprocess.run([sys.executable, "-c", COMPILES, flag], env=environment, check=True)
    assert any(folder.glob("*-cache")) == kept
