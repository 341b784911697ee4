"""Time the engine and the server on this CPU: `make bench-serve` prints a figure after the other.

The model is the 8-layer one of `make bench-hf`; 64 mixed requests (prompts of 16 to 1024 tokens,
answers of 8 to 256) go through transformers' `generate` in its best batches, through the engine,
and through HTTP, in turns. Then what a step costs the host, what is compiled after warming up, what
a request holds of the cache, what is computed again, how many drafts are right, and what a grammar
costs. Ten minutes on two cores that nobody else uses; --quick is a rough look.

    E1 requests a second beside transformers     E2 over HTTP, at once and at random moments
    E3 beside one static batch     E4 beside vLLM, with --vllm=its Python (see bench_vllm.py)
    E5 host time   E6 compilations and waits   E7 prefix caches   E8 bytes   E9 drafts   E13 grammar
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import os
import pathlib
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import bench_case
import jax
import jax.numpy as jnp
import numpy as np
from bench import ROOT, Transformers, cpu_name, transformers

from llama4_jax import Cache, from_pretrained
from llama4_jax.pretrained import GenerationDefaults, Pretrained
from llama4_jax.serve import Engine, EngineConfig, Request, generate
from tests.parity import bench_peer, prefix_rules, serve_figures, serve_report
from tests.parity.load import over_http
from tests.parity.serve_figures import GREEDY, seconds
from tests.server.live import serving

CONFIG = EngineConfig(max_rows=32, step_tokens=512, max_context=1280, keep_prefixes=False)
TRIED = 16  # requests that choose how transformers is run


class Bench:
    """What the figures share, made when the first of them needs it."""

    def __init__(self, arguments: argparse.Namespace, stack: contextlib.ExitStack):
        self.arguments, self._stack = arguments, stack
        self.rounds = 1 if arguments.quick else arguments.rounds
        self.requests = [
            Request(tokens=prompt, options=dataclasses.replace(GREEDY, max_new_tokens=new))
            for prompt, new in bench_case.mixed_requests()[: TRIED if arguments.quick else None]
        ]

    @functools.cached_property
    def folder(self) -> pathlib.Path:
        """A folder for checkpoints."""
        return pathlib.Path(self._stack.enter_context(tempfile.TemporaryDirectory()))

    @functools.cached_property
    def hf(self) -> Transformers:
        """Transformers, which has written the checkpoint."""
        threads = os.cpu_count() or 1
        process = transformers(self.arguments.oracle, self.folder, threads, 1)
        hf = self._stack.enter_context(process)
        hf.ask()
        return hf

    @functools.cached_property
    def own(self) -> Pretrained:
        """The same weights, loaded by us."""
        assert self.hf
        own = from_pretrained(self.folder / "hf", dtype="float32")
        return dataclasses.replace(own, generation=GenerationDefaults())

    @functools.cached_property
    def nano(self) -> Pretrained:
        """The model that the package brings."""
        return from_pretrained("nano", dtype="float32")

    @functools.cached_property
    def engine(self) -> Engine:
        """An engine that has served all requests once."""
        engine = Engine(self.own, CONFIG)
        generate(engine, self.requests)
        return engine

    @functools.cached_property
    def url(self) -> str:
        """The address of a server that has done so too."""
        assert self.engine  # whose programs it uses
        url, _ = self._stack.enter_context(serving(self.own, config=CONFIG, name="bench"))
        asyncio.run(over_http(url, self.requests))
        return url

    def ours(self) -> float:
        """Return the seconds that all requests take."""
        return seconds(lambda: generate(self.engine, self.requests))


def beside_transformers(bench: Bench) -> dict[str, Any]:
    """E1: transformers in its best batches, found on the first requests, and ours, in turns."""
    quick, tried = bench.arguments.quick, {}
    kinds = [(16, None), (8, None)]
    if not quick:
        kinds = [(batch, cache) for batch in (16, 8, 4, 1) for cache in (None, "static")]
    for batch, cache in kinds:
        found = bench.hf.ask(batch=batch, cache=cache, count=TRIED)
        print(f"     batch {batch}, {cache or 'dynamic'} cache: {found}", flush=True)
        if "seconds" in found:
            tried[batch, cache] = found["seconds"][0]
    batch, cache = min(tried, key=tried.__getitem__)
    mine, theirs, count = [], [], len(bench.requests)
    assert bench.engine
    for turn in range(bench.rounds):
        mine.append(bench.ours())
        if count == TRIED:  # it has served all of them already
            theirs.append(tried[batch, cache])
        elif turn in (0, bench.rounds - 1):  # the long one, before ours and after
            theirs += bench.hf.ask(batch=batch, cache=cache, count=count)["seconds"]
            print(f"     ours {mine[-1]:.1f} s, transformers {theirs[-1]:.1f} s", flush=True)
    own, other = statistics.median(mine), statistics.median(theirs)
    return {
        "requests_per_s": count / own,
        "transformers": count / other,
        "times_as_fast": other / own,
        "its_batch": batch,
        "its_cache": cache or "dynamic",
    }


def through_http(bench: Bench) -> dict[str, Any]:
    """E2: the server beside the engine in turns, and requests at random moments."""
    url, requests = bench.url, bench.requests
    turns = [
        (bench.ours(), asyncio.run(over_http(url, requests))["seconds"])
        for _ in range(bench.rounds)
    ]
    rate = len(requests) / statistics.median(ours for ours, _ in turns)
    poisson = {
        f"at_{part:.0%}": asyncio.run(over_http(url, requests[:32], rate=part * rate))
        for part in ((0.8,) if bench.arguments.quick else (0.5, 0.8, 0.95))
    }
    return {
        "requests_per_s": len(requests) / statistics.median(http for _, http in turns),
        "times_as_long_as_the_engine": statistics.median(http / ours for ours, http in turns),
        **poisson,
    }


def static_batch(pretrained: Pretrained, prompt_BT: jax.Array, new: int) -> Callable[[], Any]:
    """Return a loop over one batch of equal lengths, with a cache of its own."""
    (rows, length), config = prompt_BT.shape, pretrained.config

    @jax.jit
    def read(model, tokens_BT, cache):
        hidden = model.encode(tokens_BT, cache=cache)
        return model.unembed(hidden.x_BTD[:, -1:])[:, 0].argmax(-1), hidden.cache

    step = jax.jit(read, donate_argnums=2)

    def run() -> jax.Array:
        cache = Cache.create(
            config.text, batch_size=rows, max_length=length + new, dtype=config.dtype
        )
        token_B, cache = read(pretrained.model, prompt_BT, cache)
        for _ in range(new - 1):
            token_B, cache = step(pretrained.model, token_B[:, None], cache)
        return token_B.block_until_ready()

    return run


def equal_lengths(bench: Bench) -> dict[str, Any]:
    """E3: the engine beside a static batch, where that is at its best; both read it in one step."""
    rows, length, new = (8, 64, 32) if bench.arguments.quick else (16, 128, 64)
    ids = np.random.default_rng(4).integers(3, 2000, (rows, length))
    loop = static_batch(bench.own, jnp.asarray(ids, jnp.int32), new)
    options = dataclasses.replace(GREEDY, max_new_tokens=new)
    equal = [Request(tokens=row, options=options) for row in ids.tolist()]
    config = dataclasses.replace(CONFIG, max_rows=rows, step_tokens=rows * length, loops=16)
    engine = Engine(bench.own, config)
    loop(), generate(engine, equal)
    turns = [(seconds(lambda: generate(engine, equal)), seconds(loop))
             for _ in range(2 * bench.rounds)]  # fmt: skip
    return {
        "tokens_per_s": rows * new / statistics.median(ours for ours, _ in turns),
        "static_batch": rows * new / statistics.median(loop for _, loop in turns),
        "times_as_long": statistics.median(ours / loop for ours, loop in turns),
    }


def figures(bench: Bench) -> dict[str, serve_report.Figure]:
    """Return how to measure each figure."""
    lengths = (8192, 8193, 32_768, 131_072, 1 << 20, 10_000_000)
    drafted = ROOT / "llama4_jax/serve/ngram.py"
    vllm = bench.arguments.vllm
    known: dict[str, serve_report.Figure] = {
        "E5": lambda: serve_figures.host_time(bench.nano),
        "E8": lambda: serve_figures.held_bytes(lengths),
        "E7": lambda: prefix_rules.compare(20 if bench.arguments.quick else 60),
        "E9": lambda: serve_figures.accepted(bench.nano, drafted),
        "E13": lambda: serve_figures.grammar_cost(bench.nano, rounds=bench.rounds),
        "E6": lambda: serve_figures.waits(bench.own, CONFIG, bench.requests),
        "E3": lambda: equal_lengths(bench),
        "E2": lambda: through_http(bench),
        "E1": lambda: beside_transformers(bench),
    }
    if vllm is not None:
        models = {"nano": bench.nano, "eight_layers": bench.own}
        known["E4"] = lambda: bench_peer.beside_vllm(vllm, models, bench.folder, bench.rounds)
    return known


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--oracle", type=pathlib.Path, default=ROOT / ".oracle/bin/python")
    parser.add_argument("--vllm", type=pathlib.Path, help="the Python that has vLLM, for E4")
    parser.add_argument("--part", default="", help="figures, between commas; all")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--quick", action="store_true", help="one round of fewer requests")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    if not arguments.oracle.is_file():
        parser.error(f"{arguments.oracle} is not there; `make bench-serve` makes it")
    about = {"cpu": cpu_name(), "threads": os.cpu_count(), "load_before": os.getloadavg()[0]}
    print(about | {"jax": jax.__version__, "Python": platform.python_version()}, flush=True)
    with contextlib.ExitStack() as stack:
        known = figures(Bench(arguments, stack))
        try:
            names = serve_report.wanted(arguments.part, list(known))
        except ValueError as error:
            parser.error(str(error))
        serve_report.tell({name: known[name] for name in names}, about, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
