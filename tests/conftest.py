"""Give every test the same machine: eight virtual CPU devices, whatever hardware is present.

XLA reads these variables once, when its backend starts, so they are set here, before any test
module imports jax. Tests compile many small programs and run each a few times: code generation
without optimisation halves the processor time of a forward and a gradient of nano (49 s to 22 s,
nearly all of it compilation). It changes the machine code alone, not XLA's rewriting of programs.
"""

import os
import sys

NUM_DEVICES = 8

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py; run pytest from the root folder")

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={NUM_DEVICES} --xla_backend_optimization_level=0"
)
