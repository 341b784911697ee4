"""Meta checkpoints: consolidated.00.pth and its siblings beside a params.json, read and written.

Every file holds one model-parallel rank's part of each weight; the weight table says along which
dimension. Parts are joined slice by slice, after un-flattening what a file stores flat. FP8 experts
have a scale per rank, so each part is dequantised with its own before it is joined.
"""

import contextlib
import fnmatch
import functools
import json
import math
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from llama4_jax.checkpoint.layout import Stored, blocks, rank_sizes, stored_tensors
from llama4_jax.checkpoint.source import FileSource, Piece, Scale, Source, StoredTensor, widest
from llama4_jax.checkpoint.torch_file import TensorFileWriter, read_tensors
from llama4_jax.checkpoint.verify import check_tensors
from llama4_jax.checkpoint.weight_map import Parameter, Place, parameters
from llama4_jax.checkpoint.writer import Advance, WritePlan, WriteUnit
from llama4_jax.config import ModelConfig
from llama4_jax.config.json_section import load_json
from llama4_jax.config.meta import from_meta, to_meta

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

Shapes = dict[str, tuple[int, ...]]
Rank = Mapping[str, StoredTensor]


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
    ranks = [_kept(read_tensors(path)) for path in paths]
    params = load_json(directory / CONFIG)
    table = ranks[0].get("tok_embeddings.weight")
    is_float32 = table is not None and table.dtype == np.float32
    config = from_meta(params, dtype="float32" if is_float32 else "bfloat16")
    if table is not None and table.shape[0] * len(ranks) != config.text.vocab_size:
        raise ValueError(
            f"{directory} has {len(ranks)} consolidated.*.pth files, but each has "
            f"{table.shape[0]} rows of {config.text.vocab_size} tokens, which takes "
            f"{config.text.vocab_size // table.shape[0]} files"
        )
    scales = [_read_scales(directory, rank) for rank in range(len(ranks))]
    expected: list[Shapes] = [{} for _ in ranks]
    pieces = {
        parameter.name: _pieces(config, parameter, ranks, scales, expected)
        for parameter in parameters(config).values()
    }
    for path, rank, shapes in zip(paths, ranks, expected, strict=True):
        found = {key: tensor.shape for key, tensor in rank.items()}
        if config.text.tie_embeddings:
            found.pop("output.weight", None)
        check_tensors(str(path), shapes, found)
    for name, made in pieces.items():
        if any(p.tensor.dtype.itemsize == 1 and p.scale is None for p in made):
            raise ValueError(f"{directory}: {name} is FP8 and has no scale in fp8_scales_*.pt")
    return FileSource(config, pieces)


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


def _kept(tensors: Rank) -> Rank:
    return {
        key: tensor
        for key, tensor in tensors.items()
        if not any(fnmatch.fnmatch(key, pattern) for pattern in _IGNORED)
    }


def _read_scales(directory: pathlib.Path, rank: int) -> Rank:
    path = directory / f"fp8_scales_{rank}.pt"
    return read_tensors(path) if path.is_file() else {}


def _pieces(
    config: ModelConfig,
    parameter: Parameter,
    ranks: list[Rank],
    scales: list[Rank],
    expected: list[Shapes],
) -> tuple[Piece, ...]:
    """Find a parameter in every rank's file, and add what it needs to `expected`."""
    place = _choose_place(parameter, ranks[0])
    pieces = []
    for number, (rank, scale_rank) in enumerate(zip(ranks, scales, strict=True)):
        sizes = rank_sizes(parameter, place, len(ranks))
        key, start, shape = _slot(config, parameter, place, len(ranks))
        expected[number][key] = shape
        if key not in rank or (place.shard is None and number > 0):
            continue
        starts = {} if place.shard is None else {place.shard: number * sizes[place.shard]}
        pieces.append(
            Piece(
                tensor=rank[key],
                axes=place.axes,
                sizes=sizes,
                starts=starts,
                fuse=place.fuse,
                start=start,
                scale=_scale(parameter, rank[key], sizes, scale_rank),
            )
        )
    return tuple(pieces)


