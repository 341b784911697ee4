"""Files stay short, folders say what they hold, and the forward pass stays readable."""

import re

from tests.house import tree

MAX_LIBRARY_LINES = 400
MAX_EXPERIMENT_LINES = 120
MAX_FORWARD_FILES = 11
MAX_FORWARD_LINES = 1750
FORBIDDEN_STEMS = {"utils", "util", "common", "helpers", "helper", "misc", "scripts", "tools"}
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")


def reading_path() -> tuple[list[str], set[str]]:
    """Return the files of one forward pass in reading order, and those named as beside it."""
    lines = (tree.ROOT / "tests/house/forward_pass.txt").read_text("utf-8").splitlines()
    entries = [line for line in lines if line and not line.startswith("#")]
    beside = {line.removeprefix("beside ").partition(":")[0] for line in entries if ":" in line}
    return [line for line in entries if ":" not in line], beside


def imported_files(name: str) -> set[str]:
    """Return the modules of ours that the file `name` imports, packages left out."""
    found = set()
    for imported in tree.imported_modules(tree.ROOT / name):
        for module in (imported, imported.rpartition(".")[0]):
            file = module.replace(".", "/") + ".py"
            is_ours = file.startswith((f"{tree.LIBRARY}/", f"{tree.KERNELS}/"))
            if is_ours and (tree.ROOT / file).exists():
                found.add(file)
    return found


def test_files_of_the_library_stay_under_400_lines():
    for path in tree.python_files(tree.LIBRARY, tree.EXPERIMENTS):
        lines = tree.count_lines(path)
        assert lines < MAX_LIBRARY_LINES, f"{tree.relative(path)} has {lines} lines; divide it"


def test_experiments_stay_under_120_lines():
    for path in tree.experiment_files().values():
        lines = tree.count_lines(path)
        assert lines < MAX_EXPERIMENT_LINES, f"{tree.relative(path)} has {lines} lines"


def test_a_forward_pass_is_read_in_11_files_and_1750_lines():
    path, _ = reading_path()
    lines = sum(tree.count_lines(tree.ROOT / name) for name in path)
    assert len(path) <= MAX_FORWARD_FILES
    assert lines <= MAX_FORWARD_LINES, f"{lines} lines"


def test_the_reading_path_leaves_out_nothing_that_a_forward_pass_imports():
    path, beside = reading_path()
    by_name = [name for name in path if name.endswith("/reference.py")]  # by backend.choose
    reached, waiting = set(), [path[0], *by_name]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting.extend(imported_files(name))
    # A kernel does what its reference does.
    of_one_device = re.compile(r"/(tpu|gpu)(_\w+)?(\.py$|/)")
    assert {name for name in reached if not of_one_device.search(name)} == {*path, *beside}


def test_readme_quotes_the_reading_path():
    path, _ = reading_path()
    section = (tree.ROOT / "README.md").read_text("utf-8").partition("## Reading a forward pass")[2]
    places = [section.find(f"`{name}`") for name in path]
    assert -1 not in places, f"README.md does not quote {path[places.index(-1)]}"
    assert places == sorted(places), "README.md quotes the path in another order"


def test_no_file_or_folder_has_a_name_that_says_nothing():
    for path in tree.python_files(*tree.SOURCE_FOLDERS, "tests"):
        for part in path.relative_to(tree.ROOT).with_suffix("").parts:
            assert part not in FORBIDDEN_STEMS, f"{tree.relative(path)}: name it after its subject"


def test_every_source_file_says_its_purpose_in_its_first_line():
    for path in tree.python_files(*tree.SOURCE_FOLDERS):
        first = path.read_text("utf-8").partition("\n")[0]
        assert first.startswith(('"""', 'r"""')), tree.relative(path)


def test_nothing_is_left_for_later():
    for path in tree.text_files():
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            assert not UNFINISHED.search(line), f"{tree.relative(path)}:{number} {line.strip()}"
