"""A checkpoint's own chat template, rendered so that no text can pass for a special token.

A template is a Jinja program that writes one long text in which special tokens are spelled. To
encode that text naively is to accept special tokens from everybody whose words are in it. Here
the template is rendered with every special token in *its* source replaced by a mark: private-use
characters drawn at random, which nobody can type or have a filter make. After rendering, these
marks, and nothing else, are the special tokens; the text between them is encoded as ordinary text.
Data passes through the template untouched, so trimming, comparing and JSON quoting work as the
author meant.

The one thing that this cannot follow is a template that assembles a special token from pieces
(`'<|' + name + '|>'`); such a template is recognised and refused.

Jinja runs sandboxed: templates come with checkpoints, and checkpoints come from anywhere.
"""

import functools
import os
import pathlib
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from llama4_jax.text import special_tokens as names
from llama4_jax.text.jinja_sandbox import compile_template
from llama4_jax.text.messages import (
    Image,
    ImageRuns,
    ImageTokens,
    Message,
    images_of,
    message_to_dict,
)
from llama4_jax.text.template_limits import RENDER_ERRORS, allowance
from llama4_jax.text.tokenizer import Tokenizer
from llama4_jax.untrusted import load_json, read_bytes, shown

_PRIVATE = range(0xF0000, 0xFFFFE)
"""Plane 15, a private-use one: no text of meaning has these characters."""
_MARK_LENGTH = 8

MAX_SOURCE_BYTES = 1 << 20
"""Largest chat_template.jinja; published ones have 20 KB."""


