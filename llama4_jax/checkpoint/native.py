"""Native checkpoints: a directory of Orbax checkpoints, one per layer, beside our own config.

    llama4_jax.json     the config, and which parameters each item holds with shape and dtype
    params/embed        one Orbax item per layer or part of the model, arrays by canonical name
    params/layers.0     ...
    params/layers.0.ffn.experts.w_gate_EDF    a large parameter is an item of its own
    params/*/crc32.json                       checksums of the item's files

One item is written at a time, so the memory to write a model is that of its largest parameter.
Arrays are stored as zarr in chunks of at most 64 MiB, which lets a reader fetch slices. A chunk is
compared with its checksum when something of it is first read, all else when the checkpoint is
opened; older checkpoints have no checksums.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from llama4_jax.checkpoint.checksums import Checksums, seal, unseal, write_checksums
from llama4_jax.checkpoint.file_tensors import check_tensors
from llama4_jax.checkpoint.parameters import Index, Parameter, Source, np_dtype, parameters
from llama4_jax.checkpoint.soundness import check_finite_values
from llama4_jax.checkpoint.writer import Advance, WritePlan, WriteUnit
from llama4_jax.config import ModelConfig, RopeScaling, Temperature, TextConfig, VisionConfig
from llama4_jax.untrusted import load_json

CONFIG = "llama4_jax.json"
_FORMAT = 1
_PARAMS = "params"
_CHUNK_BYTES = 64 << 20
_ITEM_BYTES = 256 << 20
"""Parameters of a layer share an item up to this size."""
_IS_CHUNK = re.compile(r"/\d+(\.\d+)*$")


def is_native(directory: pathlib.Path) -> bool:
    """Return whether `directory` looks like a native checkpoint."""
    return (directory / CONFIG).is_file() and (directory / _PARAMS).is_dir()


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Return the config as JSON values."""
    return dataclasses.asdict(config)


