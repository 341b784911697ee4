"""A dialogue as tokens: the checkpoint's own chat template if it has one, else our chat format."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llama4_jax.pretrained import Pretrained
from llama4_jax.text import Image, Message, message_from_dict, render
from llama4_jax.text.special_tokens import END_OF_TEXT, EOM, EOT


def dialogue_tokens(
    pretrained: Pretrained,
    messages: Sequence[Message],
    runs: Sequence[list[int]],
    *,
    tools: Sequence[Mapping[str, Any] | str] = (),
    add_generation_prompt: bool = True,
    allow_special: bool = False,
    continue_final: bool = False,
    template_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the tokens of a dialogue, up to where the assistant answers.

    Args:
      pretrained: its tokenizer encodes; its chat template, if it has one, sets the form.
      messages: what was said.
      runs: the tokens that stand for each image, in order.
      tools: functions that the assistant may call.
      add_generation_prompt: whether the dialogue ends with the assistant's header.
      allow_special: whether special tokens spelled in contents become their ids.
      continue_final: whether the answer goes on with the last message, which is the assistant's.
      template_options: for the checkpoint's chat template; without one there is nothing to set.

    Raises:
      ValueError: the template refuses the dialogue, or there is nothing to go on with.
    """
    tokenizer, template = pretrained.tokenizer, pretrained.chat_template
    assert tokenizer is not None
    how: Any = {
        "image_tokens": runs,
        "tools": tools,
        "allow_special": allow_special,
        "add_generation_prompt": add_generation_prompt and not continue_final,
    }
    if continue_final and messages[-1].role != "assistant":
        raise ValueError("continue_final_message needs a last message of the assistant.")
    if template is not None:
        # What it decides here is nobody's to change.
        own = {k: v for k, v in (template_options or {}).items() if k not in (*how, "messages")}
        tokens = template.render(messages, tokenizer, **how, **own)
    else:
        tokens = render(messages, tokenizer, **how)
    ends = {EOT, EOM, END_OF_TEXT} & tokenizer.special_tokens.keys()
    while continue_final and tokens[-1] in {tokenizer.special_id(name) for name in ends}:
        tokens = tokens[:-1]
    return tokens


def place_images(
    messages: Sequence[Message | Mapping[str, Any]], sources: Sequence[Any]
) -> list[Message]:
    """Give every image part of a dialogue its source.

    Parts that name no source take the next of `sources`; if there is no such part, the sources
    stand before the text of the last user message.

    Raises:
      ValueError: there are no messages, one is malformed, or parts and sources differ in number.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ValueError("messages must be a list of at least one message.")
    read = [m if isinstance(m, Message) else message_from_dict(m) for m in messages]
    empty = [part for message in read for part in message.parts if _is_empty(part)]
    if sources and not empty:
        return _before_last_user_text(read, sources)
    if len(empty) != len(sources):
        raise ValueError(
            f"the messages have {len(empty)} image parts without a source, but {len(sources)} "
            "images come with them; give one for each."
        )
    rest = iter(sources)
    return [
        dataclasses.replace(
            message,
            content=[Image(next(rest)) if _is_empty(part) else part for part in message.parts],
        )
        if any(map(_is_empty, message.parts))
        else message
        for message in read
    ]


def _is_empty(part: str | Image) -> bool:
    return isinstance(part, Image) and part.source is None


def _before_last_user_text(messages: list[Message], sources: Sequence[Any]) -> list[Message]:
    places = [index for index, message in enumerate(messages) if message.role == "user"]
    if not places:
        raise ValueError("images come with messages of which none is from the user.")
    last = messages[places[-1]]
    content = [*map(Image, sources), *last.parts]
    messages[places[-1]] = dataclasses.replace(last, content=content)
    return messages
