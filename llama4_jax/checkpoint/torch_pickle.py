"""The pickle inside PyTorch's files, followed without being run.

A pickle is a program for a machine with a stack. The machine here makes texts, numbers, tuples,
dictionaries and descriptions of tensors; of everything else that a checkpoint may hold it only
knows that it is there. A global that no checkpoint of tensors needs is refused by name, and so is
an instruction. Tuples may contain one another many times over, so that a short pickle stands for a
vast value: no value is ever printed, encoded, hashed or compared as a whole.
"""

import pathlib
import pickletools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama4_jax.untrusted import shown

STORAGES = {
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
_REBUILDERS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
_MAX_DIMENSIONS = 32


class TensorDescription(NamedTuple):
    """What a pickle says of a tensor: its place in a storage, in elements.

    Nothing of it has been compared with the storage.
    """

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str


class _Global(NamedTuple):
    """A name of PyTorch's or of Python's that describing tensors needs."""

    name: str
    dtype: np.dtype | None = None


class _Other:
    """Something that is no part of a tensor."""


_OTHER = _Other()

_GLOBALS = {
    ("collections", "OrderedDict"): _Global("OrderedDict"),
    ("_io", "BytesIO"): _Global("BytesIO"),
    ("io", "BytesIO"): _Global("BytesIO"),
    ("_codecs", "encode"): _Global("encode"),  # how old pickles spell bytes
    **{("torch._utils", name): _Global(name) for name in (*_REBUILDERS, "_rebuild_parameter")},
    **{
        (module, name): _Global(name, dtype)
        for module in ("torch", "torch.storage")
        for name, dtype in (*STORAGES.items(), *_NEW_DTYPES.items())
    },
}


class TorchFileError(ValueError):
    """A file of PyTorch's that cannot be read; the message begins with its path."""


def read_descriptions(data: bytes, path: pathlib.Path) -> dict[str, TensorDescription]:
    """Return the tensors of the dictionary that a pickle makes; its other entries are left out.

    Args:
      data: the pickle.
      path: of its file, for messages.

    Raises:
      TorchFileError: it asks for more than tensors need (the message says for what), is damaged, or
        makes no dictionary.
    """
    machine = _Machine(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in texts of Python 2
            for opcode, argument, _ in pickletools.genops(data):
                machine.step(opcode.name, argument)
        content = machine.stack.pop()
        if isinstance(content, dict):
            return {str(k): v for k, v in content.items() if isinstance(v, TensorDescription)}
    except TorchFileError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise TorchFileError(
            f"{path} holds a damaged description of tensors: {str(error)[:200]}"
        ) from error
    raise TorchFileError(f"{path} must hold a dictionary of tensors, not {type(content).__name__}")


class _Machine:
    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Follow one instruction."""
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            self.stack.append(_OTHER if isinstance(argument, bytes | bytearray) else argument)
        elif name in _TUPLES:
            self.make_tuple(_TUPLES[name])
        elif name in _STEPS:
            _STEPS[name](self, argument)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise self._refusal(f"the instruction {name}")

    def since_mark(self) -> list[Any]:
        """Take what was pushed since the last mark."""
        start = self._marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def mark(self, _: Any) -> None:
        self._marks.append(len(self.stack))

    def pop(self, _: Any) -> None:
        self.stack.pop()

    def duplicate(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def remember(self, slot: Any) -> None:
        self._memo[len(self._memo) if slot is None else int(slot)] = self.stack[-1]

    def recall(self, slot: Any) -> None:
        self.stack.append(self._memo[int(slot)])

    def make_tuple(self, length: int | None) -> None:
        if length is not None:
            self._marks.append(max(0, len(self.stack) - length))
        self.stack.append(tuple(self.since_mark()))

    def make_empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def make_dict(self, _: Any) -> None:
        self.stack.append(_put({}, self.since_mark()))

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _put(self.stack[-1], [key, value])

    def set_items(self, _: Any) -> None:
        items = self.since_mark()
        _put(self.stack[-1], items)

    def drop_marked(self, _: Any) -> None:
        self.since_mark()

    def gather(self, _: Any) -> None:
        """Make something of what was pushed since the last mark."""
        self.since_mark()
        self.stack.append(_OTHER)

    def name(self, argument: Any) -> None:
        """Push a global, whose module and name are the argument or lie on the stack."""
        if argument is None:
            spelled = self.stack[-2:]
            del self.stack[-2:]
            if not all(isinstance(word, str) for word in spelled):
                raise ValueError("a global has no name")
            argument = " ".join(spelled)
        module, _, name = argument.partition(" ")
        if (module, name) not in _GLOBALS:
            raise self._refusal(f"{module}.{name}")
        self.stack.append(_GLOBALS[module, name])

    def storage(self, _: Any) -> None:
        kind, storage, key, _, _ = self.stack.pop()
        if kind != "storage" or not isinstance(storage, _Global) or storage.dtype is None:
            raise ValueError("a persistent object is no storage")
        if not isinstance(key, str):
            raise ValueError("the key of a storage is no text")
        self.stack.append(_Storage(storage.dtype, key))

    def call(self, _: Any) -> None:
        """Make what a global makes of arguments."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("something is called that is no function")
        if function.name == "OrderedDict":
            self.stack.append({})
        elif function.name == "_rebuild_parameter":
            self.stack.append(arguments[0])
        elif function.name in _REBUILDERS:
            self.stack.append(_describe(function.name, arguments))
        else:
            self.stack.append(_OTHER)

    def _refusal(self, what: str) -> TorchFileError:
        return TorchFileError(
            f"{self._path} is refused: its pickle asks for {shown(what)[1:-1]}, which no "
            "checkpoint of tensors needs and which could run code"
        )


def _put(target: Any, items: Sequence[Any]) -> Any:
    """Enter keys and values, which alternate; a key that is neither text nor number is left out."""
    if isinstance(target, dict):
        pairs = zip(items[::2], items[1::2], strict=True)
        target.update((k, v) for k, v in pairs if isinstance(k, str | int))
    return target


def _describe(function: str, arguments: tuple[Any, ...]) -> TensorDescription:
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, _Storage):
        raise ValueError(f"{function} is called without a storage")
    dtype = arguments[6].dtype if function == "_rebuild_tensor_v3" else storage.dtype
    sizes = [offset, *shape, *strides]
    if dtype is None or not all(type(n) is int and abs(n) < 2**63 for n in sizes):
        raise ValueError(f"{function} is called with what are no sizes")
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{function} is called with {len(shape)} and {len(strides)} dimensions")
    return TensorDescription(storage.key, dtype, offset, tuple(shape), tuple(strides))


_CONSTANTS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
    "EMPTY_LIST": _OTHER,
    "EMPTY_SET": _OTHER,
}
_TUPLES = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    **dict.fromkeys(("POP", "APPEND", "BUILD"), _Machine.pop),
    **dict.fromkeys(("POP_MARK", "APPENDS", "ADDITEMS"), _Machine.drop_marked),
    **dict.fromkeys(("LIST", "FROZENSET"), _Machine.gather),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL"), _Machine.name),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call),
    "DUP": _Machine.duplicate,
    "EMPTY_DICT": _Machine.make_empty_dict,
    "DICT": _Machine.make_dict,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "BINPERSID": _Machine.storage,
}
