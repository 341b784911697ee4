"""Hugging Face checkpoints: safetensors files beside a config.json, read by slices and written.

Read: bfloat16, float16 and float32 weights, one file or a sharded index; text-only models; FP8 with
scales, either unfused per expert (compressed-tensors) or fused (fbgemm), decided tensor by tensor
from what is there. Written: plain weights in the layout of `Llama4ForConditionalGeneration` or
`Llama4ForCausalLM`, in shards.
"""

import fnmatch
import json
import math
import pathlib
from collections.abc import Mapping

import numpy as np

from llama4_jax.checkpoint.layout import Member, Stored, blocks, stored_tensors
from llama4_jax.checkpoint.safetensors_file import read_header, write_file
from llama4_jax.checkpoint.source import FileSource, Piece, Scale, Source, StoredTensor, widest
from llama4_jax.checkpoint.verify import check_tensors
from llama4_jax.checkpoint.writer import WritePlan, WriteUnit
from llama4_jax.config.hf import from_hf, to_hf
from llama4_jax.config.json_section import load_json

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
    return (directory / CONFIG).is_file() and any(directory.glob("*.safetensors*"))


def open_hf(directory: pathlib.Path) -> FileSource:
    """Open a Hugging Face checkpoint; only headers are read.

    Raises:
      ValueError: the config is impossible, a file is truncated or absent, or tensors are missing,
        misnamed, misshapen or unexpected; every one is named with both shapes.
    """
    config = from_hf(load_json(directory / CONFIG))
    found = _read_headers(directory)
    wanted = stored_tensors(config, "hf")
    expected: dict[str, tuple[int, ...]] = {}
    pieces: dict[str, tuple[Piece, ...]] = {}
    for stored in wanted.values():
        for member in stored.members:
            made = _pieces(stored, member, found, expected)
            pieces[member.parameter.name] = made
    ignored = {key for key in found if _is_ignored(key, expected, tied=config.text.tie_embeddings)}
    shapes = {key: tensor.shape for key, tensor in found.items() if key not in ignored}
    check_tensors(str(directory), expected, shapes)
    return FileSource(config, pieces)


def _read_headers(directory: pathlib.Path) -> dict[str, StoredTensor]:
    index_path = directory / _INDEX
    if not index_path.is_file():
        files = sorted(directory.glob("*.safetensors"))
        index = None
    else:
        index = load_json(index_path).get("weight_map")
        if not isinstance(index, dict):
            raise ValueError(f"{index_path} has no weight_map")
        files = [_inside(directory, name, index_path) for name in sorted(set(index.values()))]
    found: dict[str, StoredTensor] = {}
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} is missing; {_INDEX} says that it holds part of the model")
        for key, tensor in read_header(path).items():
            if key in found:
                raise ValueError(f"{key} is in both {found[key].path} and {path}")
            found[key] = tensor
    for key, name in (index or {}).items():
        if key not in found or found[key].path.name != name:
            place = "in no file" if key not in found else f"in {found[key].path.name}"
            raise ValueError(f"{index_path} says that {key} is in {name}, but it is {place}")
    return found


def _inside(directory: pathlib.Path, name: object, index_path: pathlib.Path) -> pathlib.Path:
    if not isinstance(name, str) or pathlib.PurePath(name).name != name:
        raise ValueError(f"{index_path} names a file outside the checkpoint: {name!r}")
    return directory / name


def _is_ignored(key: str, expected: Mapping[str, object], *, tied: bool) -> bool:
    if tied and key.endswith("lm_head.weight"):
        return True
    return key not in expected and any(fnmatch.fnmatch(key, pattern) for pattern in _IGNORED)


def _pieces(
    stored: Stored,
    member: Member,
    found: Mapping[str, StoredTensor],
    expected: dict[str, tuple[int, ...]],
) -> tuple[Piece, ...]:
    """Find a parameter in the files, and add what it needs to `expected`."""
    if stored.key in found or ".experts." not in stored.key:
        return (_whole(stored, member, found, expected),)
    by_expert = _unfused(stored.key, member)
    if not any(key in found for key in by_expert):
        return (_whole(stored, member, found, expected),)
    pieces = []
    sizes = {**member.sizes, "E": 1}
    for expert, key in enumerate(by_expert):
        axes = tuple(reversed(member.place.axes[1:]))
        shape = tuple(member.sizes[axis] for axis in axes)
        expected[key] = shape
        if key not in found:
            continue
        scale = _linear_scale(key, axes, shape, found, expected)
        pieces.append(
            Piece(tensor=found[key], axes=axes, sizes=sizes, starts={"E": expert}, scale=scale)
        )
    return tuple(pieces)


