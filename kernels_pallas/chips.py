"""What is known of accelerators: the only place that states facts of a chip.

Every figure is of one device as jax counts them. On TPU7x a device is half a chip: two of them
share its memory, its products and its links, and each has half. On v4 and v5p a device is a chip
whose two tensor cores run one program together.

Sources. TPUs: the pages of Cloud TPU (v4, v5e, v5p, v6e, tpu7x) for memory, its bandwidth, products
and links; `jax._src.tpu_info` for cores, multipliers and what they take, VMEM and SMEM; the
scaling book (jax-ml/scaling-book) for int8. GPUs: NVIDIA's data sheets, dense figures, for products
and links; openxla/xla, xla/backends/gpu/target_config/specs, for all else.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device of a kind of accelerator. A number is 0 where a chip has no such thing.

    Attributes:
        name: in short, as command lines and tables have it.
        kinds: what `jax.Device.device_kind` says.
        platform: as jax names it.
        devices: of one chip.
        hbm: bytes of memory that the maker states.
        usable: bytes of it that a program may have: on TPUs where libtpu 0.0.52 stops compiling, on
            GPUs what the driver shows.
        bandwidth: bytes/s of memory.
        bf16, fp8, int8: dense products, in operations/s.
        fabric: bytes/s that leave a device, one way, over all its links: half of what makers call
            bidirectional. Programs see 0.9 of it on TPUs (the scaling book) and 0.84 on NVLink
            (NVIDIA/nccl#1264).
        links: of a chip, to neighbours in a torus of links / 2 dimensions; of a GPU, to a switch.
        ring: chips along an axis of a slice at whose multiples it closes to a ring; 0 for a switch.
        smem: bytes of scalar memory of a tensor core, or of shared memory that a block of threads
            may take.
        cores: tensor cores that share a program.
        multiplier: rows and columns of the matrix multiplier.
        vmem: bytes of vector memory of a tensor core.
        float8: the dtype with 3 bits of fraction that the multiplier takes beside bfloat16.
        multiprocessors: of a GPU.
        registers: of 32 bits, of a multiprocessor.
        l2: bytes of the cache that multiprocessors share.
    """

    name: str
    kinds: tuple[str, ...]
    platform: Literal["tpu", "gpu"]
    devices: int = 1
    hbm: int
    usable: int
    bandwidth: float
    bf16: float
    fp8: float = 0
    int8: float = 0
    fabric: float
    links: int
    ring: int = 0
    smem: int = 1 * MIB
    cores: int = 0
    multiplier: int = 0
    vmem: int = 0
    float8: str = ""
    multiprocessors: int = 0
    registers: int = 0
    l2: int = 0


V4 = Chip(
    name="v4", kinds=("TPU v4",), platform="tpu",
    hbm=32 * GIB, usable=int(30.5 * GIB), bandwidth=1200e9, bf16=275e12, int8=275e12,
    fabric=300e9, links=6, ring=4, cores=2, multiplier=128, vmem=16 * MIB,
)  # fmt: skip
V5E = Chip(
    name="v5e", kinds=("TPU v5 lite", "TPU v5e"), platform="tpu",
    hbm=16 * GIB, usable=int(15.75 * GIB), bandwidth=819e9, bf16=197e12, int8=393e12,
    fabric=200e9, links=4, ring=16, cores=1, multiplier=128, vmem=128 * MIB,
    float8="float8_e4m3b11fnuz",
)  # fmt: skip
V5P = Chip(  # more is usable than stated: the maker rounds down
    name="v5p", kinds=("TPU v5", "TPU v5p"), platform="tpu",
    hbm=95 * GIB, usable=int(95.73 * GIB), bandwidth=2765e9, bf16=459e12, fp8=459e12, int8=918e12,
    fabric=600e9, links=6, ring=4, cores=2, multiplier=128, vmem=64 * MIB,
    float8="float8_e4m3b11fnuz",
)  # fmt: skip
V6E = Chip(
    name="v6e", kinds=("TPU v6 lite", "TPU v6e"), platform="tpu",
    hbm=32 * GIB, usable=int(31.24 * GIB), bandwidth=1638e9, bf16=918e12, fp8=918e12, int8=1836e12,
    fabric=400e9, links=4, ring=16, cores=1, multiplier=256, vmem=128 * MIB,
    float8="float8_e4m3b11fnuz",
)  # fmt: skip
TPU7X = Chip(  # of a chip: 192 GiB, 7.38 TB/s, 2,307 and 4,614 TFLOP/s, 600 GB/s
    name="tpu7x", kinds=("TPU7x",), platform="tpu", devices=2,
    hbm=96 * GIB, usable=int(94.74 * GIB), bandwidth=3690e9, bf16=1153.5e12, fp8=2307e12,
    fabric=300e9, links=6, ring=4, cores=1, multiplier=256, vmem=64 * MIB,
    float8="float8_e4m3fn",
)  # fmt: skip

