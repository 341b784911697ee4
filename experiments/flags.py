"""What the commands share: flags for a checkpoint on a mesh, and refusals in one clear line.

Each command defines its flags on a FlagValues it is given and checks them all before it loads
anything, so that a mistake costs a second and not a checkpoint's loading time.
"""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags

from experiments.jsonl import check_writable, read_lines
from experiments.launch import FlagError as FlagError
from experiments.launch import launch as launch
from llama4_jax import parallel
from llama4_jax.checkpoint.location import find_checkpoint
from llama4_jax.pretrained import Pretrained, from_pretrained
from llama4_jax.serve import Request, Sampling
from llama4_jax.serve.dialogue import place_images
from llama4_jax.text import images_of
from llama4_jax.untrusted import shown

flags.disclaim_key_flags()  # what a function here defines is the calling command's own flag


def define_model_flags(values: flags.FlagValues) -> None:
    """Define --checkpoint, --mesh and --dtype: which model runs, where, and in what precision."""
    flags.DEFINE_string(
        "checkpoint", None,
        "Folder of the checkpoint, in Hugging Face, Meta or Orbax layout, or nano, which ships.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "mesh", None,
        "Devices to spread the model over, as axis:size pairs, e.g. expert:4,tensor:2. The sizes "
        "multiply to the number of devices. A machine without an accelerator splits its CPU into "
        "as many virtual devices as the mesh asks for. Default: one device.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "dtype", None, ["bfloat16", "float32"],
        "Precision of parameters and activations. Default: the checkpoint's own.",
        flag_values=values,
    )  # fmt: skip


def define_file_flags(values: flags.FlagValues) -> None:
    """Define --input and --output: JSON lines in and out."""
    flags.DEFINE_string(
        "input", None, "File of requests, one JSON object on each line.", flag_values=values
    )
    flags.DEFINE_string(
        "output", None,
        "File of answers, one JSON object on each line, in the order of the requests. It must not "
        "exist, and appears when it is complete. Default: the terminal.",
        flag_values=values,
    )  # fmt: skip


def define_sampling_flags(values: flags.FlagValues) -> None:
    """Define how tokens are chosen: --max_new_tokens, --temperature, --top_p, --top_k, --seed."""
    own = "Default: the checkpoint's own."
    for define, name, default, meaning in (
        (flags.DEFINE_integer, "max_new_tokens", 256, "Most new tokens of one answer."),
        (flags.DEFINE_float, "temperature", None, f"0 takes the likeliest token. {own}"),
        (flags.DEFINE_float, "top_p", None,
         f"Draw from the likeliest tokens that hold this much of the probability. {own}"),
        (flags.DEFINE_integer, "top_k", None, f"Draw from this many likeliest tokens. {own}"),
        (flags.DEFINE_integer, "seed", 0, "Of the random draws."),
    ):  # fmt: skip
        define(name, default, meaning, flag_values=values)


def check_sampling(values: flags.FlagValues) -> dict[str, Any]:
    """Return the fields of Sampling that the flags set.

    Raises:
      FlagError: a value is out of range.
    """
    if values.max_new_tokens < 1:
        raise FlagError(f"--max_new_tokens={values.max_new_tokens} must be at least 1.")
    names = ("temperature", "top_p", "top_k", "seed")
    given = {name: values[name].value for name in names}
    chosen: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    try:
        Sampling(**chosen)
    except ValueError as error:
        raise FlagError(f"--{error}") from error
    return chosen


def check_output(values: flags.FlagValues) -> None:
    """Refuse an --output that exists or could not be written.

    Raises:
      FlagError: why.
    """
    if values.output is not None:
        try:
            check_writable(values.output)
        except ValueError as error:
            raise FlagError(f"--output: {error}") from error


def check_checkpoint(values: flags.FlagValues) -> pathlib.Path:
    """Return the folder --checkpoint names.

    Raises:
      FlagError: there is none.
    """
    if not values.checkpoint:
        raise FlagError("--checkpoint=DIR is needed: the folder of the model.")
    folder = find_checkpoint(values.checkpoint)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FlagError(f"--checkpoint={folder} {what}.")
    return folder


def check_one_of(values: flags.FlagValues, names: Sequence[str]) -> str:
    """Return the one flag of `names` that is given.

    Raises:
      FlagError: none is, or more than one.
    """
    given = [name for name in names if values[name].value not in (None, False)]
    choice = " or ".join(f"--{name}" for name in names)
    if not given:
        raise FlagError(f"give {choice}.")
    if len(given) > 1:
        raise FlagError(f"--{given[0]} and --{given[1]} exclude each other; give {choice}.")
    return given[0]


def read_requests(path: str, known: Mapping[str, str]) -> list[Request]:
    """Read a file of requests, one JSON object on each line.

    Args:
      path: of the file.
      known: the fields that a line may have, and the field of Request that each one is.

    Raises:
      FlagError: there is no such file, or it holds no request.
      LineError: a line has another field, is no request, or names an image that is not there.
    """
    if not os.path.isfile(path):
        raise FlagError(f"there is no file {path}.")

    def parse(line: dict[str, Any]) -> Request:
        for name in line:
            if name not in known:
                fields = ", ".join(known)
                raise ValueError(f"unknown field {shown(name)}; a request has {fields}.")
        request = Request(**{known[name]: value for name, value in line.items()})
        images = request.images
        if request.messages is not None:
            placed = place_images(request.messages, request.images)
            images = [image.source for image in images_of(placed)]
        check_images(images)
        return request

    requests = read_lines(path, parse)
    if not requests:
        raise FlagError(f"{path} holds no requests.")
    return requests


def check_images(images: Sequence[Any]) -> None:
    """Refuse images that are neither paths of files nor `data:` URLs.

    Raises:
      FlagError: for the first that is not.
    """
    for image in images:
        if isinstance(image, str) and image.startswith("data:"):
            continue
        if not isinstance(image, str) or not os.path.isfile(image):
            raise FlagError(f"there is no image file {shown(image)}.")


def load_model(values: flags.FlagValues) -> Pretrained:
    """Load the checkpoint where and as the flags say.

    Raises:
      FlagError: the mesh cannot be read, or its sizes do not multiply to the number of devices.
      ValueError: the checkpoint cannot be used.
    """
    return from_pretrained(values.checkpoint, mesh=make_mesh(values), dtype=values.dtype)


def make_mesh(values: flags.FlagValues) -> jax.sharding.Mesh | None:
    """Start the devices that --mesh asks for and lay the mesh over them; None without the flag.

    Raises:
      FlagError: the mesh cannot be read, or its sizes do not multiply to the number of devices.
    """
    if values.mesh is None:
        return None
    try:
        wanted = math.prod(parallel.parse_mesh(values.mesh).values())
    except ValueError as error:
        raise FlagError(f"--mesh={values.mesh}: {error}.") from error
    split_cpu(wanted)
    if jax.device_count() != wanted:
        raise FlagError(
            f"--mesh={values.mesh} spreads over {wanted} devices, but this machine has "
            f"{jax.device_count()} ({jax.default_backend()}); choose sizes that multiply to "
            f"{jax.device_count()}."
        )
    return parallel.make_mesh(values.mesh)


def split_cpu(devices: int) -> None:
    """Make the CPU backend `devices` virtual devices, unless that is settled already."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if devices > 1:  # or two of them may wait for each other in different collectives
        one_order = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {one_order}"
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # the backend runs already, with the devices it has
        return
