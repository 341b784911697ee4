"""Llama 4's dialogue format: messages to token ids, and the assistant's ids back to a message.

    begin-of-text, then for each message
        header_start ROLE header_end "\\n\\n" CONTENT terminator
    then, for the assistant to continue, its header.

The terminator is eom ("end of message", the turn goes on) after tool calls and after the results
of tools, and eot ("end of turn") otherwise. Nothing is trimmed and no system message is invented.
All text is encoded as ordinary text, so nobody can type a special token, and the places of images
are filled with ids that the caller made.

Source: `llama4/chat_format.py` of Meta's `llama-models` package, 0.3.0. Tool definitions have no
place in that format; here they stand in the system message, in our own words.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama4_jax.text import special_tokens as names
from llama4_jax.text.messages import ImageRuns, ImageTokens, Message, StopReason, ToolCall
from llama4_jax.text.tokenizer import Tokenizer
from llama4_jax.text.tool_call_reader import find_calls
from llama4_jax.text.tool_calls import (
    CODE_INTERPRETER,
    SEARCH_TOOLS,
    Code,
    ToolFormat,
    write_calls,
)

_INSTRUCTIONS = {
    "python_list": "a Python list of calls with keyword arguments and nothing else, as in "
    '[first(text="a"), second(count=2)].',
    "json": "one JSON object for each call and nothing else, as in "
    '{"type": "function", "name": "first", "parameters": {"text": "a"}}.',
    "function_tag": "one tag for each call and nothing else, as in "
    '<function=first>{"text": "a"}</function>.',
}


def tool_instructions(form: ToolFormat) -> str:
    """Return what tells the model how to call the functions that follow."""
    return (
        "You can call the functions below. To call one or several, answer with "
        f"{_INSTRUCTIONS[form]}"
    )


# ------------------------------------------------------------------------------------- rendering


def render(
    messages: Iterable[Message],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any] | str] = (),
    tool_format: ToolFormat = "python_list",
    image_tokens: ImageTokens = (),
    add_generation_prompt: bool = True,
    allow_special: bool = False,
) -> list[int]:
    """Turn a dialogue into the ids that the model continues.

    Args:
        messages: The turns, in order.
        tokenizer: A vocabulary with Llama 4's special tokens.
        tools: Functions that the assistant may call, each an object with "name", "description"
            and "parameters" (a JSON schema), bare or as {"type": "function", "function": ..};
            or the name of a built-in tool, such as "brave_search" or "code_interpreter".
        tool_format: How the assistant's calls are written.
        image_tokens: The ids of every image of the dialogue.
        add_generation_prompt: Whether to end with the assistant's header.
        allow_special: Whether special tokens spelled in contents become their ids. Leave it off
            when anybody else wrote any of the contents.

    Raises:
        ValueError: The numbers of images and of id runs differ, or a tool or call is malformed.
    """
    writer = _Writer(tokenizer, image_tokens, tool_format, allow_special)
    messages = list(messages)
    if tools:
        messages = _with_tools(messages, tools, tool_format)
    ids = [tokenizer.special_id(names.BOS)]
    for message in messages:
        ids.extend(writer.message(message))
    writer.refuse_unused_images()
    if add_generation_prompt:
        ids.extend(writer.header("assistant"))
    return ids


class _Writer:
    """Encode the pieces of a dialogue; images are taken in order."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_tokens: ImageTokens,
        tool_format: ToolFormat,
        allow_special: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._images = ImageRuns(image_tokens)
        self._tool_format: ToolFormat = tool_format
        self._allow_special = allow_special

    def header(self, role: str) -> list[int]:
        start, end = self._special(names.HEADER_START), self._special(names.HEADER_END)
        return [start, *self._tokenizer.encode(role), end, *self._tokenizer.encode("\n\n")]

    def message(self, message: Message) -> list[int]:
        ids = self.header(message.header)
        for part in message.parts:
            ids.extend(self._text(part) if isinstance(part, str) else self._images.take(part))
        if message.context is not None:
            ids.extend(self._text("\n\n"))
            ids.extend(self._text(message.context))
        for piece in write_calls(message.tool_calls, self._tool_format):
            ids.extend(self._code(piece) if isinstance(piece, Code) else self._text(piece))
        ids.append(self._special(names.EOM if _goes_on(message) else names.EOT))
        return ids

    def refuse_unused_images(self) -> None:
        self._images.refuse_unused()

    def _code(self, code: Code) -> list[int]:
        end = names.find(self._tokenizer.special_tokens, names.PYTHON_END)
        ids = [self._special(names.PYTHON_START), *self._text(code.text)]
        return ids if end is None else [*ids, end]

    def _text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, allow_special=self._allow_special)

    def _special(self, name: str) -> int:
        found = names.find(self._tokenizer.special_tokens, name)
        return self._tokenizer.special_id(name) if found is None else found


def _goes_on(message: Message) -> bool:
    if message.is_tool_result:
        return True
    called = bool(message.tool_calls) or message.stop_reason == "end_of_message"
    return message.role == "assistant" and called