def _unfused(key: str, member: Member) -> list[str]:
    """Return the per-expert names: ...experts.3.gate_proj.weight and so on."""
    role = next(r for r in ("gate", "up", "down") if f".w_{r}_" in member.parameter.name)
    experts = key.rpartition(".")[0]
    return [f"{experts}.{j}.{role}_proj.weight" for j in range(member.sizes["E"])]


def _whole(
    stored: Stored,
    member: Member,
    found: Mapping[str, StoredTensor],
    expected: dict[str, tuple[int, ...]],
) -> Piece:
    """Return the parameter as part of the one tensor that the layout says."""
    expected[stored.key] = stored.shape
    axes, fuse = member.place.axes, member.place.fuse
    absent = StoredTensor(
        path=pathlib.Path(), offset=0, shape=stored.shape, dtype=np.dtype(np.float32)
    )
    tensor = found.get(stored.key, absent)
    fused_key = stored.key + "_scale"
    if stored.key.endswith(".weight"):
        scale = _linear_scale(stored.key, axes, stored.shape, found, expected)
    elif fused_key in found and len(axes) == 3:
        kept, shape = _fused_scale_layout(stored, fuse is not None, found[fused_key].shape)
        expected[fused_key] = shape
        scale = Scale(tensor=found[fused_key], axes=kept, fuse=fuse, start=member.start)
    else:
        scale = None
    if scale is None and tensor.dtype.itemsize == 1:
        raise ValueError(f"{stored.key} is {tensor.dtype} in {tensor.path} without a scale")
    return Piece(
        tensor=tensor, axes=axes, sizes=member.sizes, fuse=fuse, start=member.start, scale=scale
    )


def _fused_scale_layout(
    stored: Stored, is_gate_up: bool, actual: tuple[int, ...]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return letters and shape of the scale of fused experts: one factor per output channel."""
    num_experts, _, num_outputs = stored.shape
    if is_gate_up:
        return ("E", "", "F"), (num_experts, 1, num_outputs)
    if actual == (num_experts, 1, num_outputs):
        return ("E", "", "D"), actual
    return ("E", "D", ""), (num_experts, num_outputs, 1)


def _linear_scale(
    key: str,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    found: Mapping[str, StoredTensor],
    expected: dict[str, tuple[int, ...]],
) -> Scale | None:
    """Return `X.weight_scale` of `X.weight`: one factor per output row, or one for the tensor."""
    scale_key = key + "_scale"
    if scale_key not in found:
        if key in found and found[key].dtype.itemsize == 1:
            raise ValueError(f"{key} is {found[key].dtype}; {scale_key} {(shape[0], 1)} is missing")
        return None
    actual = found[scale_key].shape
    shared = math.prod(actual) == 1
    expected[scale_key] = actual if shared or actual == shape[:1] else (shape[0], 1)
    return Scale(tensor=found[scale_key], axes=axes[:1] + ("",) * (len(actual) - 1))


def plan_hf(source: Source, dtype: np.dtype | None, shard_bytes: int = SHARD_BYTES) -> WritePlan:
    """WritePlan the files of a Hugging Face checkpoint; nothing is read or written yet.

    Raises:
      ValueError: config.json cannot express the model.
    """
    config_text = json.dumps(to_hf(source.config), indent=2) + "\n"
    shards: list[dict[str, Stored]] = [{}]
    filled = 0
    dtypes: dict[str, np.dtype] = {}
    total = 0
    for key, stored in stored_tensors(source.config, "hf").items():
        dtypes[key] = dtype or widest(source.dtype(m.parameter.name) for m in stored.members)
        num_bytes = stored.size * dtypes[key].itemsize
        if shards[-1] and filled + num_bytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = stored
        filled += num_bytes
        total += num_bytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    texts = {CONFIG: config_text}
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        index = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        values = {"metadata": {"total_size": total}, "weight_map": index}
        texts[_INDEX] = json.dumps(values, indent=2) + "\n"
    units = [
        _shard_unit(source, name, shard, dtypes) for name, shard in zip(names, shards, strict=True)
    ]
    return WritePlan(kind="hf", units=tuple(units), texts=texts)


def _shard_unit(
    source: Source, name: str, shard: dict[str, Stored], dtypes: Mapping[str, np.dtype]
) -> WriteUnit:
    def write(directory: pathlib.Path, advance) -> None:
        def values(key: str, stored: Stored):
            for block in blocks(source, stored, dtypes[key]):
                yield block
                advance(block.nbytes)

        tensors = {key: (stored.shape, dtypes[key]) for key, stored in shard.items()}
        write_file(directory / name, tensors, (values(k, s) for k, s in shard.items()))

    num_bytes = sum(stored.size * dtypes[key].itemsize for key, stored in shard.items())
    return WriteUnit(name=name, paths=(name,), num_bytes=num_bytes, write=write)
