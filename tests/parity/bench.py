"""Time ours beside Hugging Face transformers on this CPU: `make bench-hf` prints a table.

transformers runs in its own environment, in a process that makes a random float32 checkpoint and
waits; we load the checkpoint. After the results have been compared, both sides run in turns, never
at once, with as many threads each: a mixture-of-experts layer, and a model of 8 layers (Scout with
D=512, F=1024, E=16, N=8, K=2, H=64 and 2048 words), at 1024 tokens and one token at a time.
transformers gets the fastest of the ways it has (tried first: eager, static cache, torch.compile;
its experts_implementation does not take Llama 4), and the default one is shown too. The exit status
is 1 if results disagree. Ten minutes on two cores that nobody else uses; --quick is a rough look.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import bench_case
import bench_report
import jax
import jax.numpy as jnp
import numpy as np
from bench_report import Comparison

from experiments.benchmark.report import write_json
from llama4_jax import from_pretrained
from llama4_jax.pretrained import GenerationDefaults, Pretrained
from llama4_jax.serve import EngineConfig, Options, Request, generate

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
LIMIT = 1e-4  # outputs and logits have unit scale; see compare.py
NOISE = 1e-3  # where the two best logits are this close, either may be chosen
PAUSE = 0.2  # seconds in which the threads of the other side fall asleep


class Transformers:
    """The process that runs transformers."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def ask(self, **request) -> dict:
        """Send one request and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process of transformers ended; see its message above")
        return json.loads(line)


@contextlib.contextmanager
def transformers(
    python: pathlib.Path, folder: pathlib.Path, threads: int, steps: int
) -> Iterator[Transformers]:
    """Start transformers, which writes its checkpoint and results into the folder."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    command = [python, HERE / "bench_hf.py", folder, str(threads), str(steps)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        try:
            yield Transformers(process)
        finally:
            process.kill()


class Ours:
    """Our model with the inputs, as a user calls it."""

    def __init__(self, pretrained: Pretrained, steps: int):
        self.steps = steps
        self.pretrained = dataclasses.replace(pretrained, generation=GenerationDefaults())
        self.ids = jnp.asarray(bench_case.token_ids())
        self.x = jnp.asarray(bench_case.layer_inputs())
        self.tokens = [self.x[:, i : i + 1] for i in range(steps)]
        slots = pretrained.model.decoder.groups.slots  # layers of one kind, stacked
        group, slot = divmod(bench_case.LAYER, len(slots))
        self.layer = jax.tree.map(lambda a: a[group], slots[slot].ffn)
        self._run_layer = jax.jit(lambda layer, x_BTD: layer(x_BTD))
        self._run_model = jax.jit(lambda model, ids_BT: model(ids_BT).logits_BTV)

    def run_layer(self, x_BTD: jax.Array) -> jax.Array:
        """Apply the mixture-of-experts layer."""
        return self._run_layer(self.layer, x_BTD)[0].block_until_ready()

    def run_model(self) -> jax.Array:
        """Return the logits of the whole prompt."""
        return self._run_model(self.pretrained.model, self.ids).block_until_ready()

    def answer(self, length: int) -> list[int]:
        """Continue the prompt by its likeliest tokens."""
        requests = [Request(tokens=self.ids[0].tolist())]
        (answer,) = generate(
            self.pretrained,
            requests,
            max_new_tokens=length,
            options=Options(temperature=0),
            # At once, as transformers reads it.
            config=EngineConfig(max_rows=1, step_tokens=bench_case.LENGTH),
        )
        return answer.tokens

    def ways(self) -> dict[str, Callable[[], float]]:
        """Return functions by item, which run once and return seconds."""

        def timed(run: Callable[[], object]) -> float:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        def one_by_one() -> None:
            for x_BTD in self.tokens:
                self.run_layer(x_BTD)

        def more_tokens() -> float:
            first = timed(lambda: self.answer(1))
            return timed(lambda: self.answer(1 + self.steps)) - first

        return {
            "layer, prompt": lambda: timed(lambda: self.run_layer(self.x)),
            "layer, token": lambda: timed(one_by_one) / len(self.tokens),
            "model, all logits": lambda: timed(self.run_model),
            "model, first token": lambda: timed(lambda: self.answer(1)),
            "model, more tokens": lambda: more_tokens() / self.steps,
        }


