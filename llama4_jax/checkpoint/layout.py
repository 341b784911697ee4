"""The tensors of a Hugging Face or Meta checkpoint: names, shapes and what they are made of."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np

from llama4_jax.checkpoint.source import Source
from llama4_jax.checkpoint.weight_map import Layout, Parameter, Place, parameters
from llama4_jax.config import ModelConfig, TextConfig

BLOCK_BYTES = 64 << 20
"""Tensors are read, rearranged and written in blocks of about this many bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """One parameter inside a stored tensor.

    Attributes:
      start: where the parameter begins along the fused axis.
      sizes: what one rank holds of each of the parameter's letters.
    """

    parameter: Parameter
    place: Place
    start: int
    sizes: Mapping[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[x] for x in axis) for axis in self.place.axes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of a checkpoint file: a parameter, or several fused along one axis."""

    key: str
    shape: tuple[int, ...]
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def stored_tensors(config: ModelConfig, layout: Layout, *, ranks: int = 1) -> dict[str, Stored]:
    """Return the tensors that one file set (one of Meta's `ranks`) of a checkpoint must hold.

    Raises:
      ValueError: a dimension does not divide over the ranks, or the layout has no place for a
        parameter.
    """
    tied = config.text.tie_embeddings
    known = parameters(dataclasses.replace(config, text=_untied(config)) if tied else config)
    groups: dict[str, list[Member]] = {}
    for parameter in known.values():
        if tied and layout == "hf" and parameter.name == "head.w_DV":
            continue
        place = parameter.weight.place(layout)
        key = stored_key(config, parameter, place)
        group = groups.setdefault(key, [])
        start = sum(m.shape[place.fuse] for m in group) if place.fuse is not None else 0
        sizes = rank_sizes(parameter, place, ranks)
        group.append(Member(parameter=parameter, place=place, start=start, sizes=sizes))
    return {key: _stored(key, members) for key, members in groups.items()}


def _untied(config: ModelConfig) -> TextConfig:
    return dataclasses.replace(config.text, tie_embeddings=False)


def stored_key(config: ModelConfig, parameter: Parameter, place: Place) -> str:
    """Return the stored name; without vision there is no `language_model.` prefix."""
    key = parameter.key(place)
    return key if config.vision is not None else key.removeprefix("language_model.")


def rank_sizes(parameter: Parameter, place: Place, ranks: int) -> dict[str, int]:
    """Return the size of each letter within one of `ranks` files."""
    sizes = dict(parameter.sizes)
    if place.shard is not None:
        whole = sizes[place.shard]
        if whole % ranks:
            raise ValueError(
                f"{parameter.name}: {place.shard} ({whole}) must be divisible by the number of "
                f"model-parallel files ({ranks})"
            )
        sizes[place.shard] = whole // ranks
    return sizes


def _stored(key: str, members: list[Member]) -> Stored:
    shape = list(members[0].shape)
    fuse = members[0].place.fuse
    if fuse is not None:
        shape[fuse] = sum(member.shape[fuse] for member in members)
    return Stored(key=key, shape=tuple(shape), members=tuple(members))


def blocks(
    source: Source, stored: Stored, dtype: np.dtype, *, rank: int = 0
) -> Iterator[np.ndarray]:
    """Yield the tensor's values in stored order, as C-contiguous arrays of about BLOCK_BYTES.

    Args:
      source: where the parameters come from.
      stored: the tensor to assemble.
      dtype: of the values; an equal dtype passes every bit through.
      rank: which slice of a letter that is divided over Meta's ranks.
    """
    fuse = stored.members[0].place.fuse
    side_by_side = fuse is not None and fuse % len(stored.shape) != 0
    runs = [stored.members] if side_by_side else [(member,) for member in stored.members]
    for run in runs:
        lead = run[0].place.axes[0][0]
        extent = run[0].sizes[lead]
        row_bytes = sum(math.prod(m.sizes.values()) for m in run) // extent * dtype.itemsize
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, extent, step):
            rows = slice(start, min(start + step, extent))
            parts = [_block(source, member, rows, rank).astype(dtype, copy=False) for member in run]
            joined = np.concatenate(parts, axis=fuse) if side_by_side else parts[0]
            yield np.ascontiguousarray(joined)


def _block(source: Source, member: Member, rows: slice, rank: int) -> np.ndarray:
    """Return rows of the leading letter of a member, in stored axes."""
    place, letters = member.place, member.parameter.weight.letters
    index = []
    for letter in letters:
        start, stop = 0, member.sizes[letter]
        if letter == place.axes[0][0]:
            start, stop = rows.start, rows.stop
        offset = rank * member.sizes[letter] if letter == place.shard else 0
        index.append(slice(offset + start, offset + stop))
    name = member.parameter.name
    if name == "head.w_DV" and source.config.text.tie_embeddings:
        value = source.read("embed.table_VD", tuple(reversed(index))).T
    else:
        value = source.read(name, tuple(index))
    value = value.transpose([letters.index(x) for axis in place.axes for x in axis])
    sizes = dict(zip("".join(place.axes), value.shape, strict=True))
    return value.reshape([math.prod(sizes[x] for x in axis) for axis in place.axes])