def _choose_place(parameter: Parameter, rank: Rank) -> Place:
    """Return where a file stores the parameter: under its raw key or an alternate that it has."""
    raw = parameter.weight.place("meta")
    places = (raw, *parameter.weight.others)
    return next((p for p in places if parameter.key(p) in rank), raw)


def _slot(
    config: ModelConfig, parameter: Parameter, place: Place, num_ranks: int
) -> tuple[str, int, tuple[int, ...]]:
    """Return stored key, start along the fused axis, and shape of the whole stored tensor."""
    if place != parameter.weight.meta:
        sizes = rank_sizes(parameter, place, num_ranks)
        shape = tuple(math.prod(sizes[x] for x in axis) for axis in place.axes)
        return parameter.key(place), 0, shape
    stored = _stored(config, num_ranks)[parameter.key(place)]
    start = next(m.start for m in stored.members if m.parameter.name == parameter.name)
    return stored.key, start, stored.shape


@functools.lru_cache(maxsize=2)
def _stored(config: ModelConfig, num_ranks: int) -> dict[str, Stored]:
    return stored_tensors(config, "meta", ranks=num_ranks)


def _scale(
    parameter: Parameter, tensor: StoredTensor, sizes: Mapping[str, int], scales: Rank
) -> Scale | None:
    """Return the FP8 scale of an expert matrix: one factor per expert and output channel."""
    if tensor.dtype.itemsize != 1:
        return None
    found = _SCALE_NAMES.get(parameter.name.rpartition(".")[2])
    if found is None:
        return None
    name, axes = found
    key = f"layers.{parameter.layer}.feed_forward.experts.{name}"
    if key not in scales:
        return None
    shape = tuple(sizes[x] for x in axes)
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
    num_ranks = _default_ranks(source.config) if num_ranks is None else num_ranks
    stored = stored_tensors(source.config, "meta", ranks=num_ranks)
    dtypes = {key: dtype or _stored_dtype(source, s) for key, s in stored.items()}
    paths = tuple(f"consolidated.{rank:02d}.pth" for rank in range(num_ranks))

    def write(directory: pathlib.Path, advance: Advance) -> None:
        _write(source, stored, dtypes, [directory / path for path in paths], advance)

    num_bytes = sum(s.size * dtypes[key].itemsize for key, s in stored.items()) * num_ranks
    unit = WriteUnit(name="consolidated", paths=paths, num_bytes=num_bytes, write=write)
    return WritePlan(kind="meta", units=(unit,), texts={CONFIG: params})


def _default_ranks(config: ModelConfig) -> int:
    for ranks in (8, 4, 2):
        with contextlib.suppress(ValueError):
            stored_tensors(config, "meta", ranks=ranks)
            return ranks
    return 1


def _stored_dtype(source: Source, stored: Stored) -> np.dtype:
    tied = source.config.text.tie_embeddings
    names = (m.parameter.name for m in stored.members)
    return widest(
        source.dtype("embed.table_VD" if tied and name == "head.w_DV" else name) for name in names
    )


def _write(
    source: Source,
    stored: Mapping[str, Stored],
    dtypes: Mapping[str, np.dtype],
    paths: list[pathlib.Path],
    advance: Advance,
) -> None:
    """Write all ranks side by side, so that every part of a source tensor is read while warm."""
    tensors = {key: (s.shape, dtypes[key]) for key, s in stored.items()}

    def values(key: str, tensor: Stored, rank: int):
        for block in blocks(source, tensor, dtypes[key], rank=rank):
            yield block
            advance(block.nbytes)

    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(TensorFileWriter(path, tensors)) for path in paths]
        for key, tensor in stored.items():
            for rank, file in enumerate(files):
                file.write(values(key, tensor, rank))
