"""Measure block sizes on the device at hand, and keep the best for its chip."""

import collections
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from experiments.benchmark.cases import Case, one_pass
from experiments.benchmark.report import write_json
from experiments.benchmark.timing import seconds
from kernels_pallas import tuning


def tune(cases: list[Case], platform: str, folder: pathlib.Path = tuning.FOLDER) -> Iterator[str]:
    """Try the candidates of each case and write the chip's file, keeping what was not tried.

    Shapes that the kernels do not tell apart share an entry: the sizes with the least time,
    relative to the best of each shape, on geometric average.

    Yields:
      A line for each pass that was tried.
    """
    chip = tuning.chip(jax.devices()[0].device_kind)
    # Of what a kernel tells apart: of each choice of sizes: of each shape, seconds.
    times: dict[str, dict[str, dict[str, float]]] = {}
    for case in cases:
        arrays = jax.jit(case.build)(jax.random.key(0))
        for direction in case.floors:
            tried = _try(case, direction, platform, arrays)
            for key, choice, spent in tried:
                of_choice = times.setdefault(key, {}).setdefault(choice, {})
                of_choice[case.shape] = spent
            if tried:
                _, choice, spent = min(tried, key=lambda each: each[2])
                yield f"{case.operation} {direction} {case.shape}: {spent * 1e6:.1f} us {choice}"
    entries = [entry for key, choices in times.items() for entry in _best(key, choices)]
    path = folder / f"{chip}.json"
    old = json.loads(path.read_text("utf-8"))["entries"] if path.exists() else []
    new = {_identity(entry) for entry in entries}
    entries += [entry for entry in old if _identity(entry) not in new]
    write_json(path, {"chip": chip, "entries": entries})
    tuning._table.cache_clear()


def _identity(entry: dict[str, Any]) -> str:
    return json.dumps([entry["operation"], entry["shape"]], sort_keys=True)


def _try(case: Case, direction: str, platform: str, arrays: Any) -> list[tuple[str, str, float]]:
    """Time each candidate that runs: what the kernels tell apart, the sizes, seconds."""
    found = []
    for candidate in case.candidates(direction, platform):
        way = one_pass(
            lambda **given: case.function(**given, backend=platform), case.wrt, direction
        )
        try:
            with tuning.overridden(candidate), tuning.recorded() as used:
                spent = seconds(way.run, way.prepare(arrays))
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError):
            continue  # too large for this chip
        shapes = {name: used[name]["shape"] for name in candidate if name in used}
        if shapes:
            found.append((json.dumps(shapes, sort_keys=True), json.dumps(candidate), spent))
    return found


def _best(key: str, choices: dict[str, dict[str, float]]) -> Iterator[dict[str, Any]]:
    """Yield the entries of the choice that is best on average over the shapes."""
    least: dict[str, float] = collections.defaultdict(lambda: math.inf)
    for times in choices.values():
        for shape, spent in times.items():
            least[shape] = min(least[shape], spent)
    complete = {choice: times for choice, times in choices.items() if len(times) == len(least)}
    if not complete:
        return

    def loss(choice: str) -> float:
        return sum(math.log(spent / least[shape]) for shape, spent in complete[choice].items())

    best = min(complete, key=loss)
    blocks = json.loads(best)
    for operation, shape in json.loads(key).items():
        yield {
            "operation": operation,
            "shape": shape,
            "blocks": blocks[operation],
            "seconds": complete[best],
        }
