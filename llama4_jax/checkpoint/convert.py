"""Convert a checkpoint from any layout to any other, in memory for a few blocks of one tensor."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Literal

from llama4_jax.checkpoint import hf, meta, native
from llama4_jax.checkpoint.location import find_checkpoint
from llama4_jax.checkpoint.parameters import Source, np_dtype
from llama4_jax.checkpoint.writer import (
    Progress,
    WritePlan,
    check_target,
    no_progress,
    partial_directory,
    write_checkpoint,
)
from llama4_jax.config import DType, ModelConfig, preprocessor
from llama4_jax.config.preprocessor import read_max_tiles, with_max_tiles
from llama4_jax.untrusted import load_json, shown

Format = Literal["hf", "meta", "orbax"]
FORMATS: tuple[Format, ...] = ("hf", "meta", "orbax")

GENERATION = "generation_config.json"
ADAPTER = "adapter_config.json"
_CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
    GENERATION,
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


_READERS: dict[Format, tuple[Callable[[pathlib.Path], bool], Callable[[pathlib.Path], Source]]] = {
    "orbax": (native.is_native, native.open_native),
    "hf": (hf.is_hf, hf.open_hf),
    "meta": (meta.is_meta, meta.open_meta),
}
"""How a layout is recognised, and opened."""


def find_format(directory: pathlib.Path) -> Format:
    """Return the layout of the checkpoint in `directory`.

    Raises:
      ValueError: there is none, and why.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give the directory of a checkpoint")
    for kind, (is_kind, _) in _READERS.items():
        if is_kind(directory):
            return kind
    if (directory / ADAPTER).is_file():
        base = load_json(directory / ADAPTER).get("base_model_name_or_path")
        raise ValueError(
            f"{directory} holds a PEFT adapter and no model; load it with its base model "
            f"({shown(base)}) in peft, merge_and_unload() it, and save the result"
        )
    raise ValueError(
        f"{directory} holds no checkpoint: none of {hf.CONFIG} with *.safetensors, {meta.CONFIG} "
        f"with consolidated.*.pth, or {native.CONFIG} with params"
    )


def open_checkpoint(directory: pathlib.Path) -> Source:
    """Open a checkpoint of any layout, after comparing every name and shape with its config.

    Raises:
      ValueError: it is not a whole, well-formed checkpoint; the message names what is wrong.
    """
    _, open_kind = _READERS[find_format(directory)]
    source = open_kind(directory)
    config = source.config
    if config.vision is not None:
        max_tiles = read_max_tiles(directory, config.vision) or config.max_tiles
        source.config = dataclasses.replace(config, max_tiles=max_tiles)
    return source


def convert(
    source: str | pathlib.Path,
    target: str | pathlib.Path,
    *,
    to: Format,
    dtype: DType | None = None,
    model_parallel: int | None = None,
    progress: Progress = no_progress,
) -> None:
    """Convert a checkpoint, bit for bit unless `dtype` asks for another precision.

    Every tensor's name and shape is checked before anything is written. Memory stays under three
    times the largest tensor. The target appears only when it is complete; run an interrupted
    conversion again and it goes on where it was.

    Args:
      source: a Hugging Face, Meta or native checkpoint; its layout is recognised.
      target: a directory that does not exist yet or is empty.
      to: layout to write.
      dtype: precision to write; None keeps each tensor's own. FP8 is always dequantised, and
        balance biases stay float32.
      model_parallel: number of files of a Meta checkpoint; by default 8 or what divides the model.
      progress: told of the bytes written.

    Raises:
      ValueError: the source is damaged or incomplete or holds a weight that is not finite, the
        layout cannot express the model, the target is in use or the disk is too small.
    """
    source, target = find_checkpoint(source), pathlib.Path(target).expanduser()
    check_target(target)
    inside, outside = target.resolve(), source.resolve()
    if inside.is_relative_to(outside) or outside.is_relative_to(partial_directory(inside)):
        raise ValueError(f"target {target} lies inside source {source}; choose a directory outside")
    write_source(
        open_checkpoint(source),
        target,
        to=to,
        dtype=dtype,
        model_parallel=model_parallel,
        origin=source,
        fingerprint=[_fingerprint(source), dtype, model_parallel],
        progress=progress,
    )


def write_source(
    source: Source,
    target: pathlib.Path,
    *,
    to: Format,
    dtype: DType | None,
    model_parallel: int | None,
    origin: pathlib.Path | None,
    fingerprint: object = None,
    progress: Progress,
) -> None:
    """Write parameters as a checkpoint in layout `to`, with the files that belong to the model.

    Args:
      source: the parameters; its config gets the dtype.
      origin: directory to take the tokenizer's files from, or None.
      fingerprint: what `write_checkpoint` recognises an interrupted conversion by.

    The other arguments are those of `convert`.
    """
    source.config = dataclasses.replace(source.config, dtype=dtype or source.config.dtype)
    plan = make_plan(source, to, dtype=dtype, model_parallel=model_parallel)
    files = {} if origin is None else _carried_files(origin)
    texts = {
        name: json.dumps(with_max_tiles(load_json(files[name]), source.config.max_tiles), indent=2)
        for name in preprocessor.FILES
        if name in files
    }
    if to == "hf" and GENERATION not in files:
        texts[GENERATION] = _generation_text(source.config)
    plan = dataclasses.replace(plan, texts={**texts, **plan.texts})
    write_checkpoint(plan, target, files=files, fingerprint=fingerprint, progress=progress)


def make_plan(
    source: Source, to: Format, *, dtype: DType | None = None, model_parallel: int | None = None
) -> WritePlan:
    """Plan the files of a checkpoint in layout `to`; see `convert` for the arguments."""
    if to not in FORMATS:
        raise ValueError(f"format {to!r} must be one of {', '.join(FORMATS)}")
    if model_parallel is not None and to != "meta":
        raise ValueError(f"model_parallel ({model_parallel}) is for the meta layout, not for {to}")
    wanted = None if dtype is None else np_dtype(dtype)
    if to == "meta":
        return meta.plan_meta(source, wanted, model_parallel)
    return hf.plan_hf(source, wanted) if to == "hf" else native.plan_native(source, wanted)


def _carried_files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return the files that belong to a model in any layout: tokenizer, templates, licence."""
    found = {p.name: p for pattern in _CARRIED for p in directory.glob(pattern) if p.is_file()}
    return dict(sorted(found.items()))


def _generation_text(config: ModelConfig) -> str:
    """Return a generation_config.json that says when to stop, for a model that came without one."""
    eos_ids = list(config.eos_ids)
    values = {
        "bos_token_id": config.bos_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids or None,
        "pad_token_id": config.pad_id,
    }
    return json.dumps(values, indent=2) + "\n"


def _fingerprint(directory: pathlib.Path) -> list[list[str | int]]:
    """Return names, sizes and times of the source's files: a changed source is not resumed."""
    found = sorted(p for p in directory.rglob("*") if p.is_file())
    stats = [(p, p.stat()) for p in found]
    head: list[list[str | int]] = [[str(directory.resolve())]]
    return head + [[p.name, s.st_size, s.st_mtime_ns] for p, s in stats]
