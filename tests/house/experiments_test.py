"""Every entry point explains itself and refuses a flag it does not know."""

import ast
import re
import subprocess
import sys

import pytest

from tests.house import tree


def run_experiment(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one experiment from the root, as a person would."""
    command = [sys.executable, "-m", f"experiments.{name}", *arguments]
    return subprocess.run(command, cwd=tree.ROOT, capture_output=True, text=True, timeout=120)


def flags_in(section: str) -> set[str]:
    """Return the flags that a help text lists, `--[no]verbose:` as `verbose`."""
    return set(re.findall(r"^\s+(?:-\w,)?--(?:\[no\])?(\w+):", section, re.MULTILINE))


@pytest.mark.parametrize("name", tree.experiment_modules())
def test_short_help_shows_every_flag_of_ours(name):
    """`--helpfull` groups flags by module; all from experiments/ must be in the short help too."""
    short = run_experiment(name, "--helpshort")
    assert "flags:" in short.stdout, short.stderr
    sections = re.split(r"^(\S+):$", run_experiment(name, "--helpfull").stdout, flags=re.MULTILINE)
    ours = set()
    for module, section in zip(sections[1::2], sections[2::2], strict=True):
        if "experiments" in module:
            ours |= flags_in(section)
    assert ours <= flags_in(short.stdout), sorted(ours - flags_in(short.stdout))


@pytest.mark.parametrize("name", tree.experiment_modules())
def test_an_unknown_flag_is_refused(name):
    result = run_experiment(name, "--no_such_flag=1")
    assert result.returncode != 0
    assert "no_such_flag" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", tree.experiment_modules())
def test_the_docstring_is_a_command_line(name):
    path = tree.ROOT / tree.EXPERIMENTS / f"{name}.py"
    docstring = ast.get_docstring(tree.syntax(path)) or ""
    assert f"python -m experiments.{name}" in docstring, f"{tree.relative(path)}: show its command"
