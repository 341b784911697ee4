"""What a dialogue is made of: messages, image parts, tool calls, and their JSON form.

The JSON form is the one that Hugging Face's chat templates and OpenAI-like servers share:
`{"role": "user", "content": "hi"}`, with content as a list of parts where there are images.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from llama4_jax.untrusted import parse_json, shown

Role = Literal["system", "user", "assistant", "tool", "ipython"]
StopReason = Literal["end_of_turn", "end_of_message", "out_of_tokens"]


@dataclasses.dataclass(frozen=True)
class Image:
    """The place of an image in a message.

    Attributes:
        source: Whatever the caller needs to find the image: a path, bytes, a URL. Nothing here
            opens it; its token ids are given ready-made when the dialogue is rendered.
    """

    source: Any = None


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One call of a function by the assistant.

    Attributes:
        name: The function.
        arguments: Its arguments by name; values are what JSON can say.
        call_id: Tells apart the calls of one message; empty when nobody asked.
    """

    name: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    call_id: str = ""

    @property
    def arguments_json(self) -> str:
        """The arguments as a JSON object."""
        return json.dumps(self.arguments)


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a dialogue.

    Attributes:
        role: Who speaks. "tool" and "ipython" both mean the result of a tool.
        content: A text, or texts and images in order. Rendered as it is, never trimmed. The
            result of a tool may be a JSON object; templates tell it from its text.
        tool_calls: What the assistant calls.
        context: Retrieved text that follows a user's content after an empty line.
        stop_reason: Why an assistant's message ended; None when unknown.
    """

    role: Role
    content: str | Sequence[str | Image] | Mapping[str, Any] = ""
    tool_calls: Sequence[ToolCall] = ()
    context: str | None = None
    stop_reason: StopReason | None = None

    def __post_init__(self) -> None:
        """Refuse roles that have no header and parts on messages that cannot have them."""
        if self.role not in get_args(Role):
            raise ValueError(
                f"role must be one of {', '.join(get_args(Role))}, not {shown(self.role)}."
            )
        if self.stop_reason is not None and self.stop_reason not in get_args(StopReason):
            known = ", ".join(get_args(StopReason))
            raise ValueError(f"stop_reason must be one of {known}, not {shown(self.stop_reason)}.")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"Only the assistant has tool_calls, not the role {self.role!r}.")
        if self.context is not None and self.role != "user":
            raise ValueError(f"Only the user has a context, not the role {self.role!r}.")
        if not isinstance(self.context, str | None):
            raise ValueError(f"context must be a text, not {shown(self.context)}.")
        if isinstance(self.content, Mapping):
            if not self.is_tool_result:
                raise ValueError(f"Only a tool's result is an object, not the {self.role}'s words.")
        elif not isinstance(self.content, str):
            for part in self.content:
                if not isinstance(part, str | Image):
                    raise ValueError(f"A part of content is a str or an Image, not {shown(part)}.")

    @property
    def parts(self) -> tuple[str | Image, ...]:
        """The content as parts; a plain text is one part, and so is an object as JSON."""
        if isinstance(self.content, Mapping):
            return (json.dumps(self.content, ensure_ascii=False),)
        return (self.content,) if isinstance(self.content, str) else tuple(self.content)

    @property
    def header(self) -> str:
        """The role as the model reads it: the results of tools come from "ipython"."""
        return "ipython" if self.role == "tool" else self.role

    @property
    def is_tool_result(self) -> bool:
        """Whether this is what a tool answered."""
        return self.header == "ipython"


type ImageTokens = Sequence[Sequence[int]] | Callable[[Image], Sequence[int]]
"""The ids of every image of a dialogue in order, or what makes an image's."""


