"""A save that is killed at random instants leaves nothing that looks whole and is not."""

import pathlib

import pytest

from llama4_jax.checkpoint import FORMATS
from tests.checkpoint.tiny import TINY, MemorySource, assert_holds, write
from tests.killed import Killer


def work(folder):
    """Save a model in every layout in which it is not there yet."""
    for layout in FORMATS:
        if not (target := pathlib.Path(folder, layout)).exists():
            write(TINY, target, layout)


@pytest.mark.slow
def test_saves_killed_at_random_instants_end_with_the_same_values(tmp_path):
    source, done, round_ = MemorySource(TINY), 0, 0
    with Killer("tests.checkpoint.kill_test") as killer:
        seconds = killer.finish(tmp_path / "whole")
        while done < 30:
            folder = tmp_path / str(round_)
            was_killed = killer.kill(folder, within=seconds)
            done += was_killed
            round_ += not was_killed
            for layout in FORMATS:
                if (folder / layout).exists():
                    assert_holds(folder / layout, source)
        killer.finish(folder)
    names = {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}
    assert names == {*FORMATS}
    for layout in FORMATS:
        assert_holds(folder / layout, source)