A100 = Chip(
    name="a100", kinds=("NVIDIA A100-SXM4-80GB",), platform="gpu",
    hbm=80 * GIB, usable=85_100_068_864, bandwidth=2.03904e12, bf16=312e12, int8=624e12,
    fabric=300e9, links=12, smem=163 * KIB, multiprocessors=108, registers=65_536, l2=40 * MIB,
)  # fmt: skip
H100 = Chip(
    name="h100", kinds=("NVIDIA H100 80GB HBM3",), platform="gpu",
    hbm=80 * GIB, usable=84_942_979_072, bandwidth=3.35232e12, bf16=989e12, fp8=1979e12,
    int8=1979e12, fabric=450e9, links=18, smem=227 * KIB, multiprocessors=132, registers=65_536,
    l2=50 * MIB,
)  # fmt: skip
H200 = dataclasses.replace(
    H100, name="h200", kinds=("NVIDIA H200", "NVIDIA H200 141GB HBM3e"),
    hbm=141 * GIB, usable=151_397_597_184, bandwidth=4.8e12,
)  # fmt: skip
B200 = dataclasses.replace(
    H100, name="b200", kinds=("NVIDIA B200",),
    hbm=180 * GIB, usable=191_514_411_008, bandwidth=7.67232e12, bf16=2250e12, fp8=4500e12,
    int8=4500e12, fabric=900e9, multiprocessors=148, l2=132_644_864,
)  # fmt: skip
# Relatives: the same chip with other memory, or fewer multiprocessors behind PCIe.
_A100_40GB = dataclasses.replace(
    A100, name="a100_40gb", kinds=("NVIDIA A100-SXM4-40GB",),
    hbm=40 * GIB, usable=42_331_013_120, bandwidth=1.5552e12,
)  # fmt: skip
_H100_PCIE = dataclasses.replace(
    H100, name="h100_pcie", kinds=("NVIDIA H100 PCIe",), bandwidth=2.03904e12, bf16=756e12,
    fp8=1513e12, int8=1513e12, fabric=64e9, links=1, multiprocessors=114,
)  # fmt: skip

CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (V4, V5E, V5P, V6E, TPU7X, A100, _A100_40GB, H100, _H100_PCIE, H200, B200)
}
"""Every chip by its short name."""

TPUS_WITH_KERNELS = (V5E, V5P, V6E, TPU7X)
"""TPUs that kernels are made for: older ones have too little VMEM."""
LEAST_VMEM = min(chip.vmem for chip in TPUS_WITH_KERNELS)

# Those with wgmma, by what stands in their kind. GH200 contains H200.
_HOPPERS = ("H100", "H200", "H800", "H20")


def find(device_kind: str) -> Chip | None:
    """Return what is known of a kind of device, as jax names it; None if nothing is."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)


def named(name: str) -> Chip:
    """Return a chip by its short name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in CHIPS:
        raise ValueError(f"chip {name!r} is unknown; choose from {', '.join(CHIPS)}")
    return CHIPS[name]


def is_hopper(device_kind: str) -> bool:
    """Tell whether a kind of device is a GPU of the Hopper generation, listed here or not."""
    return any(name in device_kind for name in _HOPPERS)
