"""Give every test the same machine: eight virtual CPU devices, whatever hardware is present.

XLA reads both variables once, when its backend starts, so they are set here, before any test
module imports jax.
"""

import os
import sys

NUM_DEVICES = 8

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py; run pytest from the root folder")

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={NUM_DEVICES}"
