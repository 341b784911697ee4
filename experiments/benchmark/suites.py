"""The suites of `experiments.benchmark`: kernels here, whole models, what compilers say."""

import tempfile
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
from absl import flags

from experiments.benchmark import (
    bundles,
    cases,
    compile_kernels,
    end_to_end,
    report,
    sharded_experts,
    timing,
    tune,
)
from experiments.benchmark.topologies import TARGETS, prepare
from experiments.launch import FlagError


def chosen_cases(names: list[str], *, small: bool) -> list[cases.Case]:
    """List the cases of the names in --shapes; a FlagError if there are none."""
    try:
        return cases.cases(names, small=small)
    except ValueError as error:
        raise FlagError(f"--shapes: {error}.") from error


def chosen_actions(names: list[str]) -> list[timing.Action]:
    """Return what --do asks for; a FlagError if a name is unknown or there is none."""
    known = get_args(timing.Action)
    for name in names:
        if name not in known:
            raise FlagError(f"--do={name} is unknown; choose from {', '.join(known)}.")
    if not names:
        raise FlagError(f"--do is empty; choose from {', '.join(known)}.")
    return [name for name in known if name in names]


def check_backend(values: flags.FlagValues, platform: str) -> None:
    """Refuse, with a FlagError, to time what would be simulated here."""
    if values.backend not in (None, "reference", platform):
        raise FlagError(
            f"--backend={values.backend}: this device is a {platform.upper()}, where those kernels "
            "run in an interpreter, whose time says nothing; leave the flag out."
        )
    if values.tune and (platform == "cpu" or values.backend == "reference"):
        raise FlagError("--tune measures block sizes of kernels, and here only the reference runs.")


def run_kernels(values: flags.FlagValues) -> dict[str, Any]:
    """Time the kernels on this device."""
    actions = chosen_actions(values.do)
    platform = jax.default_backend()
    check_backend(values, platform)
    chosen = chosen_cases(values.shapes, small=platform == "cpu")
    here = timing.machine(times_copies="time" in actions)
    print(report.machine_line(here), flush=True)
    if values.tune:
        for told in tune.tune(chosen, here.platform):
            print(told, flush=True)
    records = (r for case in chosen for r in timing.measure(case, here, values.backend, actions))
    shown = report.TIMES.show(report.appended(values.records, here.kind, records))
    stamp = {"device": here.kind, "copy_bytes_per_second": here.copying}
    return {**stamp, "shapes": {case.shape: case.sizes for case in chosen}, "records": shown}


def run_nano(values: flags.FlagValues) -> dict[str, Any]:
    """Run whole models with kernels and without; those named in --shapes, if any are."""
    here = timing.machine()
    for name in values.shapes:
        if name not in end_to_end.NAMES:
            raise FlagError(f"--shapes={name} is none of {', '.join(end_to_end.NAMES)}.")
    names = values.shapes or [n for n in end_to_end.NAMES if n == "nano" or here.platform != "cpu"]
    print(report.machine_line(here), flush=True)
    records = report.appended(values.records, here.kind, end_to_end.records(here, names))
    return {"device": here.kind, "records": report.TIMES.show(records)}


def run_compile(values: flags.FlagValues) -> dict[str, Any]:
    """Compile the kernels, and experts divided over slices, for chips that are not there."""
    prepare()
    targets = [TARGETS[name] for name in dict.fromkeys(values.target)]
    divided = [name for name in values.shapes if name in sharded_experts.NAMES]
    others = [name for name in values.shapes if name not in divided]
    sizes: dict[str, Any] = {}
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as schedules:
        bundles.write_to(schedules)
        if others or not divided:
            chosen = chosen_cases(others, small=False)
            sizes |= {case.shape: case.sizes for case in chosen}
            found = compile_kernels.records(chosen, targets, schedules)
            records += compile_kernels.TABLE.show(found)
        if divided or not others:
            sizes |= sharded_experts.sizes(divided)
            records += sharded_experts.TABLE.show(sharded_experts.records(divided, targets))
    return {"shapes": sizes, "records": records}


SUITES: Mapping[str, Callable[[flags.FlagValues], dict[str, Any]]] = {
    "kernels": run_kernels,
    "compile": run_compile,
    "nano": run_nano,
}
