"""Convert a checkpoint between Hugging Face, Meta and native layouts.

    python -m experiments.convert --source=DIR --target=DIR --to=hf|meta|orbax [--dtype=bfloat16]

The source's layout is recognised. Every tensor's name and shape is checked before work starts;
values keep every bit unless --dtype asks for another precision. Memory stays under three times the
largest tensor plus 1.5 GiB; the target appears only when it is complete, and running an interrupted
conversion again continues it. The last line says `wrote hf checkpoint TARGET from meta SOURCE`.
"""

import pathlib

from absl import flags

from experiments.flags import FlagError, check_given, launch
from experiments.terminal import bytes_on_terminal

FORMATS = ("hf", "meta", "orbax")


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's flags."""
    flags.DEFINE_string("source", None, "Folder of the checkpoint to read.", flag_values=values)
    flags.DEFINE_string(
        "target", None, "Folder to write; it must not exist yet or be empty.", flag_values=values
    )
    flags.DEFINE_enum(
        "to", None, FORMATS, "Layout to write.", flag_values=values
    )  # fmt: skip
    flags.DEFINE_enum(
        "dtype", None, ["bfloat16", "float32"],
        "Precision to write. Default: each tensor keeps its own; FP8 becomes the config's.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "model_parallel", None,
        "Number of consolidated.*.pth files, with --to=meta only. Default: 8, or the largest power "
        "of two that divides the model.",
        lower_bound=1, flag_values=values,
    )  # fmt: skip


def check_flags(values: flags.FlagValues) -> None:
    """Refuse flags that are missing or contradict each other.

    Raises:
      FlagError: names the flag and the remedy.
    """
    from llama4_jax.checkpoint.location import find_checkpoint
    from llama4_jax.checkpoint.writer import check_target

    check_given(values, ("source", "target", "to"))
    if values.model_parallel is not None and values.to != "meta":
        raise FlagError(f"--model_parallel is for --to=meta, not for --to={values.to}.")
    source, target = find_checkpoint(values.source), pathlib.Path(values.target).expanduser()
    if not source.is_dir():
        what = "is a file, not a folder" if source.exists() else "does not exist"
        raise FlagError(f"--source={source} {what}.")
    try:
        check_target(target)
    except ValueError as error:
        raise FlagError(f"--target={error}") from error


def main(values: flags.FlagValues) -> None:
    """Convert as the flags say."""
    from llama4_jax.checkpoint import convert, find_format
    from llama4_jax.checkpoint.location import find_checkpoint

    check_flags(values)
    source = find_checkpoint(values.source)
    kind = find_format(source)
    convert(
        source,
        values.target,
        to=values.to,
        dtype=values.dtype,
        model_parallel=values.model_parallel,
        progress=bytes_on_terminal,
    )
    print(f"wrote {values.to} checkpoint {values.target} from {kind} {values.source}")


if __name__ == "__main__":
    launch(define_flags, main)
