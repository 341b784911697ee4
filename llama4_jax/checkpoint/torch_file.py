"""PyTorch's zip checkpoint format, read and written without PyTorch and without running pickles.

Such a file is an uncompressed zip with one pickle, `data.pkl`, that describes tensors, and one
member per storage. `torch_pickle.py` says how the pickle is read.
"""

import io
import math
import pathlib
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from llama4_jax.checkpoint.file_tensors import FileTensor
from llama4_jax.checkpoint.torch_pickle import (
    STORAGES,
    TensorDescription,
    TorchFileError,
    read_descriptions,
)
from llama4_jax.untrusted import refuse_pointer, shown

_STORAGE_NAMES = {dtype: name for name, dtype in reversed(STORAGES.items())}

_MAX_PICKLE = 8 << 20
"""Largest description of tensors; that of ten thousand tensors has 3 MB."""
_ALIGNMENT = 64


def read_tensors(path: pathlib.Path) -> dict[str, FileTensor]:
    """Return where the tensors of a file written by `torch.save` lie; their values are not read.

    Entries that are not tensors (io.BytesIO, numbers, None) are left out, and so are empty tensors.

    Raises:
      TorchFileError: the file is truncated, not in the zip format, compressed, or its pickle needs
        more than tensor descriptions.
    """
    try:
        return _read(path)
    except TorchFileError:
        raise
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, struct.error) as error:
        raise TorchFileError(
            f"{path} is truncated or not in torch.save's zip format ({path.stat().st_size} bytes): "
            f"{str(error)[:200]}"
        ) from error


def _read(path: pathlib.Path) -> dict[str, FileTensor]:
    with path.open("rb") as file:
        refuse_pointer(path, file.read(64))
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if name.split("/")[-1] == "data.pkl"]
            if len(pickles) != 1:
                raise TorchFileError(f"{path} is not in torch.save's zip format: no one data.pkl")
            root = pickles[0].removesuffix("data.pkl")
            order = members.get(root + "byteorder")
            if order and _read_member(archive, order, path, len("little")) != b"little":
                raise TorchFileError(f"{path} is of a big-endian machine, which is not supported")
            data = _read_member(archive, members[pickles[0]], path, _MAX_PICKLE)
        offsets = _Offsets(file, path, {k.removeprefix(root): m for k, m in members.items()})
        return {
            name: offsets.locate(name, tensor)
            for name, tensor in read_descriptions(data, path).items()
            if 0 not in tensor.shape
        }


def _read_member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: pathlib.Path, most: int
) -> bytes:
    """Read a member that torch.save would have written, so that it is as large as it says."""
    if member.compress_type != zipfile.ZIP_STORED or member.file_size > most:
        raise TorchFileError(
            f"{path}: {shown(member.filename)} is compressed or has over {most} bytes; "
            "torch.save writes neither"
        )
    return archive.read(member)


class _Offsets:
    """Finds the bytes of tensors inside the zip file."""

    def __init__(self, file: io.BufferedReader, path: pathlib.Path, members: dict) -> None:
        self._file, self._path, self._members = file, path, members
        self._size = path.stat().st_size

    def locate(self, name: str, tensor: TensorDescription) -> FileTensor:
        member = self._members.get(f"data/{tensor.storage}")
        if member is None or member.compress_type != zipfile.ZIP_STORED:
            raise TorchFileError(
                f"{self._path}: the storage of {shown(name)} is absent or compressed"
            )
        spans = zip(tensor.shape, tensor.strides, strict=True)
        reach = 1 + sum((n - 1) * stride for n, stride in spans)
        end = (tensor.offset + reach) * tensor.dtype.itemsize
        negative = min((*tensor.strides, *tensor.shape, tensor.offset), default=0) < 0
        start = self._data_start(member)
        if negative or end > member.file_size or start + member.file_size > self._size:
            raise TorchFileError(
                f"{self._path}: {shown(name)} {tensor.shape} needs {end} bytes of its storage, "
                f"which has {member.file_size}"
            )
        return FileTensor(
            path=self._path,
            offset=start + tensor.offset * tensor.dtype.itemsize,
            shape=tensor.shape,
            dtype=tensor.dtype,
            strides=tensor.strides,
        )

    def _data_start(self, member: zipfile.ZipInfo) -> int:
        self._file.seek(member.header_offset)
        header = self._file.read(30)
        if header[:4] != b"PK\x03\x04":
            raise TorchFileError(
                f"{self._path} is damaged: {shown(member.filename)} is not where it should be"
            )
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        return member.header_offset + 30 + name_length + extra_length


class TensorFileWriter:
    """Writes a file that `torch.load(weights_only=True)` accepts, one tensor after another.

    Args:
      path: of the new file.
      tensors: shape and dtype of every tensor by name; `write` must be called once for each, in
        this order.
    """

    def __init__(
        self, path: pathlib.Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]
    ) -> None:
        self._file = path.open("wb")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._root = path.name.removesuffix(path.suffix)
        self._count = 0
        self._write("data.pkl", [_describe(tensors)])
        self._write("byteorder", [b"little"])

    def write(self, blocks: Iterable[np.ndarray]) -> None:
        """Write the next tensor's values, C order, cut into arrays of any size."""
        data = (block.reshape(-1).view(np.uint8).data for block in blocks)
        self._write(f"data/{self._count}", data)
        self._count += 1

    def _write(self, name: str, data: Iterable[Any]) -> None:
        info = zipfile.ZipInfo(f"{self._root}/{name}")
        # The local header is 30 bytes, the name, our padding and a 20-byte zip64 field.
        start = self._file.tell() + 30 + len(info.filename) + 20 + 4
        info.extra = struct.pack("<HH", 0x4246, padding := -start % _ALIGNMENT) + b"Z" * padding
        with self._zip.open(info, "w", force_zip64=True) as member:
            for block in data:
                member.write(block)

    def close(self) -> None:
        self._write("version", [b"3\n"])
        self._zip.close()
        self._file.close()

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._zip.fp = None  # or it writes its end when it is collected
            self._file.close()


def _describe(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """Return the pickle of an ordered dictionary of tensors, each with a storage of its own."""
    parts = [b"\x80\x02", _global("collections OrderedDict"), b")R", b"("]
    for count, (name, (shape, dtype)) in enumerate(tensors.items()):
        parts += [_text(name), *_tensor(str(count), shape, dtype)]
    return b"".join([*parts, b"u."])


def _tensor(key: str, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[bytes]:
    numel = math.prod(shape)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    storage = _global(f"torch {_STORAGE_NAMES[dtype]}")
    yield _global("torch._utils _rebuild_tensor_v2") + b"("
    yield b"(" + _text("storage") + storage + _text(key) + _text("cpu") + _integer(numel) + b"tQ"
    yield _integer(0)
    for numbers in (shape, strides):
        yield b"(" + b"".join(_integer(n) for n in numbers) + b"t"
    yield b"\x89" + _global("collections OrderedDict") + b")R" + b"tR"


def _global(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(data)]) + data
