"""Passes are compiled, and bounds, peers and false estimates are judged."""

import dataclasses
import math

import jax
import pytest

from experiments.benchmark import cases, compile_kernels, expert_work, schedule
from experiments.benchmark.cases import Bound, Case, Floor
from experiments.benchmark.topologies import TARGETS
from kernels_pallas.shapes import Experts
from tests.experiments.benchmark.sound import changed

SMALL = Experts(name="small", T=40, X=2, D=128, F=256, E=3, has_shared=True, dtype="float32")
FLOOR = Floor(flops=256, bytes=2048)


@dataclasses.dataclass(frozen=True)
class _Cpu:
    name: str = "here"
    memory: int = 1 << 30

    def devices(self, count):
        return jax.devices()[:count]


def doubling(**known):
    """An operation of one array."""
    case = Case(
        operation="doubling", shape="line", sizes={}, function=lambda *, x, backend: 2 * x,
        build=lambda key: {"x": jax.random.normal(key, (256,))},
        floors={"forward": FLOOR, "backward": FLOOR}, wrt=("x",),
    )  # fmt: skip
    return dataclasses.replace(case, **known)


def test_a_pass_is_compiled_and_what_does_not_fit_is_skipped():
    forward, backward = compile_kernels.compile_case(doubling(), _Cpu())
    assert forward["figures"]["arguments"] == 1024 and not forward["faults"]
    line = compile_kernels.TABLE.line(forward)
    assert line.startswith("here") and "doubling" in line and "nan" not in line
    (big, _) = compile_kernels.compile_case(doubling(), _Cpu(memory=1000))
    assert "do not fit" in big["skipped"] and "do not fit" in compile_kernels.TABLE.line(big)


def test_a_shape_that_must_do_may_not_be_refused():
    def narrow(*, x, backend):
        if backend != "reference":
            raise NotImplementedError("too wide")
        return x

    case = doubling(function=narrow)
    (refused, _) = compile_kernels.compile_case(case, _Cpu())
    assert refused["refused"] == "too wide" and not refused["faults"]
    assert "reference" in compile_kernels.TABLE.line(refused)
    bounded = dataclasses.replace(case, bounds={"forward": Bound(flops=1.0, bytes=1.0)})
    failed, _ = compile_kernels.compile_case(bounded, _Cpu())
    assert failed["faults"] == ["does not compile: too wide"]
    assert compile_kernels.TABLE.line(failed).endswith("FAULT")


def figures(**known):
    said = {"flops": 256.0, "bytes": 2048.0, "declared": 2048.0}
    return changed(**{"arguments": 1024, "scratch": 0, "peak": 1024, **said, **known})


@pytest.mark.parametrize(
    ("known", "says"),
    [
        ({}, []),
        ({"flops": 300.0}, ["FLOPs by estimate are 1.172 times the floor"]),
        ({"declared": 1900.0}, ["says that it moves"]),
        ({"bytes": 2300.0}, ["bytes by estimate are 1.123 times"]),
        ({"scratch": 2 << 30}, ["needs 2.1 GB of the device's 1.1", "of scratch memory"]),
        ({"scratch": 1 << 20}, ["needs 0.00 GB of scratch memory"]),
    ],
)
def test_bounds_and_false_estimates_are_faults(known, says):
    case = doubling(bounds={"forward": Bound(flops=1.15, bytes=1.1, scratch=1 << 19)})
    work = schedule.Work(flops=256, bytes=2048, needed=2048, blocks="")
    found = list(compile_kernels.judge(case, "forward", _Cpu(), figures(**known), work))
    assert len(found) == len(says)
    for fault, part in zip(found, says, strict=True):
        assert part in fault


def test_rows_that_are_multiplied_have_bounds_of_their_own():
    case = cases.expert_case(SMALL)
    bound = Bound(flops=1.05, bytes=math.inf, chips={"v5p": {"multiplied": 1.2}})
    case = dataclasses.replace(case, bounds={"forward": bound})
    floor = case.floors["forward"].flops
    work = expert_work.Work(flops=int(1.1 * floor), bytes=1, needed=1, blocks="")
    found = figures(flops=floor, bytes=1, declared=1)
    for chip, faults in (("v5p", 0), ("v6e", 1)):
        said = list(compile_kernels.judge(case, "forward", TARGETS[chip], found, work))
        assert len(said) == faults


def record_of(target="v5p", shape="a", flops=100.0, moved=1000.0, peer=None):
    figures = {"flops": flops, "bytes": moved}
    return {
        "target": target, "shape": shape, "pass": "forward", "figures": figures,
        "work": {"bytes": 900.0}, "peers": {} if peer is None else {"other": peer}, "faults": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("peer", "says"),
    [
        (None, []),
        ({"bytes": 1600.0, "work": {"bytes": 1400.0}}, []),
        ({"bytes": 1400.0, "work": {"bytes": 1400.0}}, ["1.40 times our bytes by estimate"]),
        ({"bytes": 1600.0, "work": {"bytes": 900.0}}, ["1.00 times our bytes by schedule"]),
        ({"fails": "too wide"}, ["other, to compare with, fails: too wide"]),
    ],
)
def test_a_peer_that_moves_too_little_is_a_fault(peer, says):
    bound = Bound(flops=1.0, bytes=1.0, peers={"other": 1.5})
    found = list(compile_kernels.judge_peers(bound, record_of(peer=peer)))
    assert len(found) == len(says) and all(b in a for a, b in zip(found, says, strict=True))


@pytest.mark.parametrize(
    ("target", "flops", "says"),
    [
        ("v5p", 111.0, ["1.110 times the FLOPs of a, over 1.1"]),
        ("v5p", 109.0, []),
        ("v6e", 9e9, []),  # nothing to compare with
    ],
)
def test_a_shape_that_multiplies_more_than_another_is_a_fault(target, flops, says):
    bound = Bound(flops=2, bytes=2, beside=("a", 1.1))
    seen = [{"target": "v6e", "shape": "a", "pass": "forward"}, record_of(), record_of("v5e")]
    record = record_of(target, "b", flops)
    found = list(compile_kernels.judge_beside(bound, record, seen))
    assert len(found) == len(says) and all(b in a for a, b in zip(found, says, strict=True))


def test_records_follow_each_other_and_are_judged_beside_those_before(monkeypatch):
    compiled = {"a": record_of(), "b": record_of(shape="b", flops=111.0)}
    monkeypatch.setattr(
        compile_kernels, "compile_case", lambda case, *_: iter([compiled[case.shape]])
    )
    bounds = {"forward": Bound(flops=2, bytes=2, beside=("a", 1.1))}
    chosen = [doubling(shape="a"), doubling(shape="b", bounds=bounds)]
    first, second = compile_kernels.records(chosen, [TARGETS["v5p"]])
    assert not first["faults"] and "1.110 times" in second["faults"][0]