def _with_tools(
    messages: list[Message], tools: Sequence[Mapping[str, Any] | str], form: ToolFormat
) -> list[Message]:
    """Put the definitions of tools into the system message, made where there is none."""
    if form not in _INSTRUCTIONS:
        raise ValueError(f"tool_format must be one of {', '.join(_INSTRUCTIONS)}, not {form!r}.")
    built_in = [tool for tool in tools if isinstance(tool, str)]
    functions = [_definition(tool) for tool in tools if not isinstance(tool, str)]
    has_system = bool(messages) and messages[0].role == "system"
    content = [part for part in messages[0].parts if part != ""] if has_system else []
    if built_in:
        content = [_environment(built_in) + ("\n\n" if content or functions else ""), *content]
    if functions:
        lines = "\n".join(json.dumps(f, ensure_ascii=False) for f in functions)
        gap = "\n\n" if len(content) > bool(built_in) else ""
        content = [*content, f"{gap}{tool_instructions(form)}\n\n{lines}"]
    texts = [part for part in content if isinstance(part, str)]
    whole = "".join(texts) if len(texts) == len(content) else tuple(content)
    return [Message("system", whole), *messages[has_system:]]


def _environment(built_in: Sequence[str]) -> str:
    """Name the built-in tools as the prompts of Llama 3.1 and later do."""
    for name in built_in:
        if name not in (*SEARCH_TOOLS, CODE_INTERPRETER):
            known = ", ".join((*SEARCH_TOOLS, CODE_INTERPRETER))
            raise ValueError(f"{name!r} is not a built-in tool ({known}); give its definition.")
    searches = [name for name in built_in if name != CODE_INTERPRETER]
    return "Environment: ipython" + (f"\nTools: {', '.join(searches)}" if searches else "")


def _definition(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f'A tool is an object with a "name" and "parameters", not {tool!r}.')
    return function


# --------------------------------------------------------------------------------------- parsing

_STOPS: dict[str, StopReason] = {
    names.EOT: "end_of_turn",
    names.EOM: "end_of_message",
    names.END_OF_TEXT: "end_of_turn",
}


def parse(
    reply: str | Iterable[int],
    tokenizer: Tokenizer | None = None,
    *,
    stop_reason: StopReason | None = None,
) -> Message:
    """Read what the assistant answered, with all its tool calls.

    Args:
        reply: The new ids, or their text with special tokens spelled (a text is trusted to mean
            the special tokens that it spells; ids cannot be mistaken). The assistant's header in
            front and a terminator at the end are taken off.
        tokenizer: Whose ids they are; only ids need it.
        stop_reason: Why the answer ended, where no terminator says so.

    Returns:
        The message. Its content is what surrounds the calls: the whole text where there are none,
        usually nothing where there are some.

    Raises:
        ValueError: The reply is ids but there is no tokenizer.
    """
    if isinstance(reply, str):
        segments, stop = _segments_of_text(reply)
    elif tokenizer is None:
        raise ValueError("parse needs the tokenizer of the ids; a text needs none.")
    else:
        segments, stop = _segments_of_ids([int(i) for i in reply], tokenizer)
    calls: list[ToolCall] = []
    texts: list[str] = []
    for segment in segments:
        if isinstance(segment, Code):
            found = find_calls(segment.text)
            inside = found.calls if found.text == "" else ()
            if segment.text.strip():
                calls.extend(inside or [ToolCall(CODE_INTERPRETER, {"code": segment.text})])
        else:
            found = find_calls(segment)
            calls.extend(found.calls)
            texts.append(found.text)
    numbered = (ToolCall(c.name, c.arguments, f"call_{i}") for i, c in enumerate(calls))
    return Message("assistant", "".join(texts), tuple(numbered), stop_reason=stop or stop_reason)


type _Segments = list[str | Code]


def _segments_of_ids(ids: list[int], tokenizer: Tokenizer) -> tuple[_Segments, StopReason | None]:
    stop: StopReason | None = None
    by_id = {names.find(tokenizer.special_tokens, name): why for name, why in _STOPS.items()}
    for position, token_id in enumerate(ids):
        if token_id in by_id:
            ids, stop = ids[:position], by_id[token_id]
            break
    header = _Writer(tokenizer, (), "json", False).header("assistant")
    if ids[: len(header)] == header:
        ids = ids[len(header) :]
    marks = (names.PYTHON_START, names.PYTHON_END)
    start, end = (names.find(tokenizer.special_tokens, name) for name in marks)
    segments: _Segments = []
    for inside, run in _split(ids, start, end):
        text = tokenizer.decode(run)
        segments.append(Code(text) if inside else text)
    return segments, stop


def _segments_of_text(text: str) -> tuple[_Segments, StopReason | None]:
    stop: StopReason | None = None
    for name, other in names.LLAMA3.items():
        text = text.replace(other, name)
    ends = [(text.find(name), reason) for name, reason in _STOPS.items() if name in text]
    if ends:
        position, stop = min(ends)
        text = text[:position]
    text = text.removeprefix(f"{names.HEADER_START}assistant{names.HEADER_END}\n\n")
    segments: _Segments = []
    outside, *rest = text.split(names.PYTHON_START)
    segments.append(outside.replace(names.PYTHON_END, ""))
    for block in rest:
        code, _, after = block.partition(names.PYTHON_END)
        segments.extend([Code(code), after])
    return segments, stop


def _split(ids: list[int], start: int | None, end: int | None) -> list[tuple[bool, list[int]]]:
    """Cut ids at the code markers; each run says whether it stands inside."""
    runs: list[tuple[bool, list[int]]] = [(False, [])]
    for token_id in ids:
        if token_id in (start, end):
            runs.append((token_id == start, []))
        else:
            runs[-1][1].append(token_id)
    return runs
