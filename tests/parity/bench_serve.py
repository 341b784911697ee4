"""Time the engine and the server on this CPU: `make bench-serve` prints a table.

The model is the 8-layer one of `make bench-hf`; 64 mixed requests (prompts of 16 to 1024 tokens,
answers of 8 to 256) go through transformers' `generate` in batches, through the engine, and through
HTTP, in turns. Then what a step costs the host, what is compiled after warming up, what a request
holds of the cache, how many drafts are right, and what a grammar costs. Ten minutes on two cores
that nobody else uses; --quick is a rough look.
"""

import argparse
import asyncio
import dataclasses
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import bench_case
import httpx
import jax
import jax.numpy as jnp
import numpy as np
from bench import ROOT, cpu_name, transformers

from experiments.benchmark.report import write_json
from llama4_jax import from_pretrained
from llama4_jax.pretrained import GenerationDefaults, Pretrained
from llama4_jax.serve import Engine, EngineConfig, Options, Request, generate, ngram, programs
from llama4_jax.serve.requests import read_requests
from tests.server.live import serving

CONFIG = EngineConfig(max_rows=32, step_tokens=512, max_context=1280, keep_prefixes=False)
GREEDY = Options(temperature=0, ignore_eos=True)


def seconds(run: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def mixed() -> list[Request]:
    """Return the mixed requests."""
    return [
        Request(tokens=prompt, options=dataclasses.replace(GREEDY, max_new_tokens=new))
        for prompt, new in bench_case.mixed_requests()
    ]


def offline(pretrained: Pretrained, prompt_BT: jax.Array, new: int) -> Callable[[], jax.Array]:
    """Return a loop over one batch of equal lengths, with a cache of its own: the peer of E3."""
    rows, length = prompt_BT.shape

    @jax.jit
    def read(model, tokens_BT, cache):
        hidden = model.encode(tokens_BT, cache=cache)
        return model.unembed(hidden.x_BTD[:, -1:])[:, 0].argmax(-1), hidden.cache

    step = jax.jit(read, donate_argnums=2)

    def run() -> jax.Array:
        from llama4_jax import Cache

        config = pretrained.config
        cache = Cache.create(
            config.text, batch_size=rows, max_length=length + new, dtype=config.dtype
        )
        token_B, cache = read(pretrained.model, prompt_BT, cache)
        for _ in range(new - 1):
            token_B, cache = step(pretrained.model, token_B[:, None], cache)
        return token_B.block_until_ready()

    return run


async def over_http(url: str, requests: list[Request], rate: float | None) -> dict[str, float]:
    """Send all requests, at once or at random moments at a rate a second; return seconds."""
    draw, started, firsts = np.random.default_rng(3), time.perf_counter(), []
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def one(request: Request, after: float) -> None:
            await asyncio.sleep(after)
            sent = time.perf_counter()
            body = {
                "prompt": request.tokens, "max_tokens": request.options.max_new_tokens,
                "temperature": 0, "ignore_eos": True, "stream": True,
            }  # fmt: skip
            async with client.stream("POST", "/v1/completions", json=body) as response:
                first = None
                async for line in response.aiter_lines():
                    if first is None and line.startswith("data: {"):
                        first = time.perf_counter() - sent
            firsts.append(first)

        gaps = (
            np.zeros(len(requests)) if rate is None else draw.exponential(1 / rate, len(requests))
        )
        await asyncio.gather(*map(one, requests, np.cumsum(gaps).tolist()))
    return {
        "seconds": time.perf_counter() - started,
        "p50_first": float(np.quantile(firsts, 0.5)),
        "p99_first": float(np.quantile(firsts, 0.99)),
    }


def host_time(pretrained: Pretrained, rows: int = 64) -> float:
    """Return the host's milliseconds of a decoding step of so many rows, with no device work."""
    config = EngineConfig(max_rows=rows, step_tokens=512, max_context=512)
    engine = Engine(pretrained, config)
    requests = [Request(tokens=[5 + i, 6, 7]) for i in range(rows)]
    for prompt in read_requests(pretrained, requests):
        engine.submit(prompt, dataclasses.replace(GREEDY, max_new_tokens=200))
    for _ in range(20):
        engine.step()
    kept = {}

    def replay(name: str) -> None:
        real = getattr(programs, name)

        def fake(*args, **kwargs):
            if name not in kept:
                kept[name] = real(*args, **kwargs)
                jax.block_until_ready(kept[name])
            return kept[name]

        setattr(programs, name, fake)

    real = programs.read_tokens, programs.draw_tokens
    replay("read_tokens")
    replay("draw_tokens")
    try:
        engine.step()
        times = [seconds(engine.step) for _ in range(100)]
    finally:
        programs.read_tokens, programs.draw_tokens = real
    return statistics.median(times) * 1e3


def held_bytes(pretrained: Pretrained) -> list[tuple[int, int, int]]:
    """Return (tokens, bytes that a request of so many holds, bytes by the closed form)."""
    engine = Engine(pretrained, dataclasses.replace(CONFIG, max_rows=1))
    layout, text = engine.scheduler.layout, pretrained.config.text
    from llama4_jax.cache.paged import page_bytes

    of_whole, of_chunk = page_bytes(
        text, page_size=layout.page_size, dtype="float32", kv_cache="auto"
    )
    found = []
    for tokens in (100, 500, 1000):
        (prompt,) = read_requests(pretrained, [Request(tokens=[5] * tokens)])
        number = engine.submit(prompt, dataclasses.replace(GREEDY, max_new_tokens=8))
        for _ in range(4):
            engine.step()
        pools = engine.scheduler.whole.held, engine.scheduler.chunk.held
        pages = -(-(tokens + 8) // layout.page_size)
        closed = pages * (of_whole + of_chunk)  # all in one chunk of 8192
        found.append((tokens, pools[0] * of_whole + pools[1] * of_chunk, closed))
        engine.cancel(number)
        while engine.is_busy:
            engine.step()
    return found


def accepted(nano: Pretrained) -> tuple[float, float]:
    """Return drafted tokens that were right a step on code: ours, and by vLLM's rule."""
    text = (ROOT / "llama4_jax/serve/ngram.py").read_text("utf-8")
    config = EngineConfig(max_rows=1, step_tokens=512, max_context=2048, speculate="ngram")
    engine = Engine(nano, config)
    request = Request(prompt=text[:1500], options=dataclasses.replace(GREEDY, max_new_tokens=200))
    (answer,) = generate(engine, request)
    ours = engine.counters.accepted / max(engine.counters.steps, 1)
    (prompt,) = read_requests(nano, [request])
    whole = [*prompt.tokens_T.tolist(), *answer.tokens]

    def theirs(
        history: list[int],
    ) -> list[int]:  # the longest of the last 5 that stood before, 5 on
        for size in range(5, 0, -1):
            tail = history[-size:]
            for start in range(len(history) - size - 1, -1, -1):
                if history[start : start + size] == tail:
                    return history[start + size : start + size + 5]
        return []

    place, steps, right = len(prompt.tokens_T), 0, 0
    while place < len(whole):
        steps, count = steps + 1, 0
        for draft in theirs(whole[:place]):
            if place + count >= len(whole) or whole[place + count] != draft:
                break
            count += 1
        right += count
        place += count + 1
    return ours, right / steps


def grammar_cost(nano: Pretrained) -> float:
    """Return how many times as long 8 rows take with a grammar as without."""
    engine = Engine(nano, EngineConfig(max_rows=8, step_tokens=256, max_context=512))
    prompts = ["import os\n"] * 8
    free = dataclasses.replace(GREEDY, max_new_tokens=100)
    bound = dataclasses.replace(free, regex="(.|\n)*")
    times: dict[str, list[float]] = {"free": [], "bound": []}
    for _ in range(4):
        for name, options in (("free", free), ("bound", bound)):
            times[name].append(
                seconds(lambda options=options: generate(engine, prompts, options=options))
            )
    return statistics.median(times["bound"][1:]) / statistics.median(times["free"][1:])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--oracle", type=pathlib.Path, default=ROOT / ".oracle/bin/python")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--quick", action="store_true", help="one round, transformers at batch 8")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    if not arguments.oracle.is_file():
        parser.error(f"{arguments.oracle} is not there; `make bench-serve` makes it")
    rounds, threads = 1 if arguments.quick else arguments.rounds, os.cpu_count() or 1
    load, figures = [os.getloadavg()[0]], {}
    with tempfile.TemporaryDirectory() as name:
        folder, requests = pathlib.Path(name), mixed()
        with transformers(arguments.oracle, folder, threads, 8) as hf:
            hf.ask()
            own = from_pretrained(folder / "hf", dtype="float32")
            own = dataclasses.replace(own, generation=GenerationDefaults())
            engine = Engine(own, CONFIG)
            generate(engine, requests)  # warms up
            compiled = engine.device.catalogue.compilations
            theirs: dict[str, list[float]] = {}
            ours: list[float] = []
            served: list[float] = []
            kinds = [(8, None)] if arguments.quick else [(b, c) for b in (1, 4, 8, 16)
                                                          for c in (None, "static")]  # fmt: skip
            tried = {}
            for batch, cache in kinds:
                found = hf.ask(batch=batch, cache=cache)
                print(
                    f"transformers, batch {batch}, {cache or 'dynamic'} cache: {found}", flush=True
                )
                if "seconds" in found:
                    tried[batch, cache] = found["seconds"][0]
            batch, cache = min(tried, key=tried.__getitem__)
            with serving(own, config=CONFIG, name="bench") as (url, _):
                asyncio.run(over_http(url, requests, None))
                for _ in range(rounds):
                    ours.append(seconds(lambda: generate(engine, requests)))
                    served.append(asyncio.run(over_http(url, requests, None))["seconds"])
                    theirs.setdefault("generate", []).extend(
                        hf.ask(batch=batch, cache=cache)["seconds"]
                    )
                rate = len(requests) / statistics.median(ours)
                poisson = {
                    part: asyncio.run(over_http(url, requests, part * rate))
                    for part in ((0.8,) if arguments.quick else (0.5, 0.8, 0.95))
                }
        mine, other = statistics.median(ours), statistics.median(theirs["generate"])
        figures["E1"] = {
            "ours_requests_per_s": rate, "transformers_requests_per_s": len(requests) / other,
            "times_as_fast": other / mine, "their_batch": batch, "their_cache": cache or "dynamic",
        }  # fmt: skip
        figures["E2"] = {"over_http": statistics.median(served) / mine, "poisson": poisson}
        prompt_BT = jnp.asarray(np.random.default_rng(4).integers(3, 2000, (16, 128)), jnp.int32)
        loop = offline(own, prompt_BT, 64)
        loop()
        equal = [
            Request(tokens=row, options=dataclasses.replace(GREEDY, max_new_tokens=64))
            for row in prompt_BT.tolist()
        ]
        generate(engine, equal)
        turns = [
            (seconds(lambda: generate(engine, equal)), seconds(loop)) for _ in range(rounds + 2)
        ]
        figures["E3"] = {"engine_over_static_batch": statistics.median(a / b for a, b in turns)}
        figures["E5"] = {"host_ms_per_step_of_64_rows": host_time(own)}
        figures["E6"] = {
            "compiled_after_warming_up": engine.device.catalogue.compilations - compiled
        }
        figures["E8"] = {"tokens_bytes_closed_form": held_bytes(own)}
        nano = from_pretrained("nano", dtype="float32")
        mean, rule = accepted(nano)
        figures["E9"] = {"right_drafts_a_step": mean, "by_vllms_rule": rule}
        figures["E13"] = {"with_grammar_over_without": grammar_cost(nano)}
    load.append(os.getloadavg()[0])
    print(f"{cpu_name()}, {threads} threads, load {load[0]:.1f} before and {load[1]:.1f} after;",
          f"jax {jax.__version__}, Python {platform.python_version()}")  # fmt: skip
    for name, values in figures.items():
        print(f"{name:4} {values}")
    if arguments.output:
        about = {
            "cpu": cpu_name(),
            "threads": threads,
            "load": load,
            "longest_draft": ngram.LONGEST,
        }
        write_json(arguments.output, {**about, **figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
