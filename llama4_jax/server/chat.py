"""Chat completions: dialogues in, messages and calls of tools out."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from llama4_jax.pretrained import Pretrained
from llama4_jax.serve.answers import Event, TokenLogprobs
from llama4_jax.serve.options import Options
from llama4_jax.serve.requests import Request
from llama4_jax.server.errors import ApiError
from llama4_jax.server.fields import DEFAULT_MAX_TOKENS, Fields, read_options
from llama4_jax.server.structure import call_form, read_form
from llama4_jax.server.tokens import chat_logprobs
from llama4_jax.text import parse
from llama4_jax.untrusted import shown

_MAX_TOP_LOGPROBS = 20
# What may begin a call of a tool: from there on nothing is streamed until it is known.
_MAY_CALL = re.compile(r"(?:^|\n)\s*(?:[\[{`]|<function=|\w+\.call\()|<\|python_(?:start|tag)\|>")
_PART = re.compile(r"(?:^|\n)\s*(?:<[\w=|]{0,12}|\w{1,20}(?:\.\w{0,5})?)?$|<(?:\|\w{0,14})?$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What a client asks of a dialogue.

    Attributes:
      request: the dialogue.
      options: (room for new tokens) -> how it is answered.
      stream: whether the answer comes as events.
      usage: whether a last event counts tokens.
      running_usage: whether every event counts them.
      calls: whether the answer may call tools.
      one_call: whether it may call only one.
      token_ids: whether the ids are told too.
    """

    request: Request
    options: Callable[[int], Options]
    stream: bool
    usage: bool
    running_usage: bool
    calls: bool
    one_call: bool
    token_ids: bool


def read_chat(fields: Fields) -> ChatRequest:
    """Read a request of /v1/chat/completions.

    Raises:
      ApiError: a field has a value that is not allowed.
    """
    messages = fields.items("messages")
    if not messages:
        raise ApiError(400, "messages must be a list of at least one message.", param="messages")
    tools, choice = _read_tools(fields)
    own, forced = read_form(fields), call_form(tools, choice)
    form = forced or own
    stream, usage = fields.flag("stream"), fields.inner("stream_options")
    logprobs = fields.whole("top_logprobs", 0) if fields.flag("logprobs") else None
    if logprobs is None and fields.whole("top_logprobs"):
        raise ApiError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
    if logprobs is not None and not 0 <= logprobs <= _MAX_TOP_LOGPROBS:
        raise fields.wrong("top_logprobs", f"in 0..{_MAX_TOP_LOGPROBS}")
    most = fields.whole("max_completion_tokens", fields.whole("max_tokens"))
    prompt_logprobs = fields.whole("prompt_logprobs")

    def options(room: int) -> Options:
        limit = most if most is not None else max(1, min(DEFAULT_MAX_TOKENS["chat"], room))
        return read_options(
            fields,
            max_new_tokens=limit,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **form,
        )

    template = fields.inner("chat_template_kwargs")
    try:
        request = Request(
            messages=messages,
            tools=[] if choice == "none" else tools,
            continue_final_message=fields.flag("continue_final_message"),
            add_generation_prompt=fields.flag("add_generation_prompt", True),
            allow_special=fields.flag("allow_special"),
            template_options={} if template is None else template.rest(),
        )
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from error
    chosen = ChatRequest(
        request=request,
        options=options,
        stream=stream,
        usage=usage is not None and usage.flag("include_usage"),
        running_usage=usage is not None and usage.flag("continuous_usage_stats"),
        calls=bool(tools) and choice != "none",
        one_call=not fields.flag("parallel_tool_calls", True),
        token_ids=fields.flag("return_token_ids"),
    )
    options(1)  # what is wrong with them is told before work begins
    return chosen


def _read_tools(fields: Fields) -> tuple[list[dict[str, Any]], str]:
    """Return the functions that may be called, and "none", "auto", "required" or a name."""
    tools = fields.items("tools")
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ApiError(
                400,
                'each of tools must be {"type": "function", "function": {"name": .., ..}}, not '
                f"{shown(tool)}.",
                param="tools",
            )
    names = [tool["function"]["name"] for tool in tools]
    choice = fields.any("tool_choice")
    if choice is None:
        return tools, "auto" if tools else "none"
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or name not in names:
            raise fields.wrong("tool_choice", f"one of the tools ({', '.join(names) or 'none'})")
        return tools, name
    if choice not in ("none", "auto", "required"):
        raise fields.wrong("tool_choice", "none, auto, required or a function of tools")
    if choice == "required" and not tools:
        raise ApiError(400, "tool_choice (required) needs tools.", param="tool_choice")
    return tools, choice


