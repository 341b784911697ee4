"""Chips are found by what jax calls them, and their facts hang together."""

import pytest

from kernels_pallas import backend, chips
from kernels_pallas.experts.tpu_remote import exchange

MIB = 2**20


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_a_chip_is_found_by_what_jax_calls_it_and_by_its_short_name(kind, name):
    assert chips.find(kind) is chips.named(name)


def test_an_unknown_kind_is_none_and_an_unknown_name_is_refused():
    assert chips.find("cpu") is None and chips.find("NVIDIA H100 NVL") is None
    with pytest.raises(ValueError, match="chip 'v5' is unknown; choose from v4, v5e"):
        chips.named("v5")


def test_a_kind_belongs_to_one_chip():
    kinds = [kind for chip in chips.CHIPS.values() for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=lambda chip: chip.name)
def test_facts_hang_together(chip):
    assert 0.94 * chip.hbm < chip.usable < 1.01 * chip.hbm
    # Narrower numbers are multiplied at once or twice the rate, or not at all.
    assert {round(rate / chip.bf16, 1) for rate in (chip.fp8, chip.int8)} <= {0, 1, 2}
    is_tpu = chip.platform == "tpu"
    assert bool(chip.vmem) == bool(chip.cores) == bool(chip.multiplier) == is_tpu
    assert bool(chip.ring) == is_tpu and bool(chip.multiprocessors) != is_tpu
    assert 60 < chip.bf16 / chip.bandwidth < 600  # FLOPs for a byte


def test_two_devices_of_tpu7x_are_the_chip_of_its_page():
    chip = chips.named("tpu7x")
    assert chip.devices * chip.hbm == 192 * 2**30
    assert chip.devices * chip.bf16 == 2307e12 and chip.devices * chip.fp8 == 4614e12
    assert chip.devices * chip.bandwidth == 7.38e12 and chip.devices * chip.fabric == 600e9


@pytest.mark.parametrize(
    ("kind", "cores", "multiplier", "vmem_limit"),
    [
        ("TPU v5 lite", 1, 128, 112 * MIB),
        ("TPU v5", 2, 128, 52 * MIB),
        ("TPU v6 lite", 1, 256, 112 * MIB),
        ("TPU7x", 1, 256, 52 * MIB),
        ("cpu", 1, 256, 52 * MIB),
    ],
)
def test_kernels_ask_for_the_tpu_that_they_are_traced_for(
    kind, cores, multiplier, vmem_limit, monkeypatch
):
    monkeypatch.setattr(backend, "device_kind", lambda: kind)
    assert (backend.num_cores(), backend.multiplier()) == (cores, multiplier)
    assert exchange.vmem_limit() == vmem_limit


@pytest.mark.parametrize(
    ("kind", "multiprocessors"),
    [("NVIDIA H200", 132), ("NVIDIA H100 PCIe", 114), ("NVIDIA GH200 480GB", 132), ("cpu", 132)],
)
def test_kernels_ask_for_the_gpu_that_they_are_traced_for(kind, multiprocessors, monkeypatch):
    monkeypatch.setattr(backend, "device_kind", lambda: kind)
    assert backend.gpu().multiprocessors == multiprocessors


@pytest.mark.parametrize(
    ("kind", "is_hopper"),
    [
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H800", True),
        ("NVIDIA H20", True),
        ("NVIDIA GH200 480GB", True),
        ("NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA B200", False),
        ("TPU v5", False),
    ],
)
def test_hoppers_are_known_whether_they_are_listed_or_not(kind, is_hopper):
    assert chips.is_hopper(kind) == is_hopper
