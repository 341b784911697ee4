"""The tree as the house tests see it: its folders, its files and their syntax."""

import ast
import functools
import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]

LIBRARY = "llama4_jax"
KERNELS = "kernels_pallas"
EXPERIMENTS = "experiments"
SOURCE_FOLDERS = (LIBRARY, KERNELS, EXPERIMENTS)
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".cfg", ".ini", ".sh"}
TEXT_NAMES = {"Makefile", "run", ".gitignore"}


def python_files(*folders: str) -> list[pathlib.Path]:
    """Return every Python file below `folders` (relative to the root), sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def text_files() -> list[pathlib.Path]:
    """Return the files that people write: those at the root and those below the known folders."""
    candidates = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in (*SOURCE_FOLDERS, "tests", ".ci"):
        candidates.extend(path for path in (ROOT / folder).rglob("*") if path.is_file())
    return sorted(p for p in candidates if p.suffix in TEXT_SUFFIXES or p.name in TEXT_NAMES)


def relative(path: pathlib.Path) -> str:
    """Return `path` as it is written in the documents, from the root and with forward slashes."""
    return path.relative_to(ROOT).as_posix()


def count_lines(path: pathlib.Path) -> int:
    """Return the number of lines of the file at `path`."""
    return len(path.read_text(encoding="utf-8").splitlines())


@functools.cache
def syntax(path: pathlib.Path) -> ast.Module:
    """Return the syntax tree of the Python file at `path`."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=relative(path))


def imported_modules(path: pathlib.Path) -> set[str]:
    """Return the dotted names that the file at `path` imports, `from a import b` as `a.b`."""
    names = set()
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def mentioned_names(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every name, attribute and import in the file at `path`."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Name | ast.Attribute):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, alias.name


def experiment_files() -> dict[str, pathlib.Path]:
    """Return the experiments that are programs by name: `x.py` or `x/__main__.py` with a guard."""
    folder = ROOT / EXPERIMENTS
    files = {path.stem: path for path in folder.glob("[!_]*.py")}
    files |= {path.parent.name: path for path in folder.glob("*/__main__.py")}
    guard = '__name__ == "__main__"'
    return {name: path for name, path in sorted(files.items()) if guard in path.read_text("utf-8")}


def make_targets() -> set[str]:
    """Return the targets of the Makefile that a person may ask for."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
