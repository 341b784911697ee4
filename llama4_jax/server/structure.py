"""Structured answers: what `response_format`, `structured_outputs` and `tool_choice` ask for."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama4_jax.server.errors import ApiError
from llama4_jax.server.fields import Fields

Form = dict[str, Any]
"""The field of Options that holds an answer to a form; empty where it is free."""

_FIELDS = {"json": "json_schema", "regex": "regex", "choice": "choices", "grammar": "grammar"}


def read_form(fields: Fields) -> Form:
    """Read `response_format` and `structured_outputs`.

    Raises:
      ApiError: both are given, or one is malformed.
    """
    form, structured = fields.inner("response_format"), fields.inner("structured_outputs")
    found: list[Form] = []
    if form is not None:
        kind = form.text("type")
        if kind == "json_object":
            found.append({"json_schema": {"type": "object"}})
        elif kind == "json_schema":
            inner = form.inner("json_schema")
            schema = None if inner is None else inner.any("schema")
            if not isinstance(schema, Mapping):
                raise ApiError(
                    400, "response_format.json_schema.schema must be a JSON schema.",
                    param="response_format",
                )  # fmt: skip
            found.append({"json_schema": schema})
        elif kind != "text":
            raise form.wrong("type", "text, json_object or json_schema")
    for kind, ours in _FIELDS.items():
        value = None if structured is None else structured.any(kind)
        if value is None:
            continue
        if kind == "json" and isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                assert structured is not None
                raise structured.wrong("json", "a JSON schema") from None
        found.append({ours: value})
    if len(found) > 1:
        raise ApiError(
            400, "response_format and structured_outputs ask for more than one form; give one.",
            param="structured_outputs",
        )  # fmt: skip
    return found[0] if found else {}


def call_form(tools: Sequence[Mapping[str, Any]], choice: str) -> Form:
    """Return what makes an answer call a tool, if `tool_choice` asks for that."""
    if choice in ("none", "auto"):
        return {}
    functions = [tool["function"] for tool in tools]
    if choice != "required":
        functions = [function for function in functions if function["name"] == choice]
    calls = [
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "name": {"const": function["name"]},
                "parameters": function.get("parameters") or {"type": "object"},
            },
            "required": ["type", "name", "parameters"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    return {"json_schema": calls[0] if len(calls) == 1 else {"anyOf": calls}}
