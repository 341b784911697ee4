"""Benchmarks check before they time, count what blocks copy, and refuse what would mislead."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from experiments.benchmark import __main__ as command
from experiments.benchmark import cases, report, schedule, timing, tune
from experiments.benchmark.cases import Case, Floor
from experiments.benchmark.timing import Machine
from experiments.launch import FlagError
from kernels_pallas import chips, tuning
from kernels_pallas.shapes import Attention, Decode

ATTENTION = Attention(
    name="tiny", B=1, T=24, N=2, K=1, H=8, chunk_size=10, temperature=(4, 0.1), dtype="float32"
)
DECODE = Decode(name="tiny_decode", B=2, S=16, T=2, N=2, K=1, H=8, lengths=(16, 9))
SLOW = dataclasses.replace(chips.named("h100"), bf16=1e9, bandwidth=1e9)
HERE = Machine(kind="cpu", platform="cpu", chip=SLOW, copying=1e9)


@pytest.fixture(autouse=True)
def once(monkeypatch):
    monkeypatch.setattr(timing, "REPEATS", 1)


def values_of(*arguments):
    values = flags.FlagValues()
    command.define_flags(values)
    values(["command", *arguments])
    return values


def doubling(wrong=0.0, sizes=None):
    """An operation of one array; its backend "tpu" is off by `wrong`."""

    def function(*, x, backend):
        if sizes is not None:
            sizes.append(tuning.lookup("doubling.forward", {"block": 1}, width=x.shape[0])["block"])
        return 2 * x + (wrong if backend == "tpu" else 0.0)

    return Case(
        operation="doubling", shape="line", sizes={}, function=function,
        build=lambda key: {"x": jax.random.normal(key, (256,))},
        floors={"forward": Floor(flops=256, bytes=2048), "backward": Floor(flops=256, bytes=2048)},
        wrt=("x",),
        candidates=lambda direction, platform: [{"doubling.forward": {"block": n}} for n in (2, 4)],
    )  # fmt: skip


def test_the_kernels_suite_times_both_passes_and_compares_them_with_a_peer():
    records = timing.measure(cases.attention_case(ATTENTION), HERE, None)
    assert [record["pass"] for record in records] == ["forward", "backward"]
    for record in records:
        assert record["backend"] == "reference" and not record["faults"]
        assert record["seconds"] > 0 and record["ratios"]["xla"] > 0
        assert record["relative_error"] < 1e-4  # float32, another order of sums
        assert record["of_limit"] == pytest.approx(
            ATTENTION.flops(backward=record["pass"] == "backward") / 1e9 / record["seconds"]
        )
        assert "xla" in report.TIMES.line(record)


def test_decoding_is_timed_forward_alone():
    (record,) = timing.measure(cases.decode_case(DECODE), HERE, None)
    assert record["gbps"] == pytest.approx(DECODE.bytes() / record["seconds"] / 1e9)


def test_a_wrong_result_is_a_fault():
    forward, backward = timing.measure(doubling(wrong=0.1), HERE, "tpu")
    assert "differs from the reference" in forward["faults"][0]
    assert not backward["faults"], "a constant has no gradient"
    assert report.fault_lines(forward)[0].startswith("FAULT")


def test_one_wrong_tile_among_thousands_is_a_fault():
    wanted = jax.random.normal(jax.random.key(0), (512, 64, 64))
    found = wanted.at[7].set(0)
    apart = timing.differences(found, wanted)
    assert apart.relative > timing.TOLERANCE and apart.largest > timing.LARGEST_TOLERANCE
    many = jnp.tile(wanted, (20, 1, 1))
    apart = timing.differences(many.at[7].set(0), many)
    assert apart.relative < timing.TOLERANCE < timing.LARGEST_TOLERANCE < apart.largest


def test_a_race_is_a_fault():
    case = doubling()
    runs = iter(range(1000))

    def racing(*, x, backend):
        late = jax.pure_callback(lambda: np.float32(next(runs) == 9), jax.typeof(x[0]))
        return 2 * x + late

    raced, _ = timing.measure(
        dataclasses.replace(case, function=racing, wrt=()), HERE, "tpu", ["repeat"]
    )
    assert raced["differing"] == 1 and "1 of 30 runs differ" in raced["faults"][0]
    assert "seconds" not in raced and "relative_error" not in raced
    sound, _ = timing.measure(case, HERE, "tpu", ["repeat"])
    assert sound["differing"] == 0 and not sound["faults"]


def test_nan_is_a_fault():
    forward, _ = timing.measure(doubling(wrong=float("nan")), HERE, "tpu")
    assert len(forward["faults"]) == 3


def test_nan_is_a_fault_where_there_is_nothing_to_compare_with():
    case = dataclasses.replace(doubling(), function=lambda x, backend: jnp.log(-1 - x * x))
    forward, _ = timing.measure(case, HERE, None)
    assert "not a number" in forward["faults"][0]


def test_the_log_sum_exp_of_nothing_does_not_hide_errors_elsewhere():
    nothing = jnp.array([-1e30, 1.0])
    assert timing.differences(nothing, nothing) == (0, 0, 0)
    assert timing.differences(nothing + 1, nothing).relative == pytest.approx(1)
    assert math.isnan(timing.differences(jnp.array([0.0, 1.0]), nothing).absolute)


def test_a_program_that_repeats_another_gives_the_same():
    x = jnp.arange(4.0)
    repeated = timing.chained(lambda x, n: {"y": x * n}, 3)
    assert repeated(x, jnp.int32(2))["y"].tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--suite=kernels", "--backend=tpu"], "run in an interpreter"),
        (["--suite=kernels", "--tune"], "only the reference runs"),
        (["--suite=kernels", "--shapes=scuot"], "'scuot' is no shape; choose from scout_chunk_32k"),
        (["--suite=kernels", "--do=chek"], "--do=chek is unknown; choose from check"),
        ([], "give --suite=kernels, --suite=compile or"),
    ],
)
def test_what_would_mislead_is_refused(arguments, says):
    with pytest.raises(FlagError, match=says):
        command.main(values_of(*arguments))


def test_a_cpu_runs_nano_unless_it_is_told_otherwise():
    assert {case.shape for case in cases.cases(small=True)} == {
        "nano_chunk", "nano_nope", "nano_decode", "nano_prefill",
        "nano_experts_2k", "nano_experts_1",
    }  # fmt: skip
    (case,) = cases.cases(["vision"], small=True)
    assert case.shape == "vision"


def test_the_command_prints_a_table_and_writes_its_figures(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(timing, "machine", lambda **_: HERE)
    monkeypatch.setattr(cases, "cases", lambda *_, **__: [doubling()])
    path = tmp_path / "new" / "figures.json"
    command.main(values_of("--suite=kernels", f"--output={path}"))
    assert "doubling" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["suite"] == "kernels" and len(written["records"]) == 2


def test_a_file_of_figures_is_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "figures.json"
    report.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        report.write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_tuning_keeps_the_fastest_and_what_it_did_not_try(monkeypatch, tmp_path):
    used = []
    durations = itertools.cycle([2.0, 1.0])  # of blocks of 2 and of 4

    def seconds(run, arguments):
        jax.eval_shape(run, *arguments)
        return next(durations)

    monkeypatch.setattr(tune, "seconds", seconds)
    other = {"operation": "other", "shape": {}, "blocks": {"q": 1}, "seconds": {}}
    (tmp_path / "cpu.json").write_text(json.dumps({"entries": [other]}))
    told = list(tune.tune([doubling(sizes=used)], "tpu", tmp_path))
    assert len(told) == 2 and set(used) == {2, 4}
    entries = json.loads((tmp_path / "cpu.json").read_text())["entries"]
    assert [entry["operation"] for entry in entries] == ["doubling.forward", "other"]
    assert entries[0]["blocks"] == {"block": 4} and entries[0]["shape"] == {"width": 256}
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning._table.cache_clear()
    try:
        assert tuning.lookup("doubling.forward", {"block": 1}, width=256) == {"block": 4}
        assert tuning.lookup("doubling.forward", {"block": 1}, width=8) == {"block": 1}
        assert tuning.lookup("doubling.forward", {"size": 1}, width=256) == {"size": 1}
    finally:
        tuning._table.cache_clear()


def test_other_block_sizes_make_another_program():
    traced = jax.jit(lambda x: x * tuning.lookup("twice", {"n": 2})["n"])
    assert traced(1) == 2
    with tuning.overridden({"twice": {"n": 3}}):
        assert traced(1) == 3
    assert traced(1) == 2


@pytest.mark.parametrize(("q_block", "kv_block"), [(1, 1), (4, 8), (24, 24), (5, 3)])
def test_blocks_that_meet_are_counted(q_block, kv_block):
    positions = range(ATTENTION.T)
    meeting = {
        (q // q_block, kv // kv_block)
        for q, kv in itertools.product(positions, positions)
        if kv <= q and kv // 10 == q // 10
    }
    assert schedule.pairs_of_blocks(ATTENTION, q_block, kv_block) == len(meeting)


def test_copies_are_shared_by_heads_on_tpus_alone():
    blocks = {
        "chunked_attention.forward": {"blocks": {"q": 8, "kv": 8, "q_block": 8, "kv_block": 8}}
    }
    # Three blocks of queries, of 8, 8 and 8: they meet keys 0..7, 0..15 and 8..23: five pairs.
    work = schedule.attention_work(ATTENTION, "forward", "tpu", blocks)
    assert work.flops == 5 * 64 * 4 * 8 * 2
    assert work.bytes == 2 * 24 * 64 + 5 * 2 * 8 * 32
    on_gpu = schedule.attention_work(ATTENTION, "forward", "gpu", blocks)
    assert on_gpu.bytes == 2 * 24 * 64 + 5 * 2 * 8 * 64
