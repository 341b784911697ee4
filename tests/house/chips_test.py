"""Facts of chips stand in one file; every other asks it."""

import ast
import dataclasses
import re

from kernels_pallas import chips
from tests.house import tree

HOME = f"{tree.KERNELS}/chips.py"
LARGE = 10**9  # numbers from here on are told apart; smaller ones also count other things
KINDS = {kind for chip in chips.CHIPS.values() for kind in chip.kinds}
A_KIND = re.compile(r"(TPU ?v?\d\w*( lite)?|NVIDIA \w+.*|[ABH]\d00|H20|GH200)")
A_SIZE = re.compile(r"\d+ [KMG]i?B (of (VMEM|SMEM|HBM|shared memory)|on (v\d|TPU))")


def numbers_of_chips():
    """Return every large figure of the table, and the counts of multiprocessors."""
    facts = [value for chip in chips.CHIPS.values() for value in dataclasses.astuple(chip)]
    large = {fact for fact in facts if isinstance(fact, int | float) and fact >= LARGE}
    return large | {chip.multiprocessors for chip in chips.CHIPS.values() if chip.multiprocessors}


def constants(path):
    """Yield the line and the value of every number and string in a file, docstrings included."""
    for node in ast.walk(tree.syntax(path)):
        if isinstance(node, ast.Constant) and not isinstance(node.value, bool):
            yield node.lineno, node.value


def elsewhere():
    return [path for path in tree.python_files(*tree.SOURCE_FOLDERS) if tree.relative(path) != HOME]


def test_kinds_of_devices_are_named_in_one_file():
    assert all(A_KIND.fullmatch(kind) for kind in KINDS)
    for path in elsewhere():
        for line, value in constants(path):
            is_kind = isinstance(value, str) and A_KIND.fullmatch(value)
            assert not is_kind, f"{tree.relative(path)}:{line} names {value!r}; ask {HOME}"


def test_figures_of_chips_stand_in_one_file():
    known = numbers_of_chips()
    assert {132, 989e12, 459e12} <= known
    for path in elsewhere():
        for line, value in constants(path):
            is_fact = isinstance(value, int | float) and value in known
            assert not is_fact, f"{tree.relative(path)}:{line} states {value}; ask {HOME}"


def test_sizes_of_memories_on_chips_stand_in_one_file():
    for path in elsewhere():
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            assert not A_SIZE.search(line), f"{tree.relative(path)}:{number} {line.strip()}"
