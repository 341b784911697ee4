"""Run work in children that are killed at random instants, each a fork of one program.

The program imports what the work needs and then forks for every line that it reads, so that a
child costs its work and not an import of jax.
"""

import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]

FORKS = """
import os, sys
from {module} import work
while line := sys.stdin.readline():
    if child := os.fork():
        print(child, flush=True)
        sys.stdin.readline()
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    else:
        sys.stdout = sys.stderr  # the parent's, which is read
        work(line.strip())
        sys.stderr.flush()
        os._exit(0)
"""


@dataclasses.dataclass
class Killer:
    """Starts children that work in a folder, and kills some.

    Args:
      module: has a function `work` of the folder's name.
      seed: of the instants.
    """

    module: str
    seed: int = 0

    def __enter__(self):
        program = FORKS.format(module=self.module)
        # What is compiled is kept by this program's children for each other.
        environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._random = random.Random(self.seed)
        return self

    def __exit__(self, *_):
        with self._process:
            self._process.stdin.close()

    def finish(self, folder) -> float:
        """Do the work to its end and return the seconds that it took."""
        start = time.monotonic()
        self._start(folder)
        assert self._end() == 0
        return time.monotonic() - start

    def kill(self, folder, *, within: float) -> bool:
        """Begin the work and kill it in that many seconds at most; False if it was faster."""
        child = self._start(folder)
        time.sleep(self._random.uniform(0, within))
        os.kill(child, signal.SIGKILL)  # if it has ended, its number is its own until `_end`
        return self._end() != 0

    def _start(self, folder) -> int:
        return self._ask(folder)

    def _end(self) -> int:
        return self._ask("end")

    def _ask(self, line) -> int:
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())
