"""Find the tool calls of a text, whichever form they are written in, and all of them.

Python is parsed to a syntax tree, of which only literals are taken; nothing is evaluated.
"""

import ast
import json
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from llama4_jax.text.messages import ToolCall
from llama4_jax.text.tool_calls import CODE_INTERPRETER, SEARCH_TOOLS, is_word
from llama4_jax.untrusted import is_deep

_MAX_DEPTH = 64
_SEARCH = re.compile(r'(\w+)\.call\(query="((?:[^"\\]|\\.)*)"\)', re.DOTALL)
_SEARCH_LINE = re.compile(rf"^[ \t]*{_SEARCH.pattern}[ \t]*$", re.MULTILINE)
_TAG = re.compile(r"<function=([^<>{}\s]+)>\s*(?=\{)")
_TAG_END = re.compile(r"\s*</function>")
_SEPARATORS = re.compile(r"[\s;,]*")
_TEXT = r"""\"{3}(?:[^\\]|\\.)*?\"{3}|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'"""
_BRACKETS_AND_TEXTS = re.compile(rf"""[\[({{]|[\])}}]|{_TEXT}|["']""", re.DOTALL)
# Texts, and names of functions and arguments, which need not be Python's: `from`, `max-results`.
_TEXTS_AND_NAMES = re.compile(
    rf"(?P<text>{_TEXT})|(?<![\w.-])(?P<name>[^\W\d][\w.-]*+)(?=\s*\(|\s*=(?!=))", re.DOTALL
)
_FENCED = re.compile(
    r"\s*```[ \t]*(?:json|python|tool_code|tool_call)?[ \t]*\n(.*)\n[ \t]*```\s*", re.DOTALL
)
_WORDS = {"true": True, "false": False, "null": None}


class Found(NamedTuple):
    """What a text holds: the calls, and the text around them."""

    calls: tuple[ToolCall, ...]
    text: str


def find_calls(text: str) -> Found:
    """Find the calls of a text, in any of the forms.

    A text that is nothing but calls may use any form. In other text only what cannot be anything
    else is a call: a function tag, or a search alone on its line.

    Returns:
        The calls in order, numbered "call_0", "call_1", .., and the remaining text; the text
        unchanged when it has no call.
    """
    calls = _read_only_calls(text)
    if calls:
        return Found(_numbered(calls), "")
    spans = sorted([*_tags_within(text), *_searches_within(text)], key=lambda span: span[0])
    if not spans:
        return Found((), text)
    kept, position = [], 0
    for start, end, _ in spans:
        kept.append(text[position:start])
        position = max(position, end)
    kept.append(text[position:])
    return Found(_numbered([call for _, _, call in spans]), "".join(kept).strip())


def _numbered(calls: Sequence[ToolCall]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(c.name, c.arguments, f"call_{i}") for i, c in enumerate(calls))


def _read_only_calls(text: str) -> list[ToolCall]:
    """Read a text made of calls alone, fenced or not; nothing when anything else is in it."""
    calls: list[ToolCall] = []
    fenced = _FENCED.fullmatch(text)
    text = fenced[1] if fenced else text
    position = _after_separators(text, 0)
    while position < len(text):
        for read in (_read_json, _read_python_list, _read_search, _read_tag):
            found = read(text, position)
            if found is not None:
                new_calls, position = found
                calls.extend(new_calls)
                break
        else:
            return []
        position = _after_separators(text, position)
    return calls


def _after_separators(text: str, position: int) -> int:
    match = _SEPARATORS.match(text, position)
    return match.end() if match else position


def _tags_within(text: str) -> list[tuple[int, int, ToolCall]]:
    spans = []
    for match in _TAG.finditer(text):
        found = _read_tag(text, match.start())
        if found is not None:
            spans.append((match.start(), found[1], found[0][0]))
    return spans


def _searches_within(text: str) -> list[tuple[int, int, ToolCall]]:
    return [(m.start(), m.end(), _search_call(m)) for m in _SEARCH_LINE.finditer(text)]


type _Read = tuple[list[ToolCall], int] | None
"""The calls that start at a position and where they end, or None."""


def _read_search(text: str, position: int) -> _Read:
    match = _SEARCH.match(text, position)
    return None if match is None else ([_search_call(match)], match.end())


def _search_call(match: re.Match[str]) -> ToolCall:
    try:
        query = json.loads(f'"{match[2]}"', strict=False)
    except ValueError:  # a backslash that escapes nothing
        query = match[2]
    return ToolCall(match[1], {"query": query})


def _read_tag(text: str, position: int) -> _Read:
    match = _TAG.match(text, position)
    if match is None:
        return None
    found = _read_json_value(text, match.end()) or _read_python_object(text, match.end())
    if found is None or not isinstance(found[0], dict):
        return None
    arguments, end = found
    closing = _TAG_END.match(text, end)
    return [_call(match[1], arguments)], closing.end() if closing else end


