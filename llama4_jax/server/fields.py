"""The fields of requests over HTTP: read, checked, and told which are ignored.

A field is honoured if something here reads it, ignored if it stands in IGNORED, refused if in
REFUSED; any other is unknown, and is ignored with a header that says so. README.md beside this file
lists all of them, and a test compares.
"""

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any

from llama4_jax.serve.options import Options
from llama4_jax.server.errors import ApiError
from llama4_jax.untrusted import shown

IGNORED = {
    "user": "",
    "store": "",
    "metadata": "",
    "service_tier": "",
    "safety_identifier": "",
    "prompt_cache_key": "the prefix cache needs no key; cache_salt keeps tenants apart",
    "prompt_cache_retention": "",
    "reasoning_effort": "",
    "verbosity": "",
}
"""Fields that change nothing, and why where it is not plain."""

REFUSED = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "this model neither hears nor speaks",
    "prediction": "the server drafts tokens by itself with --speculate=ngram",
    "web_search_options": "the server reaches no network",
    "suffix": "this model does not fill in the middle",
    "best_of": "use n, and choose yourself",
    "use_beam_search": "use n with a temperature",
    "prompt_embeds": "give text or token ids",
    "truncate_prompt_tokens": "shorten the prompt before it is sent",
}
"""Fields that ask for what this server does not do, and what to do instead."""

DEFAULT_MAX_TOKENS = {"chat": 2048, "completion": 16}


class Fields:
    """A JSON object whose fields are read one by one; what nobody read is unknown.

    Raises:
      ApiError: it is no object, or has a refused field.
    """

    def __init__(self, body: Any, where: str = "") -> None:
        if not isinstance(body, Mapping):
            raise ApiError(400, f"the body must be a JSON object, not {shown(body)}.")
        self._body, self._where, self._read = body, where, set(IGNORED)
        for name, remedy in REFUSED.items():
            if body.get(name) not in (None, False):
                raise ApiError(400, f"{name} is not supported; {remedy}.", param=name)

    def __contains__(self, name: str) -> bool:
        return self.any(name) is not None

    def unknown(self) -> list[str]:
        """Return the fields that nobody read."""
        return sorted(str(name)[:64] for name in self._body.keys() - self._read - set(REFUSED))

    def wrong(self, name: str, must: str) -> ApiError:
        """Return the refusal of a field."""
        name = f"{self._where}{name}"
        value = shown(self._body.get(name.removeprefix(self._where)))
        return ApiError(400, f"{name} ({value}) must be {must}.", param=name)

    def rest(self) -> dict[str, Any]:
        """Return all fields, whatever they are."""
        return {str(name): self.any(name) for name in self._body}

    def any(self, name: str) -> Any:
        """Return a field's value; null counts as absent."""
        self._read.add(name)
        return self._body.get(name)

    def _typed(self, name: str, kind: Any, must: str, default: Any) -> Any:
        value = self.any(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.wrong(name, must)
        return value

    def text(self, name: str, default: str | None = None) -> Any:
        return self._typed(name, str, "a text", default)

    def whole(self, name: str, default: int | None = None) -> Any:
        value = self._typed(name, int | float, "a whole number", default)
        if isinstance(value, float):
            if not value.is_integer():
                raise self.wrong(name, "a whole number")
            value = int(value)
        return value

    def number(self, name: str, default: float | None = None) -> Any:
        return self._typed(name, int | float, "a number", default)

    def flag(self, name: str, default: bool = False) -> bool:
        return self._typed(name, bool, "true or false", default)

    def items(self, name: str) -> list[Any]:
        return self._typed(name, list, "a list", [])

    def inner(self, name: str) -> "Fields | None":
        """Return the fields of an object within; None if it is absent."""
        value = self._typed(name, Mapping, "an object", None)
        return None if value is None else Fields(value, f"{self._where}{name}.")


def read_options(fields: Fields, *, max_new_tokens: int, **others: Any) -> Options:
    """Read how a request is to be answered.

    Args:
      fields: of the request.
      max_new_tokens: of the answer.
      **others: fields of Options that the endpoint decides.

    Raises:
      ApiError: a value is not allowed; `param` names its field.
    """
    stop = fields.any("stop")
    values: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": fields.whole("min_tokens", 0),
        "temperature": fields.number("temperature"),
        "top_p": fields.number("top_p"),
        "top_k": fields.whole("top_k"),
        "min_p": fields.number("min_p"),
        "seed": fields.whole("seed", secrets.randbits(32)),
        "repetition_penalty": fields.number("repetition_penalty"),
        "presence_penalty": fields.number("presence_penalty", 0.0),
        "frequency_penalty": fields.number("frequency_penalty", 0.0),
        "logit_bias": _logit_bias(fields),
        "stop": () if stop is None else (stop,) if isinstance(stop, str) else stop,
        "include_stop": fields.flag("include_stop_str_in_output"),
        "stop_ids": fields.items("stop_token_ids"),
        "ignore_eos": fields.flag("ignore_eos"),
        "n": fields.whole("n", 1),
        "priority": fields.whole("priority", 0),
        "cache_salt": fields.text("cache_salt", ""),
        "skip_special": fields.flag("skip_special_tokens", True),
        **others,
    }
    if values["top_k"] == -1:  # as vLLM spells "all"
        values["top_k"] = 0
    try:
        return Options(**values)
    except (ValueError, TypeError) as error:
        raise named(error) from error


_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_ids": "stop_token_ids",
    "include_stop": "include_stop_str_in_output",
    "skip_special": "skip_special_tokens",
}
_KNOWN = {_NAMES.get(field.name, field.name) for field in dataclasses.fields(Options)}


def named(error: Exception) -> ApiError:
    """Return a refusal whose words are the client's, and which names the field."""
    message = str(error)
    for ours, theirs in _NAMES.items():
        message = message.replace(ours, theirs)
    first = message.split(" ", 1)[0].rstrip(":")
    return ApiError(400, message, param=first if first in _KNOWN else None)


def _logit_bias(fields: Fields) -> dict[int, Any]:
    given = fields.any("logit_bias")
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise fields.wrong("logit_bias", "an object that maps token ids to numbers")
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise fields.wrong("logit_bias", "an object that maps token ids to numbers") from None
