"""Training that is killed at random instants, most of them while it saves, changes nothing."""

import hashlib
import json
import pathlib
import shutil

import numpy as np
import pytest

from llama4_jax.train.loop import fit
from llama4_jax.train.state import name_leaves
from tests.killed import Killer
from tests.train.toy import build, make_dataset, make_run


def work(folder):
    """Train in a folder, a checkpoint at every step, and leave a digest of the result."""
    run, workdir = make_run(steps=6, checkpoint_interval=1), pathlib.Path(folder)
    state = fit(run, build=build, batches=make_dataset(), workdir=workdir).state
    leaves = {name: np.asarray(leaf) for name, leaf in name_leaves(state).items()}
    digest = hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves.values()))
    (workdir / "digest").write_text(digest.hexdigest())


def result_of(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    losses = [(r["step"], r["train/loss"]) for r in map(json.loads, lines) if "train/loss" in r]
    return losses, (workdir / "digest").read_text()


@pytest.mark.slow
def test_a_training_killed_at_random_instants_ends_with_the_same_bits(tmp_path):
    with Killer("tests.train.kill_test") as killer:
        killer.finish(tmp_path / "whole")
        seconds = killer.finish(tmp_path / "again")  # with programs that are compiled
        whole, done = result_of(tmp_path / "whole"), 0
        assert [step for step, _ in whole[0]] == list(range(1, 7))
        while done < 30:
            was_killed = killer.kill(tmp_path / "cut", within=seconds)
            done += was_killed
            if not was_killed or done == 30:
                killer.finish(tmp_path / "cut")
                assert result_of(tmp_path / "cut") == whole
                shutil.rmtree(tmp_path / "cut")
