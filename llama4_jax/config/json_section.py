"""Reading of JSON configuration files with errors that name the file, the key and the remedy."""

from collections.abc import Mapping
from typing import Any

from llama4_jax.config.model import TextConfig
from llama4_jax.untrusted import shown

EXTRAS_KEY = "llama4_jax"
"""A key of ours in a foreign file for what that format cannot say; other readers skip it."""

MAX_INTEGER = 2**31 - 1
MAX_NUMBER = 1e30
"""Largest numbers that a config may have; what is computed from them stays finite."""

_MISSING = object()


class Section:
    """One JSON object of a config file, read key by key with errors that name file and key."""

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"{where} must be a JSON object, not {shown(values)}")
        self.values = values
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of `key`; null and absent are both `default`."""
        value = self.values.get(key)
        return default if value is None else value

    def fail(self, key: str, expected: str) -> ValueError:
        value = self.values.get(key)
        return ValueError(f"{self.where}: {key} ({shown(value)}) must be {expected}")

    def integer(self, key: str, default: Any = _MISSING, *, least: int = 0) -> Any:
        """Return a whole number of at least `least`; 8192.0 counts as one, a boolean does not."""
        expected = f"a whole number from {least} to {MAX_INTEGER}"
        value = self._found(key, default, expected)
        if value is default:
            return value
        if not _is_number(value) or not least <= value <= MAX_INTEGER or value != int(value):
            raise self.fail(key, expected)
        return int(value)

    def number(self, key: str, default: Any = _MISSING, *, positive: bool = False) -> Any:
        """Return a float."""
        expected = "a finite number" + " above 0" * positive
        value = self._found(key, default, expected)
        if value is default:
            return value
        if not _is_number(value) or abs(value) > MAX_NUMBER or (positive and value <= 0):
            raise self.fail(key, expected)
        return float(value)

    def text(self, key: str, default: str) -> Any:
        """Return a text."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.fail(key, "a text")
        return value

    def items(self, key: str, expected: str) -> list[Any] | None:
        """Return a list, or None where there is none."""
        value = self.get(key)
        if not isinstance(value, list | tuple | None):
            raise self.fail(key, expected)
        return None if value is None else list(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """Return a switch; early Hugging Face configs spell true as a number, such as 4."""
        value = self.get(key, default)
        if not isinstance(value, bool | int):
            raise self.fail(key, "true or false")
        return bool(value)

    def section(self, key: str) -> "Section":
        return Section(self.get(key, {}), f"{self.where} {key}")

    def _found(self, key: str, default: Any, expected: str) -> Any:
        value = self.get(key, default)
        if value is _MISSING:
            raise ValueError(f"{self.where}: {key} is missing; it must be {expected}")
        return value


def _is_number(value: object) -> bool:
    """Return whether a JSON value is a number; NaN is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def refuse_balance_bias(text: TextConfig, file: str) -> None:
    """Refuse to describe in a foreign file a model that its readers would run as another.

    Raises:
      ValueError: the model has balance biases.
    """
    if text.balance_bias:
        raise ValueError(
            f"the routers' balance_bias cannot be expressed by {file}, nor stored beside it: "
            "released models have none, and readers of that layout would choose other experts; "
            "convert to the orbax layout instead, or train with a balance_bias_rate of 0"
        )