class ImageRuns:
    """Hand out the ids of a dialogue's images in order, one run for each.

    Args:
        image_tokens: Ready ids, as `data.images.layout_tokens` makes them, or what makes them.
    """

    def __init__(self, image_tokens: ImageTokens) -> None:
        self._make = image_tokens if callable(image_tokens) else None
        self._runs = () if callable(image_tokens) else tuple(image_tokens)
        self._taken = 0

    def take(self, image: Image) -> Sequence[int]:
        """Return the ids of the next image.

        Raises:
            ValueError: No run is left for it.
        """
        if self._make is not None:
            return self._make(image)
        self._taken += 1
        if self._taken > len(self._runs):
            raise ValueError(
                f"The dialogue has more images than the {len(self._runs)} run(s) of ids in "
                "image_tokens; give one run for each image, in order."
            )
        return self._runs[self._taken - 1]

    def refuse_unused(self) -> None:
        """Raise ValueError when runs are left over."""
        if self._taken != len(self._runs):
            raise ValueError(
                f"The dialogue has {self._taken} image(s) but image_tokens has {len(self._runs)} "
                "run(s) of ids; give one run for each image, in order."
            )


def images_of(messages: Sequence[Message]) -> list[Image]:
    """List the images of a dialogue in the order in which a model reads them."""
    return [part for message in messages for part in message.parts if isinstance(part, Image)]


def message_from_dict(value: Mapping[str, Any]) -> Message:
    """Read a message from its JSON form.

    Args:
        value: `role`, `content` (a text, null, or parts of type text, image or image_url; a
            tool's result may be any JSON value) and, where they apply, `tool_calls`, `context`
            and `stop_reason`. Arguments of a call may be an object or a text of JSON.

    Raises:
        ValueError: It is not such a message; the text says which field.
    """
    if not isinstance(value, Mapping) or "role" not in value:
        raise ValueError(f'A message is an object with a "role", not {shown(value)}.')
    role, content = value["role"], value.get("content")
    if content is None:
        content = ""
    elif role in ("tool", "ipython") and not _is_content(content):
        content = json.dumps(content, ensure_ascii=False)
    elif not isinstance(content, str | Mapping):
        content = _parts_from_json(content)
    calls = value.get("tool_calls") or ()
    if not isinstance(calls, Sequence):
        raise ValueError(f"tool_calls must be a list, not {shown(calls)}.")
    return Message(
        role=role,
        content=content,
        tool_calls=tuple(_call_from_dict(call) for call in calls),
        context=value.get("context"),
        stop_reason=value.get("stop_reason"),
    )


def message_to_dict(message: Message) -> dict[str, Any]:
    """Write a message in the form that Hugging Face's chat templates read."""
    parts = message.parts
    if message.context is not None:
        parts = (*parts, f"\n\n{message.context}")
    if isinstance(message.content, str):
        content: Any = "".join(part for part in parts if isinstance(part, str))
    elif isinstance(message.content, Mapping):
        content = message.content
    else:
        content = [_part_to_json(part) for part in parts]
    result = {"role": message.role, "content": content}
    if message.tool_calls:
        result["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return result


def _is_content(value: Any) -> bool:
    """Say whether the result of a tool is content already, and not JSON to be written out."""
    return isinstance(value, str | Mapping) or (
        isinstance(value, list)
        and all(
            isinstance(part, Mapping) and part.get("type") in ("text", "image", "image_url")
            for part in value
        )
    )


def _parts_from_json(content: Any) -> tuple[str | Image, ...]:
    if not isinstance(content, Sequence):
        raise ValueError(f"content must be a text or a list of parts, not {shown(content)}.")
    return tuple(part if isinstance(part, str) else _part_from_json(part) for part in content)


def _part_from_json(part: Any) -> str | Image:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image":
        sources = (part[key] for key in ("image", "path", "url", "source") if key in part)
        return Image(next(sources, None))
    if kind == "image_url":
        link = part.get("image_url")
        return Image(link.get("url") if isinstance(link, Mapping) else link)
    raise ValueError(
        'A part of content is {"type": "text", "text": ..}, {"type": "image", ..} or '
        f'{{"type": "image_url", ..}}, not {shown(part)}.'
    )


def _part_to_json(part: str | Image) -> dict[str, Any]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}


def _call_from_dict(call: Any) -> ToolCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f'A tool call has a function with a "name", unlike {shown(call)}.')
    name = shown(function["name"])
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"The arguments of {name}")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"The arguments of {name} must be an object: {shown(arguments)}")
    return ToolCall(function["name"], dict(arguments), str(call.get("id") or ""))
