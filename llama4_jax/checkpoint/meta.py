"""Meta checkpoints: consolidated.00.pth and its siblings beside a params.json, read and written.

Every file holds one model-parallel rank's part of each weight; the weight table says along which
dimension. Parts are joined slice by slice, after un-flattening what a file stores flat. FP8 experts
have a scale per rank, so each part is dequantised with its own before it is joined.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from llama4_jax.checkpoint.file_tensors import FileTensor, FileTensors, check_tensors
from llama4_jax.checkpoint.layout import (
    FileSource,
    Part,
    Scale,
    TensorSlice,
    check_size,
    layout_tensors,
    new_tensors,
)
from llama4_jax.checkpoint.parameters import Index, Source
from llama4_jax.checkpoint.torch_file import TensorFileWriter, read_tensors
from llama4_jax.checkpoint.writer import Advance, WritePlan, WriteUnit
from llama4_jax.config import ModelConfig
from llama4_jax.config.meta import from_meta, to_meta
from llama4_jax.untrusted import load_json

CONFIG = "params.json"
_PATTERN = "consolidated*.pth"

_IGNORED = (
    "rope.freqs",
    "*freq_cis",
    "*freqs_cis",
    "*._extra_state",
    "*.global_gate_stats_3E",  # training statistics
    "*.running_gate_stats_3E",
    "*.expert_activation_DE",
)

_SCALE_NAMES = {
    "w_gate_EDF": ("w1", ("E", "F")),
    "w_up_EDF": ("w3", ("E", "F")),
    "w_down_EFD": ("w2", ("E", "D")),
}
"""Name of an expert matrix in fp8_scales_N.pt, and the letters of its scale."""


def is_meta(directory: pathlib.Path) -> bool:
    """Return whether `directory` looks like a Meta checkpoint."""
    return (directory / CONFIG).is_file() and any(directory.glob(_PATTERN))


def open_meta(directory: pathlib.Path) -> FileSource:
    """Open a Meta checkpoint of any number of ranks; only descriptions of tensors are read.

    Raises:
      ValueError: params.json is impossible, a file is truncated, absent or holds more than tensors,
        or tensors are missing, misnamed, misshapen or unexpected; each is named with both shapes.
    """
    paths = _rank_files(directory)
    ranks = [FileTensors(str(path), read_tensors(path)) for path in paths]
    config = _read_config(directory, ranks)
    check_size(config, [tensor for rank in ranks for tensor in rank.values()], str(directory))
    scale_paths = [directory / f"fp8_scales_{rank}.pt" for rank in range(len(ranks))]
    scales = [read_tensors(path) if path.is_file() else {} for path in scale_paths]
    slices = {}
    for tensor in layout_tensors(config, "meta", ranks=len(ranks), present=ranks[0]).values():
        found = [rank.need(tensor.key, tensor.shape) for rank in ranks]
        for part in tensor.parts:
            slices[part.parameter.name] = tuple(_slices(part, found, scales))
    for rank in ranks:
        rank.check((*_IGNORED, "output.weight") if config.text.tie_embeddings else _IGNORED)
    return FileSource(config, slices)


def _rank_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """Return the rank files in order, after checking that none is absent from the row."""
    paths = sorted(directory.glob(_PATTERN))
    numbers = [int(m[1]) if (m := re.search(r"\.(\d+)\.pth$", p.name)) else 0 for p in paths]
    if numbers != list(range(len(paths))):
        raise ValueError(
            f"{directory} has the files {', '.join(p.name for p in paths)}; they must be numbered "
            f"from 0 to {len(paths) - 1} without a gap"
        )
    return paths


def _read_config(directory: pathlib.Path, ranks: list[FileTensors]) -> ModelConfig:
    """Read params.json, and compare the size of the token table with the number of files."""
    table = ranks[0].get("tok_embeddings.weight")
    is_float32 = table is not None and table.dtype == np.float32
    params = load_json(directory / CONFIG)
    config = from_meta(params, dtype="float32" if is_float32 else "bfloat16")
    if table is not None and table.shape[0] * len(ranks) != config.text.vocab_size:
        raise ValueError(
            f"{directory} has {len(ranks)} consolidated.*.pth files, but each has "
            f"{table.shape[0]} rows of {config.text.vocab_size} tokens, which takes "
            f"{config.text.vocab_size // table.shape[0]} files"
        )
    return config


def _slices(
    part: Part, found: Sequence[FileTensor | None], scales: Sequence[Mapping[str, FileTensor]]
) -> Iterator[TensorSlice]:
    """Yield what each rank has of a parameter: its share, or the first rank's where all have it."""
    for rank, tensor in enumerate(found[:1] if part.shard is None else found):
        if tensor is not None:
            starts = {} if part.shard is None else {part.shard: rank * part.sizes[part.shard]}
            scale = _scale(part, tensor, scales[rank]) if tensor.is_quantised else None
            yield TensorSlice(tensor=tensor, part=part, starts=starts, scale=scale)