def _read_json(text: str, position: int) -> _Read:
    """Read one JSON call, or a JSON list of them."""
    if text[position] not in "{[":
        return None
    found = _read_json_value(text, position)
    if found is None:
        return None
    values = found[0] if isinstance(found[0], list) else [found[0]]
    calls = [_call_of_object(value) for value in values]
    if not calls or None in calls:
        return None
    return [call for call in calls if call is not None], found[1]


def _call_of_object(value: Any) -> ToolCall | None:
    if not isinstance(value, dict) or value.get("type", "function") != "function":
        return None
    value = value.get("function", value)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    given = [value[key] for key in ("parameters", "arguments") if key in value]
    if not given and not value.keys() <= {"type", "name", "id"}:
        return None  # an object with a name is no call yet
    arguments = given[0] if given else None
    if isinstance(arguments, str):
        found = _read_json_value(arguments, 0)
        arguments = found[0] if found and not arguments[found[1] :].strip() else arguments
    arguments = {} if arguments is None else arguments
    return _call(value["name"], arguments) if isinstance(arguments, dict) else None


def _read_json_value(text: str, position: int) -> tuple[Any, int] | None:
    try:
        value, end = json.JSONDecoder(strict=False).raw_decode(text, position)
    except (ValueError, RecursionError):
        return None
    return None if is_deep(value) else (value, end)


def _read_python_object(text: str, position: int) -> tuple[Any, int] | None:
    end = _closing(text, position)
    tree = _parse_expression(text[position:end]) if end else None
    try:
        return None if tree is None else (_value_of(tree), end)
    except ValueError:
        return None


def _read_python_list(text: str, position: int) -> _Read:
    if text[position] != "[":
        return None
    end = _closing(text, position)
    if not end:
        return None
    source, names = _with_plain_names(text[position:end])
    tree = _parse_expression(source)
    if not isinstance(tree, ast.List) or not tree.elts:
        return None
    try:
        return [_call_of_node(node, names) for node in tree.elts], end
    except ValueError:
        return None


def _with_plain_names(text: str) -> tuple[str, dict[str, str]]:
    """Name functions and arguments as Python can, and end no text at the end of a line.

    Returns:
        The text, and what its names stand for.
    """
    names: dict[str, str] = {}

    def replace(match: re.Match[str]) -> str:
        if match["text"] is not None:
            return match["text"].replace("\n", "\\n").replace("\r", "\\r")
        name = f"name_{len(names)}"
        names[name] = match["name"]
        return name

    return _TEXTS_AND_NAMES.sub(replace, text), names


def _closing(text: str, position: int) -> int:
    """Return where the bracket at position is closed, one past it; 0 when it is not."""
    depth = 0
    for match in _BRACKETS_AND_TEXTS.finditer(text, position):
        if match[0] in ("[", "(", "{"):
            depth += 1
        elif match[0] in ("]", ")", "}"):
            depth -= 1
        elif match[0] in ("'", '"'):  # a text that never ends
            return 0
        if depth > _MAX_DEPTH:
            return 0
        if depth == 0:
            return match.end()
    return 0


def _parse_expression(text: str) -> ast.expr | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unknown escape is the model's business
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _call_of_node(node: ast.expr, names: dict[str, str]) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args or not isinstance(node.func, ast.Name):
        raise ValueError("not a call with keyword arguments")
    arguments: dict[str, Any] = {}
    for item in node.keywords:
        value = _value_of(item.value)
        if item.arg is not None:
            arguments[names[item.arg]] = value
        elif isinstance(value, dict):
            arguments.update(value)
        else:
            raise ValueError("** of something else than names and values")
    name = names[node.func.id]
    if not all(map(is_word, name.split("."))):
        raise ValueError("not the name of a function")
    if name.endswith(".call") and name.removesuffix(".call") in SEARCH_TOOLS:
        name = name.removesuffix(".call")
    return _call(name, arguments)


def _value_of(node: ast.expr) -> Any:
    """Turn a syntax tree into a JSON value.

    Raises:
        ValueError: It is more than a literal.
    """
    match node:
        case ast.Constant(value=str() | bool() | int() | None):
            return node.value
        case ast.Constant(value=float(value)) if math.isfinite(value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
            return -_value_of(node.operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=ast.Constant(value=int() | float())):
            return _value_of(node.operand)
        case ast.Name(id="true" | "false" | "null"):
            return _WORDS[node.id]
        case ast.List() | ast.Tuple():
            return [_value_of(item) for item in node.elts]
        case ast.Dict():
            return {_key_of(k): _value_of(v) for k, v in zip(node.keys, node.values, strict=True)}
    raise ValueError("not a JSON value")


def _key_of(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("not the key of a JSON object")


def _call(name: str, arguments: dict[str, Any]) -> ToolCall:
    """Make a call; one argument of a built-in tool takes the name that the tool gives it."""
    expected = "query" if name in SEARCH_TOOLS else "code" if name == CODE_INTERPRETER else None
    if expected and len(arguments) == 1:
        arguments = {expected: next(iter(arguments.values()))}
    return ToolCall(name, arguments)