class ChatTemplate:
    """A chat template in Jinja and the variables that come with it.

    Args:
        source: The program.
        variables: What it may use besides the dialogue, such as bos_token.

    Raises:
        ValueError: The source is not Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None) -> None:
        self.source = source
        self.variables = dict(variables or {})
        compile_template(source)

    def text(
        self,
        messages: Iterable[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Render a dialogue as text, for people to read; never encode it, use `render`.

        Raises:
            ValueError: The template fails on this dialogue, or refuses it.
        """
        data = self._data(messages, tools, add_generation_prompt, variables)
        return self._run(self.source, data)

    def render(
        self,
        messages: Iterable[Message],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        image_tokens: ImageTokens = (),
        add_generation_prompt: bool = True,
        allow_special: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Render a dialogue as ids.

        Args:
            messages: The turns, in order.
            tokenizer: Whose special tokens the template spells.
            tools: Functions that the assistant may call, as JSON schemas.
            image_tokens: The ids of every image; they stand where the template writes the image
                token.
            add_generation_prompt: Whether the template ends with the assistant's header.
            allow_special: Whether special tokens spelled in the data become their ids. Leave it
                off when anybody else wrote any of the data.
            **variables: Whatever else this template uses, such as `date_string`.

        Raises:
            ValueError: The template fails on this dialogue or refuses it, assembles special
                tokens from pieces, or writes another number of images than there are.
        """
        messages = list(messages)
        spellings = tuple(tokenizer.special_tokens)
        data = self._data(messages, tools, add_generation_prompt, variables)
        marks = self._marks(spellings)
        variables = {**marks.put_into_each(self.variables), **variables}
        rendered = self._run(marks.put_into(self.source), {**data, **variables}, marks)
        pieces = marks.split(rendered)
        texts = [piece for is_special, piece in pieces if not is_special]
        if not allow_special and any(name in text for text in texts for name in spellings):
            self._refuse_assembled(data, spellings)
        runs, images = ImageRuns(image_tokens), iter(images_of(messages))
        ids: list[int] = []
        for is_special, piece in pieces:
            if not is_special:
                ids.extend(tokenizer.encode(piece, allow_special=allow_special))
            elif piece == names.IMAGE:
                ids.extend(runs.take(next(images, Image())))
            else:
                ids.append(tokenizer.special_id(piece))
        runs.refuse_unused()
        return ids

    def _data(
        self,
        messages: Iterable[Message],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Collect what the template reads."""
        return {
            **self.variables,
            "messages": [message_to_dict(message) for message in messages],
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }

    def _marks(self, spellings: Sequence[str]) -> "_Marks":
        """Return marks for the special tokens that the template itself writes."""
        own = [self.source, *(v for v in self.variables.values() if isinstance(v, str))]
        return _Marks([n for n in spellings if any(n in text for text in own)])

    def _run(self, source: str, data: Mapping[str, Any], marks: "_Marks | None" = None) -> str:
        template = compile_template(source)
        try:
            with allowance(data):
                return template.render(data)
        except RENDER_ERRORS as error:
            # Whoever reads the error must not learn the marks.
            reason = "".join(piece for _, piece in (marks or _Marks([])).split(str(error)))
            raise ValueError(
                f"The chat template does not render this dialogue: {reason[:500]}"
            ) from error

    def _refuse_assembled(self, data: Mapping[str, Any], spellings: Sequence[str]) -> None:
        """Raise ValueError when spelled special tokens come from the template, not the data.

        Without the characters that special tokens begin with, the data cannot spell one.
        """
        first = {spelling[0] for spelling in spellings}
        settings = {key: data[key] for key in self.variables if key in data}
        harmless = {**_without(data, first), **settings}
        text = self._run(self._marks(spellings).put_into(self.source), harmless)
        for value in settings.values():
            text = text.replace(value, "") if isinstance(value, str) and value else text
        found = next((name for name in spellings if name in text), None)
        if found is not None:
            raise ValueError(
                f"The chat template assembles the special token {found} from pieces, so it "
                "cannot be told from a user's text. Spell it in one piece in the template, or "
                "render the dialogue with llama4_jax.text.render."
            )


@functools.lru_cache(maxsize=1 << 14)
def _mark_of(spelling: str) -> str:
    """Draw the mark of a special token, once in this process so that templates compile once."""
    return "".join(chr(secrets.choice(_PRIVATE)) for _ in range(_MARK_LENGTH))


class _Marks:
    """The marks that stand for special tokens.

    Args:
        spellings: The special tokens to stand for.
    """

    def __init__(self, spellings: Sequence[str]) -> None:
        self._mark_of = {spelling: _mark_of(spelling) for spelling in spellings}
        self._spelling_of = {mark: name for name, mark in self._mark_of.items()}
        longest_first = sorted(spellings, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._marked = re.compile(f"({'|'.join(self._spelling_of) or '(?!)'})")

    def put_into(self, text: str) -> str:
        """Replace every special token by its mark."""
        return self._spelled.sub(lambda match: self._mark_of[match.group()], text)

    def put_into_each(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the special tokens of those variables that are texts."""
        return {k: self.put_into(v) if isinstance(v, str) else v for k, v in variables.items()}

    def split(self, text: str) -> list[tuple[bool, str]]:
        """Cut rendered text into (whether it is a special token, its spelling or the text)."""
        pieces = self._marked.split(text)
        named = ((i % 2 == 1, self._spelling_of.get(p, p)) for i, p in enumerate(pieces))
        return [(is_special, piece) for is_special, piece in named if piece]


def _without(value: Any, characters: Set[str]) -> Any:
    """Copy a JSON-like value without these characters."""
    if isinstance(value, str):
        return "".join(c for c in value if c not in characters)
    if isinstance(value, Mapping):
        return {_without(k, characters): _without(v, characters) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without(item, characters) for item in value]
    return value


# ---------------------------------------------------------------------------------------- loading


def load_chat_template(path: str | os.PathLike[str]) -> ChatTemplate | None:
    """Read the chat template of a checkpoint folder.

    Looks into chat_template.jinja, chat_template.json and tokenizer_config.json, in this order;
    of several named templates it takes "default".

    Args:
        path: The folder.

    Returns:
        The template, with the tokens that tokenizer_config.json names (bos_token and so on) as
        variables; None when the folder has none.

    Raises:
        ValueError: A file is damaged, or there are named templates but no default.
    """
    folder = pathlib.Path(path)
    config = _read_json(folder / "tokenizer_config.json")
    source: Any = None
    if (folder / "chat_template.jinja").is_file():
        source = _read_text(folder / "chat_template.jinja")
    if source is None:
        source = _read_json(folder / "chat_template.json").get("chat_template")
    if source is None:
        source = config.get("chat_template")
    if isinstance(source, list | dict):
        source = _default_of(source, folder)
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"{folder} has a chat template that is no text: {shown(source)}.")
    tokens = {key: value for key, value in config.items() if key.endswith("_token")}
    tokens = {k: v.get("content") if isinstance(v, dict) else v for k, v in tokens.items()}
    return ChatTemplate(source, {k: v for k, v in tokens.items() if isinstance(v, str)})


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return load_json(path)


def _read_text(path: pathlib.Path) -> str:
    try:
        return read_bytes(path, MAX_SOURCE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _default_of(named: Any, folder: pathlib.Path) -> Any:
    """Return the default one of a list of entries with name and template, or of a mapping."""
    if isinstance(named, dict):
        templates = named
    else:
        entries = [entry for entry in named if isinstance(entry, dict)]
        templates = {str(entry.get("name")): entry.get("template") for entry in entries}
    if "default" not in templates:
        raise ValueError(
            f"{folder} has chat templates named {shown([*templates])} but no "
            '"default"; put the wanted one into chat_template.jinja.'
        )
    return templates["default"]
