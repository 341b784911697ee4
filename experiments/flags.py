"""What the commands share: flags for a checkpoint on a mesh, and refusals in one clear line.

Each command defines its flags on a FlagValues it is given and checks them all before it loads
anything, so that a mistake costs a second and not a checkpoint's loading time. What needs jax is
imported where it is used: help needs none of it.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from experiments.jsonl import check_writable, read_lines
from experiments.launch import FlagError as FlagError
from experiments.launch import launch as launch
from llama4_jax.untrusted import shown

if TYPE_CHECKING:
    import jax

    from llama4_jax.pretrained import Pretrained
    from llama4_jax.serve import EngineConfig, Options, Request

flags.disclaim_key_flags()  # what a function here defines is the calling command's own flag


def define_model_flags(values: flags.FlagValues) -> None:
    """Define --checkpoint, --mesh and --dtype: which model runs, where, and in what precision."""
    flags.DEFINE_string(
        "checkpoint", None,
        "Folder of the checkpoint, in any layout; an id of huggingface.co; or nano, which ships.",
        flag_values=values,
    )  # fmt: skip
    define_mesh_flag(values)
    flags.DEFINE_enum(
        "dtype", None, ["bfloat16", "float32"],
        "Precision of parameters and activations. Default: the checkpoint's own.",
        flag_values=values,
    )  # fmt: skip


def define_mesh_flag(values: flags.FlagValues) -> None:
    """Define --mesh, which `make_mesh` reads."""
    flags.DEFINE_string(
        "mesh", None,
        "Devices to spread the model over, as axis:size pairs, e.g. expert:4,tensor:2. The sizes "
        "multiply to the number of devices. A machine without an accelerator splits its CPU into "
        "as many virtual devices as the mesh asks for. Default: one device.",
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


def define_option_flags(values: flags.FlagValues) -> None:
    """Define how answers are made: --max_new_tokens, --temperature and the like, --options."""
    own = "Default: the checkpoint's own."
    known: list[tuple[Any, str, Any, str]] = [
        (flags.DEFINE_integer, "max_new_tokens", 256, "Most new tokens of one answer."),
        (flags.DEFINE_float, "temperature", None, f"0 takes the likeliest token. {own}"),
        (flags.DEFINE_float, "top_p", None,
         f"Draw from the likeliest tokens that hold this much of the probability. {own}"),
        (flags.DEFINE_integer, "top_k", None,
         f"Draw from this many likeliest tokens; 0 from all. {own}"),
        (flags.DEFINE_integer, "seed", 0, "Of the random draws."),
        (flags.DEFINE_multi_string, "stop", [],
         "A text that ends an answer, which then ends before it; may be repeated."),
        (flags.DEFINE_string, "options", None,
         'Everything else an answer may be asked, as the fields of a line of --input: '
         '{"n": 2, "min_p": 0.1, "logprobs": 5}.'),
    ]  # fmt: skip
    for define, name, default, meaning in known:
        define(name, default, meaning, flag_values=values)


def define_engine_flags(values: flags.FlagValues) -> None:
    """Define how the engine saves memory and time: --kv_cache, --speculate, --max_rows."""
    flags.DEFINE_enum(
        "kv_cache", "auto", ["auto", "int8", "fp8"],
        "What keys and values are stored in; auto is the model's precision.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "speculate", "none", ["none", "ngram"],
        "ngram guesses tokens from what was read before, and checks several at once.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer(
        "max_rows", 32, "Most answers in the making at a time.",
        lower_bound=1, flag_values=values,
    )  # fmt: skip


def check_options(values: flags.FlagValues) -> "Options":
    """Return what the flags ask of an answer.

    Raises:
      FlagError: a value is out of range, or --options is no JSON object of known fields.
    """
    from llama4_jax.serve import Options

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")
    fields: dict[str, Any] = {name: values[name].value for name in names}
    try:
        options = Options(**fields)
    except ValueError as error:
        raise FlagError(f"--{error}") from error
    if values.options is None:
        return options
    try:
        more = json.loads(values.options)
        if not isinstance(more, dict):
            raise ValueError(f"expected a JSON object, found {type(more).__name__}")
        return change_options(options, more)
    except ValueError as error:
        raise FlagError(f"--options: {error}") from error


def change_options(options: "Options", fields: Mapping[str, Any]) -> "Options":
    """Return options with some fields replaced by those of a JSON object.

    Raises:
      ValueError: a field is unknown, or its value out of range.
    """
    known = {field.name for field in dataclasses.fields(options)}
    for name in fields:
        if name not in known:
            raise ValueError(
                f"unknown field {shown(name)}; an answer has {', '.join(sorted(known))}."
            )
    changed: dict[str, Any] = dict(fields)
    bias = fields.get("logit_bias")
    if isinstance(bias, dict):  # keys of JSON objects are texts
        changed["logit_bias"] = {int(k) if k.isdecimal() else k: v for k, v in bias.items()}
    return dataclasses.replace(options, **changed)


def engine_config(values: flags.FlagValues) -> "EngineConfig":
    """Return the sizes that the flags ask of the engine.

    Raises:
      FlagError: they are contradictory.
    """
    from llama4_jax.serve import EngineConfig

    names = ("kv_cache", "speculate", "max_rows")
    sizes: dict[str, Any] = {name: values[name].value for name in names}
    sizes["step_tokens"] = max(EngineConfig.step_tokens, values.max_rows)
    try:
        return EngineConfig(**sizes)
    except ValueError as error:
        raise FlagError(f"--{error}") from error


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
    from llama4_jax.checkpoint.location import find_checkpoint

    if not values.checkpoint:
        raise FlagError("--checkpoint=DIR is needed: the folder of the model.")
    folder = find_checkpoint(values.checkpoint)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FlagError(f"--checkpoint={folder} {what}.")
    return folder


def check_given(values: flags.FlagValues, names: Sequence[str]) -> None:
    """Refuse flags that are left out.

    Raises:
      FlagError: for the first of `names` that is.
    """
    for name in names:
        if not values[name].value:
            raise FlagError(f"--{name} is needed; --helpshort describes it.")


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


def read_requests(
    path: str, known: Mapping[str, str], options: "Options | None" = None
) -> "list[Request]":
    """Read a file of requests, one JSON object on each line.

    Args:
      path: of the file.
      known: the fields that a line may have, and the field of Request that each one is.
      options: what is asked of an answer where a line does not say so; None is not to be said.

    Raises:
      FlagError: there is no such file, or it holds no request.
      LineError: a line has another field, is no request, or names an image that is not there.
    """
    from llama4_jax.serve import Request
    from llama4_jax.serve.dialogue import place_images
    from llama4_jax.text import images_of

    if not os.path.isfile(path):
        raise FlagError(f"there is no file {path}.")
    askable = set() if options is None else {field.name for field in dataclasses.fields(options)}

    def parse(line: dict[str, Any]) -> Request:
        asked = {name: value for name, value in line.items() if name in askable}
        for name in line.keys() - asked.keys():
            if name not in known:
                fields = ", ".join(known)
                raise ValueError(f"unknown field {shown(name)}; a request has {fields}.")
        request = Request(**{known[name]: line[name] for name in line.keys() - asked.keys()})
        if options is not None:
            request = dataclasses.replace(request, options=change_options(options, asked))
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


def load_model(values: flags.FlagValues) -> "Pretrained":
    """Load the checkpoint where and as the flags say.

    Raises:
      FlagError: the mesh cannot be read, or its sizes do not multiply to the number of devices.
      ValueError: the checkpoint cannot be used.
    """
    from experiments.terminal import bytes_on_terminal
    from llama4_jax.pretrained import from_pretrained

    return from_pretrained(
        values.checkpoint,
        mesh=make_mesh(values),
        dtype=values.dtype,
        progress=bytes_on_terminal,
    )


def make_mesh(values: flags.FlagValues) -> "jax.sharding.Mesh | None":
    """Start the devices that --mesh asks for and lay the mesh over them; None without the flag.

    Raises:
      FlagError: the mesh cannot be read, or its sizes do not multiply to the number of devices.
    """
    if values.mesh is None:
        return None
    import jax

    from llama4_jax import parallel

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
    import jax

    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if devices > 1:  # or two of them may wait for each other in different collectives
        one_order = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {one_order}"
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # the backend runs already, with the devices it has
        return
