"""Hugging Face checkpoints: safetensors files beside a config.json, read by slices and written.

Read: bfloat16, float16 and float32 weights, one file or a sharded index; text-only models; FP8 with
scales, either unfused per expert (compressed-tensors) or fused (fbgemm), decided tensor by tensor
from what is there. Written: plain weights in the layout of `Llama4ForConditionalGeneration` or
`Llama4ForCausalLM`, in shards.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator

import numpy as np

from llama4_jax.checkpoint.file_tensors import FileTensor, FileTensors
from llama4_jax.checkpoint.layout import (
    FileSource,
    LayoutTensor,
    NewTensor,
    Part,
    Scale,
    TensorSlice,
    check_size,
    layout_tensors,
    new_tensors,
)
from llama4_jax.checkpoint.parameters import Source
from llama4_jax.checkpoint.safetensors_file import read_header, write_file
from llama4_jax.checkpoint.writer import Advance, WritePlan, WriteUnit
from llama4_jax.config.hf import from_hf, to_hf
from llama4_jax.untrusted import load_json, shown

CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000

_IGNORED = (
    "*rotary_emb.inv_freq",  # a buffer that old versions saved
    "*.input_scale",  # activation quantisation
    "*_input_scale",
    "*.input_scale_ub",
    "*.k_scale",  # cache quantisation
    "*.v_scale",
)


def is_hf(directory: pathlib.Path) -> bool:
    """Return whether `directory` looks like a Hugging Face checkpoint."""
    return (directory / CONFIG).is_file() and any(_files(directory))


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of weights, and their index; those of a PEFT adapter are none."""
    found = sorted(directory.glob("*.safetensors*"))
    return [path for path in found if not path.name.startswith("adapter_")]


def open_hf(directory: pathlib.Path) -> FileSource:
    """Open a Hugging Face checkpoint; only headers are read.

    Raises:
      ValueError: the config is impossible, a file is truncated or absent, or tensors are missing,
        misnamed, misshapen or unexpected; every one is named with both shapes.
    """
    config = from_hf(load_json(directory / CONFIG))
    files = FileTensors(str(directory), _read_headers(directory))
    check_size(config, files.values(), str(directory))
    slices = {
        part.parameter.name: _find(tensor, part, files)
        for tensor in layout_tensors(config, "hf").values()
        for part in tensor.parts
    }
    files.check((*_IGNORED, "*lm_head.weight") if config.text.tie_embeddings else _IGNORED)
    return FileSource(config, slices)


def _read_headers(directory: pathlib.Path) -> dict[str, FileTensor]:
    index_path = directory / _INDEX
    if not index_path.is_file():
        files = [path for path in _files(directory) if path.suffix == ".safetensors"]
        index = None
    else:
        index = load_json(index_path).get("weight_map")
        if not isinstance(index, dict):
            raise ValueError(f"{index_path} has no weight_map")
        names = {name if isinstance(name, str) else "" for name in index.values()}
        files = [_inside(directory, name, index_path) for name in sorted(names)]
    found: dict[str, FileTensor] = {}
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} is missing; {_INDEX} says that it holds part of the model")
        for key, tensor in read_header(path).items():
            if key in found:
                raise ValueError(f"{shown(key)} is in both {found[key].path} and {path}")
            found[key] = tensor
    for key, name in (index or {}).items():
        if key not in found or found[key].path.name != name:
            place = "in no file" if key not in found else f"in {found[key].path.name}"
            raise ValueError(
                f"{index_path} says that {shown(key)} is in {shown(name)}, but it is {place}"
            )
    return found


def _inside(directory: pathlib.Path, name: str, index_path: pathlib.Path) -> pathlib.Path:
    if not 0 < len(name) < 200 or pathlib.PurePath(name).name != name or "\0" in name:
        raise ValueError(f"{index_path} names a file outside the checkpoint: {shown(name)}")
    return directory / name


