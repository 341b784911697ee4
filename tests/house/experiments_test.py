"""Every entry point explains itself and refuses a flag it does not know."""

import ast
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from tests.house import tree


def run_experiment(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one experiment from the root, as a person would."""
    command = [sys.executable, "-X", "importtime", "-m", f"experiments.{name}", *arguments]
    return subprocess.run(command, cwd=tree.ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", tree.experiment_files())
def test_short_help_shows_every_flag_of_ours(name):
    """A key flag is one that `--helpshort` shows; every flag that experiments/ defines is one."""
    result = run_experiment(name, "--helpxml")
    assert result.stdout.startswith("<?xml"), result.stderr
    document = ElementTree.fromstring(result.stdout)
    ours = [flag for flag in document.iter("flag") if "experiments" in flag.findtext("file", "")]
    hidden = [flag.findtext("name") for flag in ours if flag.findtext("key") != "yes"]
    unexplained = [flag.findtext("name") for flag in ours if not flag.findtext("meaning")]
    assert not hidden, f"not in the short help: {hidden}"
    assert not unexplained, f"without a meaning: {unexplained}"
    imported = re.findall(r"\|\s+(\S+)$", result.stderr, re.MULTILINE)
    assert "absl.flags" in imported and "jax" not in imported, "help waits for an import of jax"


@pytest.mark.parametrize("name", tree.experiment_files())
def test_an_unknown_flag_is_refused_in_a_line_not_a_traceback(name):
    result = run_experiment(name, "--no_such_flag=1")
    assert result.returncode != 0
    assert "no_such_flag" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", tree.experiment_files())
def test_the_docstring_is_a_command_line(name):
    path = tree.experiment_files()[name]
    docstring = ast.get_docstring(tree.syntax(path)) or ""
    assert f"python -m experiments.{name}" in docstring, f"{tree.relative(path)}: show its command"
