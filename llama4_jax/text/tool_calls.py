"""Tool calls in the three forms that Llama 4 writes.

* json: `{"type": "function", "name": "f", "parameters": {"x": 1}}`, one after another;
* function_tag: `<function=f>{"x": 1}</function>`, one after another;
* python_list: `[f(x=1), g(s="a")]`, the form that Llama 4 prefers.

Two kinds of tools have a form of their own whatever the choice: the search tools,
`brave_search.call(query="..")`, and the code interpreter, whose code stands between the special
tokens python_start and python_end. `tool_call_reader.py` reads all of them.

Source: `encode_tool_call` in `llama3/tool_utils.py` of Meta's `llama-models` package, 0.3.0. Where
that writes a Python list that cannot be read again (quotes in texts, objects, several calls), this
writes one that can; everything else is the same to the character, names such as `from` and
`max-results` too, which are no Python. Meta's package writes code without its two tokens, though it
reads it with them, as the model writes it: so does this.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from llama4_jax.text.messages import ToolCall

ToolFormat = Literal["json", "function_tag", "python_list"]

SEARCH_TOOLS = ("brave_search", "wolfram_alpha", "photogen")
CODE_INTERPRETER = "code_interpreter"


class Code(NamedTuple):
    """A stretch of an assistant's message between python_start and python_end."""

    text: str


def write_calls(calls: Sequence[ToolCall], form: ToolFormat) -> list[str | Code]:
    """Write calls as texts and code, in order.

    Raises:
        ValueError: The form is unknown, or cannot say a name or a value.
    """
    if form not in ("json", "function_tag", "python_list"):
        raise ValueError(f"tool_format must be json, function_tag or python_list, not {form!r}.")
    pieces: list[str | Code] = []
    listed: list[str] = []
    for call in calls:
        own = _write_own_form(call)
        if own is None and form == "python_list":
            listed.append(_write_python_call(call))
            continue
        if listed:
            pieces.append(f"[{', '.join(listed)}]")
            listed = []
        pieces.append(own or _write_json_call(call, form))
    if listed:
        pieces.append(f"[{', '.join(listed)}]")
    return pieces


def _write_own_form(call: ToolCall) -> str | Code | None:
    """Write a search or code; None for a call of any other function."""
    values = list(call.arguments.values())
    if len(values) != 1 or not isinstance(values[0], str):
        return None
    if call.name == CODE_INTERPRETER:
        return Code(values[0])
    if call.name in SEARCH_TOOLS and "query" in call.arguments:
        return f"{call.name}.call(query={json.dumps(values[0], ensure_ascii=False)})"
    return None


def _write_json_call(call: ToolCall, form: ToolFormat) -> str:
    if form == "json":
        value = {"type": "function", "name": call.name, "parameters": call.arguments}
        return json.dumps(value, allow_nan=False)
    if not re.fullmatch(r"[^<>{}\s]+", call.name):
        raise ValueError(f"A tag cannot say the name {call.name!r}; use tool_format='json'.")
    return f"<function={call.name}>{json.dumps(call.arguments, allow_nan=False)}</function>"


def _write_python_call(call: ToolCall) -> str:
    if not all(is_word(word) for word in call.name.split(".")):
        raise ValueError(
            f"A Python list cannot say the name {call.name!r}; use tool_format='json'."
        )
    words = {k: v for k, v in call.arguments.items() if is_word(k)}
    others = {k: v for k, v in call.arguments.items() if k not in words}
    arguments = [f"{k}={python_literal(v)}" for k, v in words.items()]
    if others:
        arguments.append(f"**{python_literal(others)}")
    return f"{call.name}({', '.join(arguments)})"


def is_word(name: str) -> bool:
    """Tell whether a Python list may name an argument or a part of a function so."""
    return not name.startswith("-") and name.replace("-", "_").isidentifier()


def python_literal(value: Any) -> str:
    """Write a JSON value as Python, texts in double quotes.

    Raises:
        ValueError: JSON has no such value.
    """
    if value is None or isinstance(value, bool | int):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        items = (f"{python_literal(k)}: {python_literal(v)}" for k, v in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(python_literal, value))}]"
    raise ValueError(f"An argument of a tool call must be a JSON value, not {value!r}.")
