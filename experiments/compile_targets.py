"""Compile Llama 4 Scout for accelerators that are not there, and print what each device needs.

    python -m experiments.compile_targets [--target=v5p] [--only=decode,train] [--layers=48]

The real compilers of TPU v5p and of 8 H100s (packages libtpu and jax[cuda13]; `make compile` brings
both) translate the steps of serving at full depth and a slice of training, from shapes alone. It
prints one line for each, and ends with status 1 if a program does not compile, does not fit the
device, needs more scratch memory than it should (a gathered weight), copies pages of the cache,
moves more than the weights hit and the cache read where it draws a token, grows with the depth of
the model, or costs more because its experts are divided. Expect 60 GB of arguments and under 1 GB
of scratch for a decoding step of Scout on 4 chips of v5p, and minutes for each program.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments.benchmark.names import PROGRAM_CHIPS
from experiments.launch import FlagError, launch

if TYPE_CHECKING:
    from experiments.benchmark import programs, topologies


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's flags."""
    flags.DEFINE_multi_enum(
        "target", PROGRAM_CHIPS, PROGRAM_CHIPS,
        "Accelerator to compile for; may be repeated.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "layers", 48, "Depth of the serving programs, a multiple of 4.",
        lower_bound=4, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list("only", [], "Names of the programs to compile; all.", flag_values=values)
    flags.DEFINE_string("output", None, "JSON file for the figures.", flag_values=values)
    flags.DEFINE_string("hlo", None, "Folder for the optimised programs.", flag_values=values)


def wanted(values: flags.FlagValues, target: str) -> "list[programs.Program]":
    """List the programs to compile for a target.

    Raises:
      FlagError: a name in --only is none of theirs, or --layers is not whole groups.
    """
    from experiments.benchmark import programs

    if values.layers % 4:
        raise FlagError(f"--layers={values.layers} must be a multiple of 4, a group of layers.")
    known = programs.programs(target, layers=values.layers)
    names = [program.name for program in known]
    for name in values.only:
        if name not in names:
            raise FlagError(f"--only={name} is no program; choose from {', '.join(names)}.")
    return [program for program in known if not values.only or program.name in values.only]


def compiled(values: flags.FlagValues, target: "topologies.Target") -> Iterator[dict[str, Any]]:
    """Compile the programs of a target and yield their records."""
    from experiments.benchmark import figures, programs

    seen: dict[str, figures.Figures] = {}
    for program in wanted(values, target.name):
        record = {"target": target.name, **dataclasses.asdict(program), "faults": []}
        devices = target.devices(program.num_devices)
        text = f"{target.name}-{program.name}-{program.layers}.hlo"
        try:
            traced = programs.trace(program, devices)
            found = figures.compile_traced(traced, values.hlo and pathlib.Path(values.hlo, text))
        except figures.FAILURES as error:
            yield figures.failed(record, error)
            continue
        faults = list(programs.judge(program, target, found, seen))
        seen[program.name] = found
        yield {**record, "figures": dataclasses.asdict(found), "faults": faults}


def main(values: flags.FlagValues) -> None:
    """Compile, print, judge."""
    from experiments.benchmark import programs, report, topologies

    targets = [topologies.TARGETS[name] for name in dict.fromkeys(values.target)]
    for target in targets:
        wanted(values, target.name)
    topologies.prepare()
    shown = programs.TABLE.show(record for each in targets for record in compiled(values, each))
    report.conclude({"suite": "targets", "records": shown}, values.output)


if __name__ == "__main__":
    launch(define_flags, main)
