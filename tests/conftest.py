"""Give every test the same machine: eight virtual CPU devices, whatever hardware is present.

XLA reads these variables once, when its backend starts, so they are set here, before any test
module imports jax. Nearly all of the time goes to compiling small programs, each run a few times:

- Code generation without optimisation halves the processor time of a forward and a gradient of
  nano (49 s to 22 s). It changes the machine code alone, not XLA's rewriting of programs.
- XLA:CPU may start independent collectives in another order on every virtual device, and then each
  waits for the others (the vision encoder's loop gathers weights, the decoder gathers its own). The
  plain scheduler keeps one order.
- Compiled programs are kept, for the other worker, for the commands that tests start, and for the
  next run (tests/serve/score_test.py takes 15 s of processor time at first and 6 s again).
"""

import os
import pathlib
import sys

NUM_DEVICES = 8
KEPT_PROGRAMS = pathlib.Path(__file__).resolve().parents[1] / ".pytest_cache" / "xla"
MAX_KEPT_BYTES = 1 << 30

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py; run pytest from the root folder")

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={NUM_DEVICES} --xla_backend_optimization_level=0"
    " --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(KEPT_PROGRAMS)
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(MAX_KEPT_BYTES)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
