"""What the documents name exists, and the list of packages exists once."""

import math
import re
import sys
import tomllib

import pytest

import kernels_pallas
import llama4_jax
from llama4_jax import scout
from llama4_jax.cost import serving_memory
from tests.house import tree

MAIN_DOCUMENTS = ("README.md", "BUILD.md")
DOCUMENTS = (
    *MAIN_DOCUMENTS,
    "PROOF.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "kernels_pallas/README.md",
    "llama4_jax/nano/README.md",
    "llama4_jax/server/README.md",
)
PROJECT = tomllib.loads((tree.ROOT / "pyproject.toml").read_text("utf-8"))
# Distribution names that differ from the module they bring.
MODULE_OF = {"orbax-checkpoint": "orbax", "absl-py": "absl", "pillow": "PIL"}
# jax itself depends on these and hands them on.
BROUGHT_BY_JAX = {"jaxlib", "ml_dtypes", "scipy"}


def read(name: str) -> str:
    """Return the text of one document."""
    return (tree.ROOT / name).read_text("utf-8")


def requirement_names(lines: list[str]) -> set[str]:
    """Return the distribution names of requirement lines, without extras and bounds."""
    return {re.match(r"[\w.-]+", line)[0] for line in lines if line and not line.startswith("#")}


def python_blocks(name: str) -> list[str]:
    """Return the Python programs of one document, in order."""
    return re.findall(r"```python\n(.*?)```", read(name), re.DOTALL)


def test_the_quick_start_is_short():
    assert len(python_blocks("README.md")[0].splitlines()) <= 6


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if python_blocks(name)])
def test_every_python_block_runs_after_those_above_it(document, monkeypatch):
    monkeypatch.chdir(tree.ROOT)
    names = {}
    for program in python_blocks(document):
        exec(compile(program, document, "exec"), names)


def test_the_memory_that_the_readme_states_is_what_the_library_counts():
    rows = re.findall(
        r"^\| (\d+) \| `(\S+)` \| ([\d.]+) \| (.+) \|$", read("README.md"), re.MULTILINE
    )
    assert len(rows) >= 4
    for devices, mesh, weights, totals in rows:
        axes = {axis: int(size) for axis, size in (pair.split(":") for pair in mesh.split(","))}
        assert math.prod(axes.values()) == int(devices)
        memories = [
            serving_memory(
                scout(),
                rows=1,
                length=length,
                shards=axes["tensor"],
                context=axes.get("context", 1),
            )
            for length in (2**13, 2**17, 2**20, 10 * 2**20)
        ]
        assert weights == f"{memories[0].weights / 1e9:.1f}"
        assert totals.split(" | ") == [f"{memory.total / 1e9:.1f}" for memory in memories]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_experiment_named_exists(document):
    for name in re.findall(r"python -m experiments\.(\w+)", read(document)):
        assert name in tree.experiment_files(), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_target_named_exists(document):
    text = read(document)
    named = {*re.findall(r"`make ([a-z-]+)", text), *re.findall(r"(?m)^make ([a-z-]+) +#", text)}
    assert named <= tree.make_targets(), sorted(named - tree.make_targets())


def test_every_make_target_is_explained_in_build_md():
    named = set(re.findall(r"`make ([a-z-]+)`", read("BUILD.md")))
    assert tree.make_targets() <= named, sorted(tree.make_targets() - named)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_named_exists(document):
    text = read(document)
    folders = "|".join((*tree.SOURCE_FOLDERS, "tests", r"\.ci"))
    quoted = re.findall(rf"`((?:{folders})/[\w./-]*)`", text)
    linked = re.findall(r"\]\((?!http|#)([^)#]+)\)", text)
    for name in quoted + linked:
        beside = (tree.ROOT / document).parent / name
        assert beside.exists() or (tree.ROOT / name).exists(), f"{document} names {name}"


@pytest.mark.parametrize("document", MAIN_DOCUMENTS)
def test_every_flag_shown_is_defined_somewhere(document):
    sources = [path.read_text("utf-8") for path in tree.python_files(tree.EXPERIMENTS, "tests")]
    for line in re.findall(r"python -m experiments\.\w+(.*(?:\\\n.*)*)", read(document)):
        for flag in re.findall(r"--(\w+)", line):
            known = any(f'"{flag}"' in source for source in sources) or flag == "helpshort"
            assert known, f"{document} shows --{flag}"


def test_the_list_of_packages_exists_once():
    assert "dependencies" in PROJECT["project"]["dynamic"]
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["requirements_txt"]
    assert hook == {"files": ["requirements.txt"]}


def test_every_package_has_a_lower_and_an_upper_bound():
    for line in read("requirements.txt").splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", line), line


def test_what_the_sources_import_is_what_the_list_names():
    names = requirement_names(read("requirements.txt").splitlines())
    listed = {MODULE_OF.get(name, name.replace("-", "_")) for name in names}
    extras = PROJECT["project"]["optional-dependencies"]
    optional = {
        MODULE_OF.get(name, name.replace("-", "_"))
        for name in requirement_names([*extras["grammar"], *extras["serve"]])
    }
    known = listed | optional | BROUGHT_BY_JAX
    known |= {*sys.stdlib_module_names, *tree.SOURCE_FOLDERS}
    unused = set(listed)
    for path in tree.python_files(*tree.SOURCE_FOLDERS):
        roots = {name.split(".")[0] for name in tree.imported_modules(path)}
        assert roots <= known, f"{tree.relative(path)} imports {sorted(roots - known)}"
        unused -= roots
    assert not unused, f"nothing imports {sorted(unused)}"


def test_the_version_is_the_newest_in_the_changelog_or_unreleased():
    headings = re.findall(r"^## \[(.+?)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] in {"Unreleased", llama4_jax.__version__}
    assert kernels_pallas.__version__ == llama4_jax.__version__


def test_the_makefile_offers_the_two_commands_of_the_readme():
    assert {"demo", "test"} <= tree.make_targets()
    assert "exec make test" in (tree.ROOT / ".ci/run").read_text("utf-8")
