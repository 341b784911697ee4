"""Time the kernels on the device at hand, or compile them for chips that are not there.

    python -m experiments.benchmark --suite=kernels [--shapes=scout_chunk_32k] [--output=F.json]
    python -m experiments.benchmark --suite=compile [--target=v5p] [--output=F.json]
    python -m experiments.benchmark --suite=kernels --tune

The kernels suite checks each operation against the reference and prints its time, its rates, the
share of what the device could do, and how it compares with others in the same run: on a CPU the
reference itself on nano's shapes, two minutes. `--tune` first measures block sizes and keeps the
best in kernels_pallas/tuning. The compile suite prints FLOPs, bytes and memory against the floor,
splash attention and megablox, and how long schedules of TPU kernels are beside their copies, then
the figures of experts divided over slices; `make kernels` brings its compilers. A wrong result, a
program that fails or is beyond its bounds end it with status 1.
"""

from absl import flags

from experiments.benchmark import names
from experiments.launch import FlagError, launch


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's flags."""
    flags.DEFINE_enum(
        "suite", None, names.SUITES,
        "kernels times them on this device; compile compiles them for others; nano runs models "
        "with kernels on and off.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list(
        "shapes", [], "Names from kernels_pallas.shapes; all, on a CPU those of nano.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_multi_enum(
        "target", names.KERNEL_CHIPS, names.CHIPS,
        "Chip to compile for; may be repeated.", flag_values=values,
    )  # fmt: skip
    backends = ["reference", "tpu", "gpu"]
    flags.DEFINE_enum("backend", None, backends, "To time; the device's.", flag_values=values)
    flags.DEFINE_list(
        "do", ["check", "time"],
        "What the kernels suite does: check compares with the reference, repeat runs 30 times and "
        "compares bits, time measures.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool("tune", False, "Measure block sizes first.", flag_values=values)
    flags.DEFINE_string("output", None, "JSON file for the figures.", flag_values=values)
    flags.DEFINE_string(
        "records", None, "File to which each record is appended, a line of JSON, when it is known.",
        flag_values=values,
    )  # fmt: skip


def main(values: flags.FlagValues) -> None:
    """Run a suite, keep its figures, judge."""
    from experiments.benchmark import report, suites

    if values.suite is None:
        raise FlagError("give --suite=kernels, --suite=compile or --suite=nano.")
    found = suites.SUITES[values.suite](values)
    report.conclude({"suite": values.suite, **found}, values.output)


if __name__ == "__main__":
    launch(define_flags, main)