def config_from_json(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Rebuild a config from `config_to_json`.

    Raises:
      ValueError: a field is missing, unknown or impossible.
    """
    try:
        text: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values["text"].items()
        }
        if text["rope_scaling"] is not None:
            text["rope_scaling"] = RopeScaling(**text["rope_scaling"])
        if text["temperature"] is not None:
            text["temperature"] = Temperature(**text["temperature"])
        vision = values["vision"]
        fields: dict[str, Any] = {
            **values,
            "text": TextConfig(**text),
            "vision": None if vision is None else VisionConfig(**vision),
            "eos_ids": tuple(values["eos_ids"]),
        }
        return ModelConfig(**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} holds a config of another version: {error}") from error


class NativeSource:
    """Parameters read slice by slice from a native checkpoint."""

    def __init__(
        self,
        config: ModelConfig,
        paths: Mapping[str, pathlib.Path],
        headers: Mapping[str, Mapping[str, Any]],
        sums: Mapping[pathlib.Path, Checksums],
    ) -> None:
        self.config = config
        self._paths = paths
        self._chunks = {name: header["chunks"] for name, header in headers.items()}
        self._dtypes = {name: np_dtype(h["dtype"].strip("<|")) for name, h in headers.items()}
        self._sums = sums

    def dtype(self, name: str) -> np.dtype:
        return self._dtypes[name]

    def read(self, name: str, index: Index) -> np.ndarray:
        self._check(name, index)
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(self._paths[name])}}
        try:
            array = tensorstore.open(spec, open=True, read=True).result()
            return np.asarray(array[index].read().result())
        except ValueError as error:
            raise ValueError(f"{self._paths[name]} is damaged: {error}") from error

    def _check(self, name: str, index: Index) -> None:
        """Compare the chunks that a slice touches with their checksums."""
        item = self._paths[name].parent
        if item in self._sums:
            ranges = [
                range(part.start // size, math.ceil(part.stop / size))
                for part, size in zip(index, self._chunks[name], strict=True)
            ]
            self._sums[item].check(f"{name}/{chunk}" for chunk in _chunk_names(ranges))


def open_native(directory: pathlib.Path) -> NativeSource:
    """Open a native checkpoint; only its descriptions of arrays are read.

    Raises:
      ValueError: the config is of another version, or arrays are missing, misshapen, unexpected or
        lack chunks, or one of the files read is damaged.
    """
    contents, is_sealed = unseal(directory / CONFIG)
    if contents.get("format") != _FORMAT:
        raise ValueError(
            f"{directory / CONFIG} has format {contents.get('format')!r}; this version reads "
            f"format {_FORMAT}"
        )
    config = config_from_json(contents["config"], str(directory / CONFIG))
    items = contents["items"].items()
    paths = {name: directory / _PARAMS / item / name for item, names in items for name in names}
    sums: dict[pathlib.Path, Checksums] = {}
    for item in {path.parent for path in paths.values()} if is_sealed else ():
        sums[item] = Checksums.read(item)
        sums[item].check(name for name in sums[item] if not _IS_CHUNK.search(name))
    headers = {
        name: load_json(path / ".zarray")
        for name, path in paths.items()
        if (path / ".zarray").is_file()
    }
    expected = {name: parameter.shape for name, parameter in parameters(config).items()}
    found = {name: tuple(header["shape"]) for name, header in headers.items()}
    check_tensors(str(directory), expected, found)
    for name, header in headers.items():
        _check_chunks(paths[name], header)
    return NativeSource(config, paths, headers, sums)


def _check_chunks(path: pathlib.Path, header: Mapping[str, Any]) -> None:
    """Refuse an array with an absent chunk, which zarr would read as if it were zeros."""
    pairs = zip(header["shape"], header["chunks"], strict=True)
    for chunk in _chunk_names([range(math.ceil(size / chunk)) for size, chunk in pairs]):
        if not (path / chunk).is_file():
            raise ValueError(
                f"{path.parent} is incomplete: chunk {chunk} of {path.name} is missing"
            )


def _chunk_names(ranges: Sequence[range]) -> Iterator[str]:
    """Yield the file names of the chunks at these places along each dimension."""
    return (".".join(map(str, position)) for position in itertools.product(*ranges))


def plan_native(source: Source, dtype: np.dtype | None) -> WritePlan:
    """Plan the items of a native checkpoint; nothing is read or written yet."""
    dtypes = {
        name: source.dtype(name) if dtype is None or parameter.keeps_dtype else dtype
        for name, parameter in parameters(source.config).items()
    }
    items = _group(source.config, dtypes)
    described = {
        item: {p.name: {"shape": list(p.shape), "dtype": dtypes[p.name].name} for p in members}
        for item, members in items.items()
    }
    contents = {
        "format": _FORMAT,
        "config": config_to_json(source.config),
        "items": described,
    }
    units = [_unit(source, item, members, dtypes) for item, members in items.items()]
    return WritePlan(kind="orbax", units=tuple(units), texts={CONFIG: seal(contents)})


def _group(config: ModelConfig, dtypes: Mapping[str, np.dtype]) -> dict[str, list[Parameter]]:
    """Return the parameters of each item: a layer's, save those that are items of their own."""
    items: dict[str, list[Parameter]] = {}
    filled: dict[str, int] = {}
    for parameter in parameters(config).values():
        stem, is_layer, _ = parameter.template.partition(".{}")
        group = f"{stem}.{parameter.layer}" if is_layer else stem.partition(".")[0]
        num_bytes = parameter.size * dtypes[parameter.name].itemsize
        if filled.get(group, 0) + num_bytes > _ITEM_BYTES:
            group = parameter.name
        filled[group] = filled.get(group, 0) + num_bytes
        items.setdefault(group, []).append(parameter)
    return items


def _unit(
    source: Source, item: str, members: list[Parameter], dtypes: Mapping[str, np.dtype]
) -> WriteUnit:
    path = f"{_PARAMS}/{item}"

    def write(directory: pathlib.Path, advance: Advance) -> None:
        shutil.rmtree(directory / path, ignore_errors=True)
        values = {}
        for parameter in members:
            value = source.read(parameter.name, tuple(slice(0, n) for n in parameter.shape))
            value = value.astype(dtypes[parameter.name], copy=False)
            values[parameter.name] = np.ascontiguousarray(value)
            check_finite_values(parameter.name, values[parameter.name])
        _save(directory / path, values)
        write_checksums(directory / path)
        advance(sum(value.nbytes for value in values.values()))

    num_bytes = sum(p.size * dtypes[p.name].itemsize for p in members)
    return WriteUnit(name=path, paths=(path,), num_bytes=num_bytes, write=write)


def _save(path: pathlib.Path, values: Mapping[str, np.ndarray]) -> None:
    options = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in values}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with _quiet(), ocp.Checkpointer(handler) as checkpointer:
        arguments = ocp.args.PyTreeSave(item=dict(values), save_args=options)
        checkpointer.save(path.absolute(), args=arguments)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Orbax where it warns that plain zarr arrays were not merged into one database, and
    where it logs, with its traceback, an error that it raises too."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.exc_info and "Skipping merge of OCDBT" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
