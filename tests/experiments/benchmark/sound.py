"""Figures of a program that has no faults, for tests to change."""

import dataclasses

from experiments.benchmark.figures import GB, Figures

SOUND = Figures(
    arguments=60 * GB,
    scratch=GB // 10,
    peak=60 * GB + GB // 10,
    flops=17e9,
    bytes=3e9,
    moved=58e9,
    copied=(),
    declared=2e9,
    vmem=1,
    smem=1,
    strayed=(),
    collectives={"all-reduce": 9},
    in_group=8,
    instructions=1000,
    seconds=20.0,
)


def changed(**known):
    """Sound figures but for these."""
    return dataclasses.replace(SOUND, **known)
