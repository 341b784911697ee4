"""Figures of the engine alone: its host time, its waits, its pages, its drafts, its grammars."""

import contextlib
import dataclasses
import pathlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.cache.paged import page_bytes
from llama4_jax.config.families import scout
from llama4_jax.pretrained import Pretrained
from llama4_jax.serve import Engine, EngineConfig, Options, Request, generate, ngram, programs
from llama4_jax.serve.pages import PageNames
from llama4_jax.serve.plan import Choice, Numbers
from llama4_jax.serve.requests import read_requests
from llama4_jax.serve.scheduler import MAX_DRAFTS, Scheduler
from llama4_jax.serve.warm import foreseen, warm

GREEDY = Options(temperature=0, ignore_eos=True)


def seconds(run: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# -------------------------------------------------------------------------------- E5: host time


@contextlib.contextmanager
def no_device_work() -> Iterator[None]:
    """Let every step's programs return at once, without a compilation, and draw token 0."""
    zeros: dict[int, jax.Array] = {}

    def drawn(count: int) -> programs.Drawn:
        if count not in zeros:
            zeros[count] = jnp.zeros(count, jnp.int32)
        return programs.Drawn(zeros[count], None, None)

    def read_tokens(leaves, state, token_S, ints_BX, *, structure, shape):
        count = shape.rows * (shape.tokens if shape.every else 1)
        places = drawn(count).token_R
        return state, programs.Read(places, places, places, None)

    def draw_tokens(leaves, token_S, read, rows, *more, structure, top):
        return token_S, drawn(len(read.rows_R))

    def loop_tokens(leaves, state, token_S, ints_BX, rows, *, structure, shape, loops):
        return state, token_S, drawn(shape.rows * loops)

    fakes = {f.__name__: f for f in (read_tokens, draw_tokens, loop_tokens)}
    with mock.patch.multiple(programs, **fakes):
        yield


def host_time(pretrained: Pretrained, *, rows: int = 64, steps: int = 100) -> dict[str, float]:
    """Return the host's milliseconds of a decoding step, and of a request that is admitted."""
    config = EngineConfig(max_rows=rows, step_tokens=512, max_context=steps + 28, loops=1)
    admitted, stepped = [], []
    with no_device_work():
        for turn in range(3):
            engine = Engine(pretrained, config)
            requests = [Request(tokens=[5 + i, 6, 7 + turn]) for i in range(rows)]
            prompts = read_requests(pretrained, requests)
            options = dataclasses.replace(GREEDY, max_new_tokens=steps + 20)

            def admit(engine=engine, prompts=prompts, options=options) -> None:
                for prompt in prompts:
                    engine.submit(prompt, options)
                while engine.scheduler.waiting or not engine.scheduler.running:
                    engine.step()

            admitted.append(seconds(admit) / rows)
            for _ in range(10):
                engine.step()
            stepped += [seconds(engine.step) for _ in range(steps)]
    return {
        "host_ms_per_step_of_64_rows": statistics.median(stepped) * 1e3,
        "host_ms_per_admitted_request": statistics.median(admitted) * 1e3,
    }


# ------------------------------------------------------------- E6: compilations, and idle devices


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Give a list of what XLA compiles in this thread meanwhile."""
    found: list[str] = []
    thread = threading.current_thread()

    def listen(event: str, _: float, **about: Any) -> None:
        is_ours = threading.current_thread() is thread
        if is_ours and event == "/jax/core/compile/backend_compile_duration":
            found.append(str(about.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def waits(
    pretrained: Pretrained, config: EngineConfig, requests: Sequence[Request]
) -> dict[str, Any]:
    """Serve as a warm server does; count compilations of steps, and those that let devices stand.

    A step that only reads what earlier ones drew returns while its own work is under way; if the
    device has done it, the host was too late or waited for it.
    """
    newest: list[jax.Array] = []
    steps = waited = 0

    def noting(name: str) -> Callable:
        real = getattr(programs, name)

        def noted(*args, **kwargs):
            found = real(*args, **kwargs)
            newest[:] = [found[-1].token_R]
            return found

        noted.lower = real.lower  # which the compiling thread calls
        return noted

    fakes = {name: noting(name) for name in ("draw_tokens", "loop_tokens")}
    engine = Engine(pretrained, config)
    warm(engine)
    engine.compile_beside(foreseen(engine))
    left = len(requests)
    with mock.patch.multiple(programs, **fakes), compilations() as compiled:
        for prompt, request in zip(read_requests(pretrained, requests), requests, strict=True):
            engine.submit(prompt, request.options or GREEDY)
        while left and engine.wait():
            newest.clear()
            left -= sum(event.finish_reason is not None for event in engine.step())
            if newest and left:
                steps += 1
                waited += newest[0].is_ready()
    engine.close()
    return {"compiled": compiled, "steps": steps, "steps_that_waited": waited}


# ----------------------------------------------------------------------------- E8: bytes held


def held_bytes(lengths: Sequence[int]) -> dict[str, tuple[int, int, float]]:
    """Return what the allocator holds of Scout in bfloat16 after so many tokens were read.

    Returns:
      By tokens: bytes; bytes by the closed form, 49,152 for each token in layers that see
      everything and 147,456 for each of the current chunk; and how many times as many all 48
      layers would take.
    """
    model, found = scout(), {}
    config = EngineConfig(max_rows=1, step_tokens=8192, cache_bytes=10**12)
    layout = config.layout(model)
    of_whole, of_chunk = page_bytes(model.text, page_size=layout.page_size, dtype="bfloat16")
    each = of_whole // layout.page_size, of_chunk // layout.page_size
    for n in lengths:
        scheduler = Scheduler(layout, max_rows=1, step_tokens=config.step_tokens)
        prompt = np.arange(n, dtype=np.int32)
        names = PageNames(layout.page_size)
        choice = Choice(number=0, tokens=Numbers(prompt), prompt=n, limit=n + 2, names=names)
        scheduler.add(choice)
        while not choice.pending:
            scheduler.plan()
        bytes_ = scheduler.whole.held * of_whole + scheduler.chunk.held * of_chunk
        closed = each[0] * n + each[1] * ((n - 1) % layout.chunk_size + 1)
        found[f"{n:,}"] = bytes_, closed, sum(each) * n / bytes_
    return found


# ---------------------------------------------------------------------------- E9: right drafts


def by_peers_rule(history: Sequence[int], *, sizes: Sequence[int], most: int, last: bool):
    """Draft what followed the longest of these n-grams where it stood first, or last."""
    for size in sorted(sizes, reverse=True):
        tail = list(history[-size:])
        places = range(len(history) - size)
        for start in reversed(places) if last else places:
            if list(history[start : start + size]) == tail:
                return list(history[start + size : start + size + most])
    return []


def right_drafts(
    whole: Sequence[int], prompt: int, draft: Callable[[Sequence[int]], Sequence[int]]
) -> float:
    """Count the drafted tokens that are right in each step from the prompt to the end."""
    place, steps, right = prompt + 1, 0, 0  # the first token comes with the prompt
    while place < len(whole):
        count = 0
        for token in draft(whole[:place]):
            if place + count >= len(whole) or whole[place + count] != token:
                break
            count += 1
        steps, right, place = steps + 1, right + count, place + count + 1
    return right / max(steps, 1)


def accepted(nano: Pretrained, text: pathlib.Path, *, new: int = 200) -> dict[str, float]:
    """Return how many drafted tokens of a step were right on code: ours, and by vLLM's rule.

    vLLM's is taken as it comes, n-grams of 5 tokens and 5 drafts, and with n-grams of 5 down to 1;
    from either end, the better one.
    """
    config = EngineConfig(max_rows=1, step_tokens=512, max_context=2048, speculate="ngram")
    engine = Engine(nano, config)
    options = dataclasses.replace(GREEDY, max_new_tokens=new)
    request = Request(prompt=text.read_text("utf-8")[:1500], options=options)
    (answer,) = generate(engine, request)
    (prompt,) = read_requests(nano, [request])
    whole = [*prompt.tokens_T.tolist(), *answer.tokens]
    right = engine.counters.accepted

    def theirs(*sizes: int) -> float:
        def draft(history: Sequence[int], last: bool) -> Sequence[int]:
            return by_peers_rule(history, sizes=sizes, most=5, last=last)

        start = len(prompt.tokens_T)
        return max(right_drafts(whole, start, lambda h, e=e: draft(h, e)) for e in (False, True))

    return {
        "right_drafts_a_step": right / max(len(answer.tokens) - 1 - right, 1),
        "by_vllms_rule": theirs(5),
        "by_it_with_1_to_5": theirs(1, 2, 3, 4, 5),
        "longest_draft": MAX_DRAFTS,
        "longest_ngram": ngram.LONGEST,
    }


# ---------------------------------------------------------------------- E13: what a grammar costs


def grammar_cost(nano: Pretrained, *, rounds: int, new: int = 100) -> dict[str, float]:
    """Return the milliseconds of a step of 8 rows with a grammar and without."""
    engine = Engine(nano, EngineConfig(max_rows=8, step_tokens=256, max_context=512, loops=1))
    free = dataclasses.replace(GREEDY, max_new_tokens=new)
    ways = {"free": free, "bound": dataclasses.replace(free, regex="(.|\n){1000,}")}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1 + rounds):
        for name, options in ways.items():
            before = engine.counters.steps
            start = time.perf_counter()
            generate(engine, ["import os\n"] * 8, options=options)
            spent = time.perf_counter() - start
            if turn:  # the first one compiles
                times[name].append(spent / (engine.counters.steps - before) * 1e3)
    bound, without = (statistics.median(times[name]) for name in ("bound", "free"))
    return {
        "ms_a_step_with_grammar": bound,
        "ms_a_step_without": without,
        "with_over_without": bound / without,
    }