class Delta(NamedTuple):
    """What is new of an answer."""

    content: str
    tokens: list[int]
    logprobs: list[TokenLogprobs]


class ChatAnswer:
    """One answer in the making: what is certain of its text, and its calls at the end.

    Args:
      pretrained: whose tokens they are.
      asked: what the client wants.
      index: of the choice.
    """

    def __init__(self, pretrained: Pretrained, asked: ChatRequest, index: int) -> None:
        self.index = index
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.calls: list[dict[str, Any]] = []
        self._asked, self._tokenizer = asked, pretrained.tokenizer
        self._text, self._sent, self._holds = "", 0, False
        self._logprobs: list[TokenLogprobs] = []

    def take(self, event: Event) -> Delta:
        """Add what a step brought; return what may be sent."""
        self.tokens += event.tokens
        self._text += "".join(event.texts)
        found = event.logprobs or []
        self._logprobs += found
        end = len(self._text)
        if self._asked.calls:
            held = _MAY_CALL.search(self._text, max(0, self._sent - 1)) if not self._holds else None
            self._holds = self._holds or held is not None
            part = _PART.search(self._text, self._sent)
            end = self._sent if self._holds else part.start() if part else end
            if held is not None:
                end = max(self._sent, held.start())
        if event.finish_reason is not None:
            self._end(event.finish_reason)
            end = len(self._text)
        content, self._sent = self._text[self._sent : end], max(self._sent, end)
        return Delta(content, list(event.tokens), found)

    def _end(self, reason: str) -> None:
        self.finish_reason = "stop" if reason == "cancelled" else reason
        if not self._asked.calls:
            return
        # Texts leave special tokens out, ids do not: calls between python_start and python_end.
        message = parse(self.tokens, self._tokenizer)
        if not message.tool_calls:
            return
        calls = message.tool_calls[:1] if self._asked.one_call else message.tool_calls
        self.calls = [_call_json(call, self.index, place) for place, call in enumerate(calls)]
        # What was sent stays; of what was held back only what is no call is content.
        content = message.content if isinstance(message.content, str) else ""
        sent = self._text[: self._sent]
        rest = content.removeprefix(sent) if content.startswith(sent) else ""
        self._text = sent + rest
        if self.finish_reason == "stop":
            self.finish_reason = "tool_calls"

    def message(self) -> dict[str, Any]:
        """Return the whole answer as a message."""
        message: dict[str, Any] = {"role": "assistant", "content": self._text, "refusal": None}
        if self.calls:
            message["content"] = self._text or None
            message["tool_calls"] = self.calls
        return message

    def choice(self) -> dict[str, Any]:
        """Return the whole answer as a choice."""
        choice = {
            "index": self.index,
            "message": self.message(),
            "logprobs": self.logprobs(self.tokens, self._logprobs),
            "finish_reason": self.finish_reason,
        }
        return choice | ({"token_ids": self.tokens} if self._asked.token_ids else {})

    def logprobs(
        self, tokens: Sequence[int], found: Sequence[TokenLogprobs]
    ) -> dict[str, Any] | None:
        """Return log probabilities as a choice has them; None if nobody asked."""
        return chat_logprobs(self._tokenizer, tokens, found) if found else None

    def chunk(self, delta: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """Return a choice of an event."""
        return {"index": self.index, "delta": dict(delta), "finish_reason": None, **more}

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """Add what a step brought; return choices that tell it, the reason of the end last."""
        new, chunks = self.take(event), []
        if new.content or new.logprobs:
            more: dict[str, Any] = {"logprobs": self.logprobs(new.tokens, new.logprobs)}
            if self._asked.token_ids:
                more["token_ids"] = new.tokens
            chunks.append(self.chunk({"content": new.content}, **more))
        if self.finish_reason is not None:
            for place, call in enumerate(self.calls):
                chunks.append(self.chunk({"tool_calls": [{"index": place, **call}]}))
            last = self.chunk({})
            chunks.append({**last, "finish_reason": self.finish_reason})
        return chunks


def _call_json(call: Any, index: int, place: int) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{index}_{place}", "type": "function", "function": function}
