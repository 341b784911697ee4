"""PyTorch's zip checkpoint format, read and written without PyTorch and without running pickles.

Such a file is an uncompressed zip with one pickle, `data.pkl`, that describes tensors, and one
member per storage. Reading scans the pickle's opcodes first and refuses any global that is not
needed to describe tensors, by name; what is left can only build containers of descriptions.
"""

import collections
import io
import math
import pathlib
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama4_jax.checkpoint.file_tensors import FileTensor

_STORAGES = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "HalfStorage": np.dtype(np.float16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "UntypedStorage": np.dtype(np.uint8),
}
_NEW_DTYPES = {"float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn)}
_STORAGE_NAMES = {dtype: name for name, dtype in reversed(_STORAGES.items())}

_FUNCTIONS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")

_MAX_PICKLE = 256 << 20
_ALIGNMENT = 64
_FORBIDDEN_OPCODES = {"INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX", "PERSID", "NEXT_BUFFER"}


# Whatever a pickle may build from a global is an immutable tuple: its BUILD opcode has nothing to
# change.


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


class _Marker(NamedTuple):
    """Stands for a name of PyTorch's: a dtype, or a function that makes a description."""

    name: str
    dtype: np.dtype | None = None

    def __call__(self, *args: Any) -> Any:
        if self.name == "_rebuild_parameter":
            return args[0]
        if self.name == "encode":  # how old pickles spell bytes
            return str(args[0]).encode("latin1")
        storage, offset, shape, strides = args[:4]
        if self.dtype is not None or not isinstance(storage, _Storage):
            raise pickle.UnpicklingError(f"{self.name} is called with {args!r}")
        dtype = storage.dtype
        if self.name == "_rebuild_tensor_v3":
            dtype = args[6].dtype
        numbers = tuple(int(n) for n in shape), tuple(int(n) for n in strides)
        return _Tensor(storage, int(offset), *numbers, dtype)


def _allowed() -> dict[tuple[str, str], object]:
    allowed: dict[tuple[str, str], object] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("_io", "BytesIO"): io.BytesIO,
        ("io", "BytesIO"): io.BytesIO,
        ("_codecs", "encode"): _Marker("encode"),
    }
    for name in _FUNCTIONS:
        allowed["torch._utils", name] = _Marker(name)
    for name, dtype in (*_STORAGES.items(), *_NEW_DTYPES.items()):
        allowed["torch", name] = allowed["torch.storage", name] = _Marker(name, dtype)
    return allowed


class _Unpickler(pickle.Unpickler):
    """Builds containers of tensor descriptions; every other global is refused by name."""

    def __init__(self, data: bytes, path: pathlib.Path) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path
        self._allowed = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise _refusal(self._path, f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, numel = pid
        if kind != "storage" or not isinstance(storage, _Marker) or storage.dtype is None:
            raise pickle.UnpicklingError(f"unknown persistent object {pid!r}")
        return _Storage(storage.dtype, str(key), int(numel))


class _RefusedError(ValueError):
    pass


def _refusal(path: pathlib.Path, name: str) -> _RefusedError:
    return _RefusedError(
        f"{path} is refused: its pickle asks for {name}, which no checkpoint of tensors needs and "
        "which could run code"
    )


def _check_opcodes(data: bytes, path: pathlib.Path) -> None:
    """Refuse a pickle that names a foreign global or would allocate far more than its own size."""
    allowed = _allowed()
    strings: list[object] = []
    for opcode, arg, _ in pickletools.genops(data):
        if opcode.name in _FORBIDDEN_OPCODES:
            raise _refusal(path, f"opcode {opcode.name}")
        if opcode.name == "GLOBAL":
            module, _, name = str(arg).partition(" ")
            if (module, name) not in allowed:
                raise _refusal(path, f"{module}.{name}")
        if opcode.name == "STACK_GLOBAL" and tuple(strings[-2:]) not in allowed:
            raise _refusal(path, ".".join(map(str, strings[-2:])))
        if opcode.name in ("LONG_BINPUT", "PUT") and int(str(arg)) > len(data):
            raise _refusal(path, f"memo slot {arg}")
        if isinstance(arg, str):
            strings.append(arg)


def read_tensors(path: pathlib.Path) -> dict[str, FileTensor]:
    """Return where the tensors of a file written by `torch.save` lie; their values are not read.

    Entries that are not tensors (io.BytesIO, numbers, None) are left out, and so are empty tensors.

    Raises:
      ValueError: the file is truncated, not in the zip format, compressed, or its pickle needs more
        than tensor descriptions.
    """
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path} is truncated or not in torch.save's zip format ({path.stat().st_size} bytes)"
        ) from error
    with archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1 or members[pickles[0]].file_size > _MAX_PICKLE:
            raise ValueError(f"{path} is not in torch.save's zip format: no single data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        order = root + "byteorder"
        if order in members and archive.read(order) != b"little":
            raise ValueError(f"{path} was written on a big-endian machine, which is not supported")
        content = _unpickle(archive, pickles[0], path)
        with path.open("rb") as file:
            offsets = _Offsets(file, path, {k.removeprefix(root): m for k, m in members.items()})
            return {
                str(name): offsets.locate(str(name), value)
                for name, value in content.items()
                if isinstance(value, _Tensor) and math.prod(value.shape)
            }


_DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, EOFError, TypeError, ValueError, LookupError),
    *(AttributeError, ArithmeticError, RuntimeError, MemoryError, struct.error),
)
"""What reading an arbitrary byte string as a pickle can raise."""


def _unpickle(archive: zipfile.ZipFile, name: str, path: pathlib.Path) -> Mapping[Any, Any]:
    try:
        data = archive.read(name)
        _check_opcodes(data, path)
        content = _Unpickler(data, path).load()
    except _RefusedError:
        raise
    except _DAMAGE as error:
        raise ValueError(f"{path} holds a damaged description of tensors: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a dictionary of tensors, not {type(content).__name__}")
    return content


class _Offsets:
    """Finds the bytes of tensors inside the zip file."""

    def __init__(self, file: io.BufferedReader, path: pathlib.Path, members: dict) -> None:
        self._file, self._path, self._members = file, path, members
        self._size = path.stat().st_size

    def locate(self, name: str, tensor: _Tensor) -> FileTensor:
        member = self._members.get(f"data/{tensor.storage.key}")
        if member is None or member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{self._path}: the storage of {name} is absent or compressed")
        spans = zip(tensor.shape, tensor.strides, strict=True)
        reach = 1 + sum((n - 1) * stride for n, stride in spans)
        end = (tensor.offset + reach) * tensor.dtype.itemsize
        negative = min((*tensor.strides, *tensor.shape, tensor.offset), default=0) < 0
        start = self._data_start(member)
        if negative or end > member.file_size or start + member.file_size > self._size:
            raise ValueError(
                f"{self._path}: {name} {tensor.shape} needs {end} bytes of its storage, which has "
                f"{member.file_size}"
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
            raise ValueError(
                f"{self._path} is damaged: {member.filename} is not where it should be"
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
