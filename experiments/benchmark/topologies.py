"""Accelerators that are not there: devices to compile for, as the real compilers know them."""

import dataclasses
import os

import jax
from jax.experimental import topologies

from kernels_pallas import chips

# Slices of TPUs by their number of devices; a chip of TPU7x is two.
_SLICES = {
    "v5e": {4: "v5e:2x2", 16: "v5e:4x4"},
    "v5p": {
        4: "v5p:2x2x1", 8: "v5p:2x2x2", 16: "v5p:2x2x4", 32: "v5p:2x4x4", 64: "v5p:4x4x4",
    },
    "v6e": {4: "v6e:2x2", 16: "v6e:4x4"},
    "tpu7x": {8: "tpu7x:2x2x1"},
}  # fmt: skip

# A Hopper GPU as XLA describes it. Source: openxla/xla, xla/backends/gpu/target_config/specs.
_HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: %(smem_of_all)d
  threads_per_core_limit: 2048
  core_count: %(multiprocessors)d
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: %(bandwidth)d
  l2_cache_size: %(l2)d
  clock_rate_ghz: 1.98
  device_memory_size: %(usable)d
  shared_memory_per_block_optin: %(smem)d
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: %(registers)d
  registers_per_block_limit: %(registers)d
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  ecc_enabled: true
  name: "%(kind)s"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
  device_interconnect_info { active_links: %(links)d }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "%(kind)s"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of accelerator that programs are compiled for; its compiler comes with a package."""

    chip: chips.Chip
    package: str

    @property
    def name(self) -> str:
        """Name on the command line."""
        return self.chip.name

    @property
    def memory(self) -> int:
        """Bytes of one device that a program may have."""
        return self.chip.usable

    def devices(self, count: int) -> list[jax.Device]:
        """Describe `count` devices, the first ones of the smallest slice that has as many.

        Raises:
          ValueError: no slice is so large, or the compiler is not installed.
        """
        try:
            return list(self._topology(count).devices)[:count]
        except (RuntimeError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"cannot compile for {self.name} here ({reason}); its compiler comes with the "
                f"package {self.package}, which `make compile` installs."
            ) from error

    def _topology(self, count: int):
        if self.name not in _SLICES:
            text = f"1x1x{count}"  # hosts, processes of a host, devices of a process
            facts = dataclasses.asdict(self.chip)  # of shared memory, 1 KiB is the driver's
            facts |= {"kind": self.chip.kinds[0], "smem_of_all": self.chip.smem + 1024}
            return topologies.get_topology_desc(
                self.name, "cuda", target_config=_HOPPER % facts, topology=text
            )
        slices = _SLICES[self.name]
        names = [name for devices, name in slices.items() if devices >= count]
        if not names:
            raise ValueError(
                f"{count} devices of {self.name} are more than the {max(slices)} known."
            )
        return topologies.get_topology_desc(platform="tpu", topology_name=names[0])


TARGETS = {
    name: Target(chip=chips.named(name), package=package)
    for package, names in (("libtpu", tuple(_SLICES)), ("jax[cuda13]", ("h100", "h200")))
    for name in names
}


def prepare() -> None:
    """Let this process compile for other devices; call it before anything runs on one.

    The process itself computes on the CPU, libtpu does not ask a metadata server which machine
    this is, and several processes may compile at a time.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
