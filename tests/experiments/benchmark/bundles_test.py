"""Schedules that libtpu writes are read, and set beside the time that copies take."""

import pytest

from experiments.benchmark import bundles
from experiments.benchmark.bundles import Schedule
from kernels_pallas import chips

ANALYSIS = """Schedule analysis:
\ttotal scheduled bundles:    3466
\tempty scheduled bundles:    61
\t3405.00 scheduled bundles (100.00%): %{name} = bf16[512,8192]{{1,0:T(8,128)(2,1)}} \
custom-call(%a, %b), custom_call_target="{target}", metadata={{op_name="x"}}
"""


def analysis(name, target="tpu_custom_call"):
    return ANALYSIS.format(name=name, target=target)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (analysis("expert_mlp_forward.12"), Schedule("expert_mlp_forward", 12, 3466)),
        (analysis("decode_attention"), Schedule("decode_attention", 0, 3466)),
        (analysis("read.2.given_0_"), Schedule("read", 2, 3466)),
        (analysis("all.2").replace("100.00%", "53.85%"), None),  # of the program around it
        (analysis("sort.3", target="Sort"), None),
        ("Schedule analysis:\n\ttotal scheduled bundles:    7\n\t%fusion.2 = f32[8]", None),
    ],
)
def test_the_schedule_of_a_kernel_is_read_and_nothing_else(text, found):
    assert bundles.parse(text) == found


def test_schedules_are_taken_once_in_the_order_of_their_numbers(tmp_path):
    kinds = ("schedule-analysis_final_bundles", "final_bundles")
    for number, name in enumerate(("b.10", "b.2", "a.1")):
        for kind in kinds:
            (tmp_path / f"{number}-{name}-{kind}.txt").write_text(analysis(name))
    found = bundles.take(tmp_path)
    assert [(each.kernel, each.number) for each in found] == [("a", 1), ("b", 2), ("b", 10)]
    assert bundles.take(tmp_path) == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "clock"), [("v5e", 1.5e9), ("v5p", 1.75e9), ("v6e", 1.75e9), ("tpu7x", 2.2e9)]
)
def test_a_copy_takes_cycles_of_the_clock_that_gives_a_chip_its_products(name, clock):
    chip = chips.named(name)
    second = chip.bandwidth / chip.cores  # of one core
    assert bundles.cycles(second, chip) == pytest.approx(clock, rel=0.005)


def test_kernels_stand_beside_their_copies_and_without_where_steps_are_not_known():
    chip = chips.named("v5p")
    schedules = [Schedule("a", 1, 10), Schedule("a", 2, 20), Schedule("b", 0, 30)]
    found = bundles.beside(schedules, {"a": (1 << 20, 1 << 21), "c": (1,)}, chip)
    assert found == [
        {"kernel": "a", "bundles": 10, "cycles": bundles.cycles(1 << 20, chip)},
        {"kernel": "a", "bundles": 20, "cycles": bundles.cycles(1 << 21, chip)},
        {"kernel": "b", "bundles": 30, "cycles": None},
    ]
    assert bundles.cell({"bundles": found}) == "10/1328 20/2656 30/n/a"
    assert bundles.cell({}) == "n/a"


def test_libtpu_is_told_where_to_write_and_keeps_what_it_was_told_before(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--one=1")
    bundles.write_to("folder")
    first, *flags = bundles.os.environ["LIBTPU_INIT_ARGS"].split()
    assert first == "--one=1" and "--xla_jf_dump_to=folder" in flags
