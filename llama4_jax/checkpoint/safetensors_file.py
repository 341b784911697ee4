"""safetensors files through the safetensors package: tensors found to be mapped, written in blocks.

The package's numpy front end copies what it reads and cannot return FP8, and its writer wants all
values at once. So it reads and checks the header here, and the tensors are mapped where it says
they are; and it lays a new file out from zeros that take no memory, which are then overwritten.
"""

import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file

from llama4_jax.checkpoint.file_tensors import FileTensor
from llama4_jax.untrusted import parse_json, refuse_pointer, shown

_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}


def read_header(path: pathlib.Path) -> dict[str, FileTensor]:
    """Return the tensors of a safetensors file without reading their values.

    Raises:
      ValueError: the file is truncated, is not safetensors, or a tensor has a dtype other than
        BF16, F16, F32 and F8_E4M3.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            # In the order of their bytes, which follow each other without gaps to the file's end.
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            entries = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except SafetensorError as error:
        raise ValueError(_explain(path, error)) from error
    for name, (dtype, shape) in entries.items():
        if dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise ValueError(f"{path}: {shown(name)} has dtype {dtype}; only {known} can be read")
        if 0 in shape:
            raise ValueError(f"{path}: {shown(name)} has shape {shown(shape)}, which holds nothing")
    sizes = [math.prod(shape) * _DTYPES[dtype].itemsize for dtype, shape in entries.values()]
    offset = path.stat().st_size - sum(sizes)
    tensors = {}
    for (name, (dtype, shape)), size in zip(entries.items(), sizes, strict=True):
        tensors[name] = FileTensor(path=path, offset=offset, shape=shape, dtype=_DTYPES[dtype])
        offset += size
    return tensors


def _explain(path: pathlib.Path, error: SafetensorError) -> str:
    """Say what is wrong with a file that the package refuses; of a cut one, which tensor is cut."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        refuse_pointer(path, head)
        length = int.from_bytes(head[:8], "little")
        if length > size - 8:
            return (
                f"{path} is truncated or not safetensors: its header should have {length} bytes "
                f"and the whole file has {size}"
            )
        file.seek(8)
        text = file.read(length)
    try:
        header = parse_json(text, "the header")
        ends = {key: 8 + length + e["data_offsets"][1] for key, e in header.items() if "dtype" in e}
        name = min((key for key in ends if ends[key] > size), key=ends.__getitem__)
        what = f"{shown(name)} {shown(tuple(header[name]['shape']))} ends at byte {ends[name]}"
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return f"{path} is not safetensors: {str(error)[:200]}"
    return f"{path} is truncated: {what} and the file has {size}"


def write_file(
    path: pathlib.Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    values: Iterable[Iterator[np.ndarray]],
) -> None:
    """Write a safetensors file, taking the values of one tensor after another in blocks.

    Args:
      path: of the new file.
      tensors: shape and dtype of every tensor by name.
      values: for each tensor its values in C order, cut into arrays of any size.

    Raises:
      OSError: it cannot be written, for example because the disk is full.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in tensors.items()}
    zeros = np.zeros(max(sizes.values()), np.uint8)  # never written to, so it takes no memory
    specs = {
        name: TensorSpec(
            dtype=dtype.name,
            shape=list(shape),
            data_ptr=zeros.ctypes.data,
            data_len=sizes[name],
        )
        for name, (shape, dtype) in tensors.items()
    }
    try:
        serialize_file(specs, path, metadata={"format": "pt"})
    except SafetensorError as error:  # whatever the operating system says, a full disk above all
        raise OSError(f"{path} cannot be written: {error}") from error
    places = {name: tensor.offset for name, tensor in read_header(path).items()}
    with path.open("r+b") as file:
        for name, blocks in zip(tensors, values, strict=True):
            file.seek(places[name])
            for block in blocks:
                file.write(block.reshape(-1).view(np.uint8).data)
            end = places[name] + sizes[name]
            assert file.tell() == end, f"{path}: the values of {name} do not fill it"
