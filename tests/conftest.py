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
- Traced programs are many objects in cycles, and searching them takes a tenth of the time when it
  is done as often as Python does (tests/model/properties_test.py: 146 s, and 131 s so).

Each run ends with its processor time, beside what the whole suite may take, and where it went.
"""

import collections
import gc
import os
import pathlib
import sys

import pytest

NUM_DEVICES = 8
KEPT_PROGRAMS = pathlib.Path(__file__).resolve().parents[1] / ".pytest_cache" / "xla"
MAX_KEPT_BYTES = 1 << 30
BUDGET_SECONDS = 2000  # of processor time, for the whole suite with nothing kept
MAX_MAPPINGS = 20_000
SHOWN = 10  # of the dearest files, and of the dearest tests

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
gc.set_threshold(50_000, 20, 20)


def count_mappings() -> int:
    """Return how many pieces the memory of this process is mapped in; 0 where nobody says."""
    maps = pathlib.Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Forget compiled programs when there are many: each is mapped apart.

    Linux maps at most 65,530 pieces, after which XLA ends the process without a word; three files
    of tests make 23,000.
    """
    yield
    if count_mappings() > MAX_MAPPINGS:
        sys.modules["jax"].clear_caches()
        gc.collect()


def processor_seconds() -> float:
    """Return what this process and the children it has waited for have used."""
    return sum(os.times()[:4])


class Clock:
    """Measure each test; its figure travels with its report from the worker to the summary."""

    def __init__(self):
        self.last = processor_seconds()

    def pytest_collection_finish(self):
        """Leave out what importing and collecting took."""
        self.last = processor_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        """Note in each report what was used since the one before."""
        report, now = (yield), processor_seconds()
        report.processor_seconds, self.last = now - self.last, now
        return report

    def pytest_terminal_summary(self, terminalreporter):
        """Print the whole and the dearest files and tests; workers have ended, so they count."""
        files, tests = collections.Counter(), collections.Counter()
        for report in (r for rs in terminalreporter.stats.values() for r in rs):
            if hasattr(report, "processor_seconds"):
                files[report.nodeid.split("::")[0]] += report.processor_seconds
                tests[report.nodeid] += report.processor_seconds
        terminalreporter.section("processor time")
        total = processor_seconds()
        terminalreporter.line(f"{total:.0f} s in all; the suite may take {BUDGET_SECONDS} s")
        for counter in (files, tests):
            for name, seconds in counter.most_common(SHOWN):
                terminalreporter.line(f"{seconds:6.0f} s  {name}")


def pytest_configure(config):
    """Start the clock."""
    config.pluginmanager.register(Clock())
