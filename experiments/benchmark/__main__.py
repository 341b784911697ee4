"""Time the kernels on the device at hand, or compile them for chips that are not there.

    python -m experiments.benchmark --suite=kernels [--shapes=scout_chunk_32k] [--output=F.json]
    python -m experiments.benchmark --suite=compile [--target=v5p] [--output=F.json]
    python -m experiments.benchmark --suite=kernels --tune

The kernels suite checks each operation against the reference and prints its time, its rates, the
share of what the device could do, and how it compares with others in the same run: on a CPU the
reference itself on nano's shapes, two minutes. `--tune` first measures block sizes and keeps the
best in kernels_pallas/tuning. The compile suite prints FLOPs, bytes and memory against the floor,
splash attention and megablox, then those of experts divided over slices; `make kernels` brings its
compilers. A wrong result, a program that fails or is beyond its bounds end it with status 1.
"""

from typing import Any

import jax
from absl import flags

from experiments.benchmark import cases, compile_kernels, report, sharded_experts, timing, tune
from experiments.benchmark.topologies import TARGETS, prepare
from experiments.launch import FlagError, launch


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's flags."""
    flags.DEFINE_enum(
        "suite", None, ["kernels", "compile"],
        "kernels times them on this device; compile compiles them for others.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list(
        "shapes", [], "Names from kernels_pallas/shapes; all, on a CPU those of nano.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_multi_enum(
        "target", list(compile_kernels.CHIPS), list(TARGETS),
        "Chip to compile for; may be repeated.", flag_values=values,
    )  # fmt: skip
    backends = ["reference", "tpu", "gpu"]
    flags.DEFINE_enum("backend", None, backends, "To time; the device's.", flag_values=values)
    flags.DEFINE_bool("tune", False, "Measure block sizes first.", flag_values=values)
    flags.DEFINE_string("output", None, "JSON file for the figures.", flag_values=values)


def chosen_cases(names: list[str], *, small: bool) -> list[cases.Case]:
    """List the cases of the names in --shapes; a FlagError if there are none."""
    try:
        return cases.cases(names, small=small)
    except ValueError as error:
        raise FlagError(f"--shapes: {error}.") from error


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
    platform = jax.default_backend()
    check_backend(values, platform)
    chosen = chosen_cases(values.shapes, small=platform == "cpu")
    here = timing.machine()
    print(report.machine_line(here), flush=True)
    if values.tune:
        for told in tune.tune(chosen, here.platform):
            print(told, flush=True)
    print(report.TIMES_HEADER)
    records = []
    for case in chosen:
        for record in timing.measure(case, here, values.backend):
            records.append(record)
            print("\n".join([report.times_line(record), *report.fault_lines(record)]), flush=True)
    print(report.TIMES_NOTES)
    stamp = {"device": here.kind, "copy_bytes_per_second": here.copying}
    return {**stamp, "shapes": {case.shape: case.sizes for case in chosen}, "records": records}


def run_compile(values: flags.FlagValues) -> dict[str, Any]:
    """Compile the kernels, and experts divided over slices, for chips that are not there."""
    prepare()
    targets = [TARGETS[name] for name in dict.fromkeys(values.target)]
    divided = [name for name in values.shapes if name in sharded_experts.NAMES]
    others = [name for name in values.shapes if name not in divided]
    parts = []
    if others or not divided:
        parts.append(compile_kernels.run(chosen_cases(others, small=False), targets))
    if divided or not others:
        parts.append(sharded_experts.run(divided, targets))
    return report.together(parts)


def main(values: flags.FlagValues) -> None:
    """Run a suite, keep its figures, judge."""
    if values.suite is None:
        raise FlagError("give --suite=kernels or --suite=compile.")
    found = {"kernels": run_kernels, "compile": run_compile}[values.suite](values)
    if values.output:
        report.write_json(values.output, {"suite": values.suite, **found})
    count = sum(bool(record["faults"]) for record in found["records"])
    if count:
        raise ValueError(f"{count} of {len(found['records'])} have faults; see above.")


if __name__ == "__main__":
    launch(define_flags, main)