def _find(tensor: LayoutTensor, part: Part, files: FileTensors) -> tuple[TensorSlice, ...]:
    """Find a parameter in the files: in the layout's tensor, or in one for each expert."""
    unfused = tensor.key not in files and ".experts." in tensor.key
    if unfused and part.sizes["E"] <= len(files):
        role = next(r for r in ("gate", "up", "down") if f".w_{r}_" in part.parameter.name)
        experts = tensor.key.rpartition(".")[0]
        keys = [f"{experts}.{j}.{role}_proj.weight" for j in range(part.sizes["E"])]
        if any(key in files for key in keys):
            return tuple(_experts(keys, part, files))
    found = files.need(tensor.key, tensor.shape)
    scale = _scale(tensor, part, files)
    if found is None:
        return ()
    if scale is None and found.is_quantised:
        raise ValueError(f"{tensor.key} is {found.dtype} in {found.path} without a scale")
    return (TensorSlice(tensor=found, part=part, scale=scale),)


def _experts(keys: list[str], part: Part, files: FileTensors) -> Iterator[TensorSlice]:
    """Yield a slice for each expert whose matrix is a tensor of its own, [outputs, inputs]."""
    axes = tuple(reversed(part.axes[1:]))
    one = dataclasses.replace(part, axes=axes, sizes={**part.sizes, "E": 1}, start=0)
    for expert, key in enumerate(keys):
        if found := files.need(key, one.shape):
            scale = _linear_scale(key, one, files)
            yield TensorSlice(tensor=found, part=one, starts={"E": expert}, scale=scale)


def _scale(tensor: LayoutTensor, part: Part, files: FileTensors) -> Scale | None:
    """Return the scale of a linear layer, or of fused experts: one factor per output channel."""
    if tensor.key.endswith(".weight"):
        return _linear_scale(tensor.key, part, files)
    found = files.get(tensor.key + "_scale")
    if found is None or len(tensor.shape) != 3:
        return None
    num_experts, _, num_outputs = tensor.shape
    axes, shape = ("E", "", part.axes[2]), (num_experts, 1, num_outputs)
    if len(tensor.parts) == 1 and found.shape != shape:  # down_proj has it either way round
        axes, shape = ("E", part.axes[2], ""), (num_experts, num_outputs, 1)
    files.need(tensor.key + "_scale", shape)
    return Scale(tensor=found, axes=axes)


def _linear_scale(key: str, part: Part, files: FileTensors) -> Scale | None:
    """Return `X.weight_scale` of `X.weight`: one factor per output row, or one for the tensor."""
    weight, scale, rows = files.get(key), files.get(key + "_scale"), part.shape[:1]
    if scale is None:
        if weight is not None and weight.is_quantised:
            raise ValueError(f"{key} is {weight.dtype}; {key}_scale {(*rows, 1)} is missing")
        return None
    is_free = math.prod(scale.shape) == 1 or scale.shape == rows
    files.need(key + "_scale", scale.shape if is_free else (*rows, 1))
    return Scale(tensor=scale, axes=part.axes[:1] + ("",) * (len(scale.shape) - 1))


def plan_hf(source: Source, dtype: np.dtype | None, shard_bytes: int = SHARD_BYTES) -> WritePlan:
    """Plan the files of a Hugging Face checkpoint; nothing is read or written yet.

    Raises:
      ValueError: config.json cannot express the model.
    """
    texts = {CONFIG: json.dumps(to_hf(source.config), indent=2) + "\n"}
    tensors = new_tensors(source, "hf", dtype)
    shards, filled, total = [dict[str, NewTensor]()], 0, 0
    for key, tensor in tensors.items():
        if filled and filled + tensor.num_bytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += tensor.num_bytes
        total += tensor.num_bytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        index = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        values = {"metadata": {"total_size": total}, "weight_map": index}
        texts[_INDEX] = json.dumps(values, indent=2) + "\n"
    units = tuple(_shard_unit(*pair) for pair in zip(names, shards, strict=True))
    return WritePlan(kind="hf", units=units, texts=texts)


def _shard_unit(name: str, shard: dict[str, NewTensor]) -> WriteUnit:
    def write(directory: pathlib.Path, advance: Advance) -> None:
        headers = {key: tensor.header for key, tensor in shard.items()}
        write_file(directory / name, headers, (t.blocks(advance) for t in shard.values()))

    num_bytes = sum(tensor.num_bytes for tensor in shard.values())
    return WriteUnit(name=name, paths=(name,), num_bytes=num_bytes, write=write)
