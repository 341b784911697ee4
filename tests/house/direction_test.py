"""Imports point one way, and nothing at run time needs what only the tests have."""

import subprocess
import sys
import tomllib

import pytest

from tests.house import tree

CONTRACT = tomllib.loads((tree.ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]

# What belongs to the reference implementations or to the tests alone.
NOT_AT_RUN_TIME = {"torch", "torchvision", "transformers", "llama_models"}


def test_a_file_imports_only_from_lines_below_its_own():
    command = "from importlinter.cli import lint_imports_command as run; run()"
    result = subprocess.run(
        [sys.executable, "-c", command, "--no-logo", "--no-cache"],
        cwd=tree.ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_package_and_module_of_the_library_has_its_line_in_the_contract():
    (contract,) = CONTRACT["contracts"]
    named = " ".join(contract["layers"]).replace("(", " ").replace(")", " ").split()
    library = tree.ROOT / tree.LIBRARY
    packages = {f"{tree.LIBRARY}.{path.parent.name}" for path in library.glob("*/*.py")}
    modules = {f"{tree.LIBRARY}.{path.stem}" for path in library.glob("*.py")}
    found = packages | modules - {f"{tree.LIBRARY}.__init__"}
    assert found <= set(named), f"not in the contract: {sorted(found - set(named))}"


@pytest.mark.parametrize("folder", [tree.LIBRARY, tree.KERNELS])
def test_the_library_needs_no_other_framework(folder):
    for path in tree.python_files(folder):
        found = {name.split(".")[0] for name in tree.imported_modules(path)} & NOT_AT_RUN_TIME
        assert not found, f"{tree.relative(path)} imports {sorted(found)}"


def test_kernels_know_nothing_of_the_library():
    for path in tree.python_files(tree.KERNELS):
        roots = {name.split(".")[0] for name in tree.imported_modules(path)}
        assert not roots & {tree.LIBRARY, tree.EXPERIMENTS}, tree.relative(path)
