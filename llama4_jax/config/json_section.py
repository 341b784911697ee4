"""Reading of JSON configuration files with errors that name the file, the key and the remedy."""

from collections.abc import Mapping
from typing import Any

from llama4_jax.config.model import TextConfig

EXTRAS_KEY = "llama4_jax"
"""A key of ours in a foreign file for what that format cannot say; other readers skip it."""

_MISSING = object()


class Section:
    """One JSON object of a config file, read key by key with errors that name file and key."""

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"{where} must be a JSON object, not {values!r}")
        self.values = values
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of `key`; null and absent are both `default`."""
        value = self.values.get(key)
        return default if value is None else value

    def fail(self, key: str, expected: str) -> ValueError:
        return ValueError(f"{self.where}: {key} ({self.values.get(key)!r}) must be {expected}")

    def integer(self, key: str, default: Any = _MISSING) -> Any:
        """Return a whole number; 8192.0 counts as one, a boolean does not."""
        value = self._found(key, default, "a whole number")
        if value is default:
            return value
        whole = isinstance(value, int | float) and not isinstance(value, bool)
        if not whole or value != int(value):
            raise self.fail(key, "a whole number")
        return int(value)

    def number(self, key: str, default: Any = _MISSING) -> Any:
        """Return a float."""
        value = self._found(key, default, "a number")
        if value is default:
            return value
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.fail(key, "a number")
        return float(value)

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
