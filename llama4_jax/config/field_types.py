"""The types that a config's fields declare, held to: configs also come from files of others."""

import dataclasses
import types
from typing import Any, Literal, get_args, get_origin

from llama4_jax.untrusted import shown

_MEANING = {
    int: "a whole number below 2**31",
    float: "a finite number",
    bool: "True or False",
    str: "a text",
    tuple: "a tuple of whole numbers",
    types.NoneType: "None",
}


def require_types(config: Any) -> None:
    """Refuse a value that is not of its field's type, is not finite, or out of all proportion.

    Args:
      config: a dataclass whose fields are numbers, texts, tuples of whole numbers, choices of
        texts, other dataclasses, or None.

    Raises:
      ValueError: names the field, its value and what it must be.
    """
    for field in dataclasses.fields(config):
        declared: Any = field.type
        kinds = get_args(declared) if isinstance(declared, types.UnionType) else (declared,)
        value = getattr(config, field.name)
        if not any(_is_of(value, kind) for kind in kinds):
            expected = " or ".join(map(_meaning, kinds))
            name = f"{type(config).__name__}.{field.name}"
            raise ValueError(f"{name} ({shown(value)}) must be {expected}")


def _is_of(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(item, int) for item in value)
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) < 1e300
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31
    return isinstance(value, kind)


def _meaning(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return _MEANING.get(get_origin(kind) or kind, f"a {getattr(kind, '__name__', kind)}")
