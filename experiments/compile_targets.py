"""Compile Llama 4 Scout for accelerators that are not there, and print what each device needs.

    python -m experiments.compile_targets [--target=v5p] [--only=decode,train] [--layers=48]

The real compilers of TPU v5p and of 8 H100s (packages libtpu and jax[cuda13]; `make compile` brings
both) translate the steps of serving at full depth and a slice of training, from shapes alone. It
prints one line for each, and ends with status 1 if a program does not compile, does not fit the
device, needs more scratch memory than it should (a copied cache, a gathered weight), grows with the
depth of the model, or costs more because its experts are divided. Expect 60 GB of arguments and
under 1 GB of scratch for a decoding step of Scout on 4 chips of v5p, and minutes for each program.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator

import jax
from absl import flags

from experiments import compile_report as report
from experiments.benchmark import programs, topologies
from experiments.flags import FlagError, launch

SHALLOW = 8  # layers of the program that the full depth is compared with


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's flags."""
    flags.DEFINE_multi_enum(
        "target", list(programs.TARGETS), list(programs.TARGETS),
        "Accelerator to compile for; may be repeated.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "layers", 48, "Depth of the serving programs, a multiple of 4.",
        lower_bound=4, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list("only", [], "Names of the programs to compile; all.", flag_values=values)
    flags.DEFINE_string("output", None, "JSON file for the figures.", flag_values=values)
    flags.DEFINE_string("hlo", None, "Folder for the optimised programs.", flag_values=values)


def compile_one(
    target: topologies.Target, program: programs.Program, hlo: str | None
) -> report.Figures:
    """Compile a program and read its figures; keep its text if a folder is given."""
    lowered = programs.lower(program, target.devices(program.num_devices))
    start = time.monotonic()
    executable = lowered.compile()
    found = report.read(executable, seconds=time.monotonic() - start)
    if hlo:
        path = pathlib.Path(hlo) / f"{target.name}-{program.name}-{program.layers}.hlo"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(executable.as_text() or "", encoding="utf-8")
    return found


def wanted(values: flags.FlagValues, target: str) -> list[programs.Program]:
    """List the programs to compile for a target.

    Raises:
      FlagError: a name in --only is none of theirs, or --layers is not whole groups.
    """
    if values.layers % 4:
        raise FlagError(f"--layers={values.layers} must be a multiple of 4, a group of layers.")
    known = programs.programs(target, layers=values.layers)
    if values.layers > SHALLOW:
        known.insert(0, dataclasses.replace(known[0], name="decode-shallow", layers=SHALLOW))
    names = [program.name for program in known]
    for name in values.only:
        if name not in names:
            raise FlagError(f"--only={name} is no program; choose from {', '.join(names)}.")
    return [program for program in known if not values.only or program.name in values.only]


def run(values: flags.FlagValues, target: topologies.Target) -> Iterator[dict]:
    """Compile the programs of a target, print a line for each, and yield their records."""
    done: dict[str, report.Figures] = {}
    for program in wanted(values, target.name):
        record = {"target": target.name, **dataclasses.asdict(program)}
        try:
            found = done[program.name] = compile_one(target, program, values.hlo)
        except jax.errors.JaxRuntimeError as error:  # out of memory, or beyond the compiler
            yield {**record, "faults": [str(error)[:500]]}
            continue
        print(report.line(target, program, found), flush=True)
        complaints = list(report.faults(target, program, found))
        if program.name == "decode" and "decode-shallow" in done:
            complaints += report.growth(found, done["decode-shallow"])
        if program.name == "train-expert" and "train" in done:
            complaints += report.dearer(found, done["train"])
        yield {**record, "figures": dataclasses.asdict(found), "faults": complaints}


def main(values: flags.FlagValues) -> None:
    """Compile, print, judge."""
    targets = [topologies.TARGETS[name] for name in dict.fromkeys(values.target)]
    for target in targets:
        wanted(values, target.name)
    topologies.prepare()
    print(report.HEADER)
    records = []
    for target in targets:
        for record in run(values, target):
            records.append(record)
            for fault in record["faults"]:
                print(f"FAULT {record['target']} {record['name']}: {fault}", flush=True)
    print(report.NOTES)
    if values.output:
        stamp = {"date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, "programs": records}
        pathlib.Path(values.output).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    count = sum(bool(record["faults"]) for record in records)
    if count:
        raise ValueError(f"{count} of {len(records)} programs have faults; see above.")


if __name__ == "__main__":
    launch(define_flags, main)