def _scale(part: Part, tensor: FileTensor, scales: Mapping[str, FileTensor]) -> Scale:
    """Return the FP8 scale of an expert matrix: one factor per expert and output channel."""
    name = part.parameter.name
    short, axes = _SCALE_NAMES.get(name.rpartition(".")[2], ("", ()))
    key = f"layers.{part.parameter.layer}.feed_forward.experts.{short}"
    if key not in scales:
        raise ValueError(f"{tensor.path}: {name} is FP8 and has no scale in fp8_scales_*.pt")
    shape = tuple(part.sizes[x] for x in axes)
    check_tensors(str(scales[key].path), {key: shape}, {key: scales[key].shape})
    return Scale(tensor=scales[key], axes=axes)


def plan_meta(source: Source, dtype: np.dtype | None, num_ranks: int | None = None) -> WritePlan:
    """Plan the files of a Meta checkpoint; nothing is read or written yet.

    Args:
      source: the parameters.
      dtype: precision to write, or None for each tensor's own.
      num_ranks: number of files; by default 8, as released checkpoints have, or the largest power
        of two that divides the model.

    Raises:
      ValueError: params.json cannot express the model, or a dimension does not divide over the
        ranks.
    """
    params = json.dumps(to_meta(source.config), indent=2) + "\n"
    source = _Untied(source) if source.config.text.tie_embeddings else source
    num_ranks = _default_ranks(source.config) if num_ranks is None else num_ranks
    tensors = new_tensors(source, "meta", dtype, ranks=num_ranks)
    paths = tuple(f"consolidated.{rank:02d}.pth" for rank in range(num_ranks))

    def write(directory: pathlib.Path, advance: Advance) -> None:
        """Write all ranks side by side, so that every part of a tensor is read while warm."""
        headers = {key: tensor.header for key, tensor in tensors.items()}
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(TensorFileWriter(directory / p, headers)) for p in paths]
            for tensor in tensors.values():
                for rank, file in enumerate(files):
                    file.write(tensor.blocks(advance, rank=rank))

    num_bytes = sum(tensor.num_bytes for tensor in tensors.values()) * num_ranks
    unit = WriteUnit(name="consolidated", paths=paths, num_bytes=num_bytes, write=write)
    return WritePlan(kind="meta", units=(unit,), texts={CONFIG: params})


class _Untied:
    """A model with tied embeddings as Meta's layout has it: with the table twice."""

    def __init__(self, source: Source) -> None:
        text = dataclasses.replace(source.config.text, tie_embeddings=False)
        self.config = dataclasses.replace(source.config, text=text)
        self._source = source

    def dtype(self, name: str) -> np.dtype:
        return self._source.dtype("embed.table_VD" if name == "head.w_DV" else name)

    def read(self, name: str, index: Index) -> np.ndarray:
        if name == "head.w_DV":
            return self._source.read("embed.table_VD", index[::-1]).T
        return self._source.read(name, index)


def _default_ranks(config: ModelConfig) -> int:
    for ranks in (8, 4, 2):
        with contextlib.suppress(ValueError):
            layout_tensors(config, "meta", ranks=ranks)
            return ranks
    return 1
