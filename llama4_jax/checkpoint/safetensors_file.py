"""The safetensors file format: read the header, write a file tensor by tensor.

A file is an 8-byte little-endian header length, a JSON header that gives each tensor its dtype,
shape and byte range, and the bytes. Only the header is read here; tensors are mapped when used.

Source: the format description in the safetensors repository's README.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from llama4_jax.checkpoint.source import StoredTensor

_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000
"""Bytes; the limit of the reference implementation."""


def read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file without reading their values.

    Raises:
      ValueError: the file is truncated, is not safetensors, or a tensor has a dtype other than
        BF16, F16, F32 and F8_E4M3.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise ValueError(
                f"{path} is truncated or not safetensors: its header should have {length} bytes "
                f"and the whole file has {size}"
            )
        if length > _MAX_HEADER:
            raise ValueError(f"{path}: a header of {length} bytes exceeds {_MAX_HEADER}")
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not safetensors: its header is not JSON") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not safetensors: its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    for name, tensor in tensors.items():
        end = tensor.offset + _num_bytes(tensor.shape, tensor.dtype)
        if end > size:
            raise ValueError(
                f"{path} is truncated: {name} {tensor.shape} ends at byte {end} and the file has "
                f"{size}"
            )
    return tensors


def _entry(path: pathlib.Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype_name, shape, (begin, end) = (entry[k] for k in ("dtype", "shape", "data_offsets"))
        shape = tuple(int(n) for n in shape)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: {name} has a malformed header entry {entry!r}") from error
    if dtype_name not in _DTYPES:
        raise ValueError(
            f"{path}: {name} has dtype {dtype_name}; only {', '.join(_DTYPES)} can be read"
        )
    dtype = _DTYPES[dtype_name]
    if begin < 0 or min(shape, default=1) < 1 or end - begin != _num_bytes(shape, dtype):
        raise ValueError(
            f"{path}: {name} has bytes {begin} to {end}, but {dtype_name}{list(shape)} takes "
            f"{_num_bytes(shape, dtype)}"
        )
    return StoredTensor(path=path, offset=data_start + begin, shape=shape, dtype=dtype)


def _num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def write_file(
    path: pathlib.Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    values: Iterable[Iterator[np.ndarray]],
) -> None:
    """Write a safetensors file, taking the values of one tensor after another in blocks.

    Args:
      path: of the new file.
      tensors: shape and dtype of every tensor by name, in file order.
      values: for each tensor its values in C order, cut into arrays of any size.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in tensors.items():
        end = offset + _num_bytes(shape, dtype)
        entry = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        header[name] = entry
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for blocks in values:
            for block in blocks:
                file.write(block.reshape(-1).view(np.uint8).data)
        assert file.tell() == 8 + len(text) + offset, f"{path}: values do not fill their tensors"
