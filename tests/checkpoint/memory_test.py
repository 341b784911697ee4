"""Converting takes memory for a few blocks and not for the checkpoint, in a process of its own."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from llama4_jax.checkpoint.convert import make_plan
from llama4_jax.checkpoint.layout import layout_tensors
from llama4_jax.checkpoint.parameters import np_dtype, parameters
from llama4_jax.checkpoint.writer import write_checkpoint
from tests.checkpoint.tiny import TINY

ROOT = pathlib.Path(__file__).parents[2]
MIB, GIB = 1 << 20, 1 << 30

CONVERT = """
    import json, pathlib, sys
    from llama4_jax.checkpoint import convert

    def status(key):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))

    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
    print(json.dumps({"before": before, "peak": status("VmHWM")}))
"""


class Pattern:
    """A model of any size that takes no memory: every slice is zeros, ones, twos by its start."""

    def __init__(self, config):
        self.config = config

    def dtype(self, name):
        return np_dtype("bfloat16")

    def read(self, name, index):
        shape = [part.stop - part.start for part in index]
        return np.full(shape, index[0].start % 7, np_dtype("bfloat16"))


def _config(num_layers, embed_dim, expert_dim, num_experts):
    text = dataclasses.replace(
        TINY.text,
        num_layers=num_layers,
        embed_dim=embed_dim,
        expert_dim=expert_dim,
        num_experts=num_experts,
        moe_layers=tuple(range(num_layers)),
        nope_layers=tuple(range(3, num_layers, 4)),
    )
    return dataclasses.replace(TINY, text=text)


def _measure(source, target, to):
    """Convert in a fresh process and return its resident bytes before, and its peak."""
    command = [sys.executable, "-c", textwrap.dedent(CONVERT), source, target, to]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def _sizes(config):
    """Return the bytes of the largest stored tensor and of all of them."""
    sizes = [2 * s.size for s in layout_tensors(config, "hf").values()]
    assert sum(sizes) == 2 * sum(p.size for p in parameters(config).values())
    return max(sizes), sum(sizes)


LINUX = pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc"
)
ROUND = (("hf", "meta"), ("meta", "orbax"), ("orbax", "again"))


def _around(folder, config):
    """Write a checkpoint and yield the memory of converting it to every layout and back."""
    write_checkpoint(make_plan(Pattern(config), "hf"), folder / "hf", files={})
    for start, end in ROUND:
        yield _measure(folder / start, folder / end, "hf" if end == "again" else end)
        shutil.rmtree(folder / start)


@LINUX
def test_memory_does_not_follow_the_size_of_the_checkpoint(tmp_path):
    config = _config(num_layers=12, embed_dim=512, expert_dim=512, num_experts=12)
    largest, total = _sizes(config)
    limit = 3 * largest + 100 * MIB
    assert limit < 0.6 * total
    for used in _around(tmp_path, config):
        assert used["peak"] - used["before"] < limit, used


@LINUX
@pytest.mark.slow
def test_peak_memory_stays_under_three_times_the_largest_tensor_plus_a_constant(tmp_path):
    config = _config(num_layers=8, embed_dim=2048, expert_dim=2048, num_experts=16)
    largest, total = _sizes(config)
    assert total > 3 * GIB
    for used in _around(tmp_path, config):
        assert used["peak"] < 3 * largest + 1.5 * GIB < total, used