def compare(ours: Ours, theirs: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Return the error of each result and its bound."""
    tokens = ours.answer(1 + ours.steps)
    wrong = bench_report.wrong_tokens(tokens, theirs["tokens"].tolist(), theirs["gaps"], NOISE)
    layer = np.abs(ours.run_layer(ours.x) - theirs["layer"]).max()
    logits = np.abs(ours.run_model() - theirs["logits"]).max()
    return {
        "layer, output": (float(layer), LIMIT),
        "model, logits": (float(logits), LIMIT),
        "model, other tokens": (float(wrong), 0),
    }


def try_ways(hf: Transformers, item: str, ways: list[str]) -> dict[str, list[float]]:
    """Time every way that transformers has, after a run that warms up; leave out what fails."""
    tried = {}
    for way in ways:
        warm = hf.ask(item=item, way=way, runs=1)
        if "refused" in warm:
            print(f"{item}, {way}: does not run: {warm['refused']}")
            continue
        tried[way] = hf.ask(item=item, way=way, runs=2)["seconds"]
        print(f"{item}, {way}: {np.median(tried[way]) * 1e3:.2f} ms")
    return tried


def take_turns(
    ours: Ours, hf: Transformers, item: bench_report.Item, ways: list[str], rounds: int
) -> list[Comparison]:
    """Run both sides alternately, the first one first in even rounds."""
    run = ours.ways()[item.name]
    run()
    mine: list[float] = []
    theirs: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(rounds):
        turns: list[str | None] = [None, *ways]
        for way in turns if i % 2 == 0 else reversed(turns):
            time.sleep(PAUSE)
            if way is None:
                mine.append(run())
            else:
                theirs[way] += hf.ask(item=item.name, way=way, runs=1)["seconds"]
    return [Comparison(item=item, way=w, ours=mine, theirs=theirs[w]) for w in ways]


def cpu_name() -> str:
    """Return the processor as the system calls it."""
    information = pathlib.Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> int:
    """Compare, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--oracle", type=pathlib.Path, default=ROOT / ".oracle/bin/python",
                        help="the Python that has torch and transformers")  # fmt: skip
    parser.add_argument("--only", default="", help="only items whose name contains this")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side")
    parser.add_argument("--steps", type=int, default=64, help="tokens after the first one")
    parser.add_argument("--quick", action="store_true",
                        help="3 rounds of 8 tokens, transformers as it is by default")  # fmt: skip
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.steps = 3, 8
    items = [item for item in bench_report.ITEMS if arguments.only in item.name]
    if not items or not arguments.oracle.is_file():
        parser.error(f"no item is named {arguments.only!r}" if not items else
                     f"{arguments.oracle} is not there; `make bench-hf` makes it")  # fmt: skip
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with transformers(arguments.oracle, folder, threads or 1, arguments.steps) as hf:
            about = hf.ask()
            ours = Ours(from_pretrained(folder / "hf", dtype="float32"), arguments.steps)
            with np.load(folder / "hf.npz") as stored:
                errors = compare(ours, dict(stored))
            for quantity, (error, limit) in errors.items():
                verdict = "ok" if error <= limit else "FAULT"
                print(f"{quantity:22} error {error:9.2e}  at most {limit:9.2e}  {verdict}")
            comparisons = []
            for item in items:
                known = about["ways"][item.name][: 1 if arguments.quick else None]
                tried = try_ways(hf, item.name, known)
                ways = list(dict.fromkeys([bench_report.best_way(tried), next(iter(tried))]))
                comparisons += take_turns(ours, hf, item, ways, arguments.rounds)
    load.append(os.getloadavg()[0])
    versions = {"torch": about["torch"], "transformers": about["transformers"]}
    print(f"{cpu_name()}, {threads} threads, load {load[0]:.1f} before and {load[1]:.1f} after;",
          f"jax {jax.__version__},", ", ".join(map(" ".join, versions.items())))  # fmt: skip
    print(bench_report.HEADER)
    for comparison in comparisons:
        print(comparison.line())
    print(bench_report.NOTES)
    if arguments.output:
        shapes = bench_case.TEXT | {"prompt": bench_case.LENGTH, "new_tokens": arguments.steps}
        write_json(
            arguments.output,
            {
                **versions,
                "cpu": cpu_name(),
                "threads": threads,
                "load": load,
                "dtype": "float32",
                "shapes": shapes,
                "errors": {q: {"error": e, "limit": b} for q, (e, b) in errors.items()},
                "items": [comparison.record() for comparison in comparisons],
            },
        )
    return int(any(not error <= limit for error, limit in errors.values()))


if __name__ == "__main__":
    sys.exit(main())
