"""Benchmarks of experts: what is counted of their schedules, their peers, and their bounds."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.benchmark import cases, expert_peers, expert_work, timing
from experiments.benchmark.timing import Machine
from kernels_pallas import interpreted, tuning
from kernels_pallas.experts.tpu_blocks import BlockSizes
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
    sizes = BlockSizes(block=32, chunk=16, tile=128, unit=8, cores=2)
    monkeypatch.setattr(expert_work.tpu_rows, "row_sizes", lambda *_: sizes)
    monkeypatch.setattr(expert_work.tpu_outer, "outer_sizes", lambda *_: sizes)


def sized(monkeypatch, sizes, **known):
    """A shape whose experts have so many rows."""
    monkeypatch.setattr(Experts, "sizes", lambda _: np.array(sizes))
    known = {"T": sum(sizes), "D": 128, "F": 256, "E": len(sizes), "dtype": "float32", **known}
    return Experts(name="sized", **known)


def test_rows_are_multiplied_in_whole_chunks_and_matrices_read_for_each_block(cut, monkeypatch):
    shape = sized(monkeypatch, [0, 1, 17, 40])
    work = expert_work.expert_work(shape, "forward", "tpu", USED)
    # In tiles of 8 rows: 8, 24 and 40 rows; in blocks of 32 and chunks of 16: 16, 32, 32 + 16.
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
def test_blocks_of_thousand_rows_read_most_matrices_once(name):
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
        monkeypatch.setattr(expert_work.tpu_rows.backend, "multiplier", lambda: multiplier)
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


def test_stored_matrices_and_rows_of_no_expert_have_no_peers():
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
