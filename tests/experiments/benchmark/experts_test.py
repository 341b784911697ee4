"""Benchmarks of experts: what is counted of their schedules, their peers, and their bounds."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from experiments.benchmark import cases, compile_kernels, expert_peers, expert_work, timing
from experiments.benchmark.cases import Bound
from experiments.benchmark.timing import Machine
from experiments.benchmark.topologies import TARGETS
from kernels_pallas import interpreted, tuning
from kernels_pallas.experts.tpu_rows import Cut
from kernels_pallas.shapes import SHAPES, Experts

HERE = Machine(kind="cpu", platform="cpu", chip=None, copying=1e9)
SMALL = Experts(name="small", T=40, X=2, D=128, F=256, E=3, has_shared=True, dtype="float32")
USED = {"expert_mlp.forward": {}}


@pytest.fixture(autouse=True)
def once(monkeypatch):
    monkeypatch.setattr(timing, "REPEATS", 1)


@pytest.fixture
def cut(monkeypatch):
    """Sizes that every kernel takes."""
    sizes = Cut(window=32, chunk=16, tile=128, unit=8, cores=2)
    monkeypatch.setattr(expert_work.tpu_sizes, "row_cut", lambda *_: sizes)
    monkeypatch.setattr(expert_work.tpu_sizes, "outer_cut", lambda *_: sizes)


def sized(monkeypatch, sizes, **known):
    """A shape whose experts have so many rows."""
    monkeypatch.setattr(Experts, "sizes", lambda _: np.array(sizes))
    known = {"T": sum(sizes), "D": 128, "F": 256, "E": len(sizes), "dtype": "float32", **known}
    return Experts(name="sized", **known)


def test_rows_are_multiplied_in_whole_chunks_and_matrices_read_for_each_window(cut, monkeypatch):
    shape = sized(monkeypatch, [0, 1, 17, 40])
    work = expert_work.expert_work(shape, "forward", "tpu", USED)
    # In tiles of 8 rows: 8, 24 and 40 rows; in windows of 32 and chunks of 16: 16, 32, 32 + 16.
    assert work.flops == 6 * 128 * 256 * (16 + 32 + 48)
    matrix, rows = 128 * 256 * 4, 8 + 24 + 40
    up = 2 * matrix * 4 + rows * (2 * (128 * 4 + 512) + 256 * 4)
    down = matrix * 4 + rows * (2 * 256 * 4 + 128 * 4)
    assert work.bytes - work.around == up + down
    assert work.needed == shape.bytes() and work.blocks == "32x128/16"


def test_gradients_of_matrices_are_counted(cut, monkeypatch):
    shape = sized(monkeypatch, [0, 16, 48])
    found = {"expert_mlp.backward_hidden": {}}
    work = expert_work.expert_work(shape, "backward", "tpu", found)
    assert work.flops == 12 * 128 * 256 * 64
    matrix = 128 * 256 * 4
    over_rows = 3 * (3 * matrix) + 64 * (2 * (128 * 4 + 512) + 5 * 256 * 4)
    over_rows += 64 * (2 * 256 * 4 + 128 * 4) + 64 * (2 * 256 * 4 + 2 * 128 * 4)
    # 256 columns are one step of each core, so blocks of the large expert are read once, too.
    outer = 2 * 64 * 128 * 4 + 64 * 256 * 4 + 3 * matrix
    assert work.bytes - work.around == over_rows + 3 * outer


def test_widths_are_filled_up_to_whole_lanes_on_tpus(cut, monkeypatch):
    narrow = sized(monkeypatch, [8, 16], F=160)
    narrow_work, work = (
        expert_work.expert_work(shape, "forward", "tpu", USED)
        for shape in (narrow, dataclasses.replace(narrow, F=256))
    )
    assert narrow_work.flops == work.flops and narrow_work.needed == narrow.bytes()
    assert narrow_work.bytes == work.bytes + 2 * 2 * narrow.matrices_bytes()


def test_on_gpus_blocks_in_turn_share_what_they_copy(monkeypatch):
    shape = sized(monkeypatch, [0, 1, 128 * 17], dtype="bfloat16")
    work = expert_work.expert_work(shape, "forward", "gpu", {"expert_mlp.up": {}})
    assert work.flops == 6 * 128 * 256 * (64 + 128 * 17)
    rows = 1 + 128 * 17
    copied = 3 * shape.matrices_bytes() + rows * 2 * (2 * 128 + 2 * 256)
    assert work.bytes - work.around == copied


def test_what_looks_nothing_up_is_not_counted():
    assert expert_work.expert_work(SMALL, "forward", "tpu", {}) is None


def test_tiles_of_megablox_are_visited_for_each_expert_in_them(monkeypatch):
    monkeypatch.setattr(expert_work, "MEGABLOX_TILES", (16, 64, 128))
    shape = sized(monkeypatch, [0, 20, 12])
    work = expert_work.megablox_work(shape, "forward")
    # Rows 0..15 belong to one expert, 16..31 to two: three visits.
    assert work.flops == 6 * 3 * 16 * 128 * 256
    up = 4 * (2 * 3 * 16 * 128 + 3 * 128 * 256 + 32 * 256)
    down = 4 * (1 * 3 * 16 * 256 + 3 * 128 * 256 + 32 * 128)
    between = 4 * (2 * 32 * 128 + 3 * 32 * 256 + 3 * 32 * 128)
    assert work.bytes == 2 * up + down + between
    assert expert_work.megablox_work(shape, "backward") is None


@pytest.mark.parametrize("name", ["scout_experts_8k", "maverick_experts_8k"])
def test_windows_of_thousand_rows_read_most_matrices_once(name):
    shape = SHAPES[name]
    hit = (shape.sizes() > 0).sum()
    with tuning.recorded() as found:
        work = expert_work.tpu_work(shape, "forward")
    assert found and shape.sizes().max() <= 1024
    own = work.bytes - work.around
    assert hit * shape.matrices_bytes() < own < 1.25 * shape.bytes()


@pytest.mark.parametrize(("chip", "multiplier"), [("v5p", 128), ("tpu7x", 256), ("h100", None)])
@pytest.mark.parametrize("name", ["scout_experts_8k", "maverick_experts_8k"])
def test_bounds_of_what_is_multiplied_leave_no_room_for_wider_chunks(
    name, chip, multiplier, monkeypatch
):
    shape = SHAPES[name]
    most = cases.expert_case(shape).bounds["forward"].on(chip).multiplied
    if multiplier is None:
        work = expert_work.gpu_work(shape, "forward")
    else:
        monkeypatch.setattr(expert_work.tpu_sizes.backend, "multiplier", lambda: multiplier)
        work = expert_work.tpu_work(shape, "forward")
    assert 0.9 * most < work.flops / shape.flops() <= most


def test_peers_compute_the_same_or_as_many_flops():
    forward, backward = timing.measure(cases.expert_case(SMALL), HERE, None)
    for record in (forward, backward):
        assert not record["faults"] and not record["peers_not_run"]
        assert record["relative_error"] < 1e-5  # float32, another order of sums
        assert set(record["peers"]) == {"ragged_dot"}
    many = dataclasses.replace(SMALL, T=128)
    names = {peer.name for peer in expert_peers.of_experts(many)}
    assert names == {"megablox", "ragged_dot", "dense"}
    (dense,) = (p for p in expert_peers.of_experts(many) if p.name == "dense")
    arrays = jax.eval_shape(dense.arrays, jax.eval_shape(many.build, jax.random.key(0)))
    cost = jax.jit(lambda a: dense.function(**a)).lower(arrays).compile().cost_analysis()
    assert cost["flops"] == pytest.approx(many.flops(), rel=0.02)


def test_stored_matrices_and_rows_of_nobody_have_no_peers():
    for known in ({"stored": "int8"}, {"padding": 3}):
        assert not expert_peers.of_experts(dataclasses.replace(SMALL, **known))


def test_megablox_gives_what_the_reference_gives(monkeypatch):
    shape = dataclasses.replace(SMALL, has_shared=False)
    arrays = shape.build(jax.random.key(0))
    (peer,) = (p for p in expert_peers.of_experts(shape) if p.name == "megablox")
    gmm = expert_peers.megablox.gmm

    def simulated(x, w, sizes, dtype, tiles):
        return gmm(x, w, sizes, dtype, (min(tiles[0], 16), 128, 128), interpret=True)

    monkeypatch.setattr(expert_peers.megablox, "gmm", simulated)
    case = cases.expert_case(shape)
    wanted = case.function(**arrays, backend="reference")
    np.testing.assert_allclose(peer.function(**arrays), wanted, atol=1e-5)


def record_of(chip="v5p", shape="a", flops=100.0, moved=1000.0, peer=None):
    figures = {"flops": flops, "bytes": moved}
    return {
        "chip": chip, "shape": shape, "pass": "forward", "figures": figures,
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


def test_a_shape_that_multiplies_more_than_another_is_a_fault():
    case = cases.expert_case(SMALL)
    case = dataclasses.replace(
        case, shape="b", bounds={"forward": Bound(flops=2, bytes=2, beside=("a", 1.1))}
    )
    records = [
        record_of(), record_of(shape="b", flops=111.0), record_of(chip="v6e", shape="b", flops=9e9),
        record_of(chip="v5e"), record_of(chip="v5e", shape="b", flops=109.0),
    ]  # fmt: skip
    compile_kernels.judge_beside([case], records)
    assert [len(record["faults"]) for record in records] == [0, 1, 0, 0, 0]
    assert "1.110 times the FLOPs of a, over 1.1" in records[1]["faults"][0]


def test_rows_that_are_multiplied_have_bounds_of_their_own():
    case = cases.expert_case(SMALL)
    bound = Bound(flops=1.05, bytes=math.inf, chips={"v5p": {"multiplied": 1.2}})
    case = dataclasses.replace(case, bounds={"forward": bound})
    floor = case.floors["forward"].flops
    work = expert_work.Work(flops=int(1.1 * floor), bytes=1, needed=1, blocks="")
    found = compile_kernels.Figures(
        flops=floor, bytes=1, declared=1, arguments=0, temp=0, vmem=0, smem=0, seconds=0
    )
    for chip, faults in (("v5p", 0), ("v6e", 1)):
        target = TARGETS[chip]
        assert len(list(compile_kernels.judge(case, "forward", target, found, work))) == faults


def test_what_kernels_declare_is_added_up():
    def double(x, bytes_accessed):
        cost = pl.CostEstimate(flops=1, transcendentals=0, bytes_accessed=bytes_accessed)

        def kernel(x_ref, out_ref):
            out_ref[...] = 2 * x_ref[...]

        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, out_shape=out, cost_estimate=cost)(x)

    traced = jax.jit(lambda x: jax.jit(lambda x: double(x, 10))(x) + double(x, 5))
    assert compile_kernels.declared_bytes(traced.trace(jnp.ones(8)).jaxpr.jaxpr) == 15
    assert compile_kernels.declared_bytes(jax.make_jaxpr(jnp.sin)(1.0).jaxpr) is None


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_candidates_are_the_sizes_that_kernels_look_up(platform, direction):
    shape = Experts(name="small", T=40, D=128, F=256, E=3)
    case = cases.expert_case(shape)

    def function(**arrays):
        return case.function(**arrays, backend=platform)

    way = cases.one_pass(function, case.wrt, direction)
    arrays = jax.eval_shape(case.build, jax.random.key(0))
    with interpreted(), tuning.recorded() as found:
        jax.eval_shape(lambda arrays: way.run(*way.prepare(arrays)), arrays)
    for candidate in case.candidates(direction, platform):
        for name, sizes in candidate.items():
            assert set(sizes) <= set(found[name]["blocks"]), name
