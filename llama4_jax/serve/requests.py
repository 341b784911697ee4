"""What a caller asks, as the tokens and tiles that the model reads."""

import dataclasses
import operator
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from llama4_jax.config import ModelConfig, VisionConfig
from llama4_jax.data import (
    Canvas,
    ImageTokenIds,
    choose_canvas,
    layout_tokens,
    load_image,
    preprocess,
    stack_tiles,
)
from llama4_jax.pretrained import Pretrained
from llama4_jax.serve.dialogue import dialogue_tokens, place_images
from llama4_jax.serve.options import Options
from llama4_jax.text import Message, Tokenizer, images_of
from llama4_jax.untrusted import shown

ImageSource = str | pathlib.Path | bytes | np.ndarray | Image.Image


NOT_FINITE = (
    "the model's logits are NaN; the checkpoint is damaged, or overflows in this dtype: "
    "try float32."
)


class RequestError(ValueError):
    """A request that cannot be served; `index` is its place in the list, counted from 0."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One thing to read: exactly one of prompt, messages and tokens, and the images in it.

    Attributes:
      prompt: plain text. Images stand before it, after the begin-of-text token.
      messages: a dialogue, each message a Message or a mapping with `role` and `content`. Each
        image part of a content that does not name its own source takes the next of `images`;
        without any such part they stand before the text of the last user message.
      tokens: ids, read as they are. Images fill the patch tokens already among them, in order.
      images: whatever `data.load_image` reads: paths, bytes of picture files, `data:` URLs, arrays
        [H, W, 3] or [H, W] of uint8, or pictures.
      options: how it is answered; None leaves it to the caller.
      tools: functions that the assistant may call, as `text.render` takes them; for messages.
      add_generation_prompt: whether the dialogue ends with the assistant's header.
      continue_final_message: whether the answer goes on with the last message, the assistant's.
      template_options: for the checkpoint's own chat template.
      allow_special: whether special tokens spelled in texts become their ids. Leave it off when
        anybody else wrote any of them.
    """

    prompt: str | None = None
    messages: Sequence[Message | Mapping[str, Any]] | None = None
    tokens: Sequence[int] | None = None
    images: Sequence[ImageSource] = ()
    options: Options | None = None
    tools: Sequence[Mapping[str, Any] | str] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    allow_special: bool = False

    def __post_init__(self):
        names = ("prompt", "messages", "tokens")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"a request has one of prompt, messages and tokens; found {found}.")
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise ValueError(f"prompt must be a text, not {type(self.prompt).__name__}.")
        if isinstance(self.images, str | bytes) or not isinstance(self.images, Sequence):
            raise ValueError("images must be a list, even of one image.")
        if self.options is not None and not isinstance(self.options, Options):
            raise ValueError(f"options must be Options, not {type(self.options).__name__}.")
        if self.continue_final_message and self.messages is None:
            raise ValueError("continue_final_message is for messages.")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """One row to read: its tokens, and the tiles that fill its patch tokens in order.

    Attributes:
      tokens_T: int32 [T].
      tiles_NCHW: float32 [N, C, height, width]; N may be 0.
      tile_spans_N2: int [N, 2], the first and last patch token of every tile.
    """

    tokens_T: np.ndarray
    tiles_NCHW: np.ndarray
    tile_spans_N2: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Prompt:
    """A request whose tokens are known; its pictures are decoded again when their turn comes.

    Attributes:
      index: of the request in the list.
      tokens_T: int32 [T], at least one.
      images: fill the patch tokens in order.
    """

    index: int
    tokens_T: np.ndarray
    images: Sequence[ImageSource]

    def row(self, config: ModelConfig) -> Row:
        """Return the tokens together with the tiles of their images."""
        spans_N2, tiles_NCHW = np.zeros((0, 2), np.int64), np.zeros((0, 0, 0, 0), np.float32)
        if self.images:
            vision = _vision(config)
            slots = np.flatnonzero(self.tokens_T == config.patch_id)
            spans_N2 = slots.reshape(-1, vision.tokens_per_tile)[:, [0, -1]]
            tiles_NCHW = stack_tiles(
                [preprocess(load_image(image), vision, config.max_tiles) for image in self.images],
                vision,
            )
        return Row(tokens_T=self.tokens_T, tiles_NCHW=tiles_NCHW, tile_spans_N2=spans_N2)


Requests = Request | str | Mapping[str, Any] | Sequence[Request | str | Mapping[str, Any]]
"""What a caller may give: one request or several, each a Request, a prompt, or a Request's fields
by name."""


def list_requests(requests: Requests) -> list[Request]:
    """Return what a caller gives as a list of requests.

    Raises:
      RequestError: the first that is none.
    """
    if isinstance(requests, Request | str | Mapping) or not isinstance(requests, Iterable):
        requests = [requests]
    found = []
    for index, request in enumerate(requests):
        try:
            found.append(_as_request(request))
        except ValueError as error:
            raise RequestError(f"request {index}: {error}", index) from error
    return found


def _as_request(given: Any) -> Request:
    if isinstance(given, Request):
        return given
    if isinstance(given, str):
        return Request(prompt=given)
    fields = [field.name for field in dataclasses.fields(Request)]
    if isinstance(given, Mapping) and given.keys() <= set(fields):
        return Request(**given)
    if isinstance(given, Message) or (isinstance(given, Mapping) and "role" in given):
        raise ValueError("a message is no request; write Request(messages=[..]) for a dialogue.")
    if isinstance(given, Mapping):
        unknown = next(name for name in given if name not in fields)
        raise ValueError(f"unknown field {shown(unknown)}; a request has {', '.join(fields)}.")
    raise ValueError(
        f"{shown(given)} is a {type(given).__name__}; give a text, a Request or its fields by "
        "name; token ids go into Request(tokens=[..])."
    )


def read_requests(pretrained: Pretrained, requests: Requests) -> list[Prompt]:
    """Turn requests into tokens, and check everything about them that can be checked.

    Raises:
      RequestError: for the first request that cannot be read; the message begins with its number,
        counted from 0.
    """
    prompts = []
    for index, request in enumerate(list_requests(requests)):
        try:
            tokens, images = _read(pretrained, request)
            tokens_T = np.asarray(tokens, np.int32)
            _check_known(tokens_T, pretrained.config.text.vocab_size)
        except ValueError as error:
            raise RequestError(f"request {index}: {error}", index) from error
        prompts.append(Prompt(index=index, tokens_T=tokens_T, images=images))
    return prompts


def _read(pretrained: Pretrained, request: Request) -> tuple[list[int], Sequence[ImageSource]]:
    """Return the tokens of a request and the images that fill its patch tokens, in order."""
    config, tokenizer = pretrained.config, pretrained.tokenizer
    if request.tokens is not None:
        tokens = _check_ids(request.tokens, config.text.vocab_size)
        if request.images or config.vision is not None:
            _check_patches(config, tokens, request.images)
        return tokens, request.images
    if tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer; give the request as tokens.")
    if request.messages is not None:
        messages = place_images(request.messages, request.images)
        images = [image.source for image in images_of(messages)]
        runs = _image_runs(config, tokenizer, images)
        tokens = dialogue_tokens(
            pretrained,
            messages,
            runs,
            tools=request.tools,
            add_generation_prompt=request.add_generation_prompt,
            allow_special=request.allow_special,
            continue_final=request.continue_final_message,
            template_options=request.template_options,
        )
        return tokens, images
    runs = _image_runs(config, tokenizer, request.images)
    text = tokenizer.encode(request.prompt or "", allow_special=request.allow_special)
    begin = [] if config.bos_id is None else [config.bos_id]
    tokens = [*begin, *(token for run in runs for token in run), *text]
    if not tokens:
        raise ValueError("prompt is empty, and the model has no begin-of-text token to begin with.")
    return tokens, request.images


def _check_ids(tokens: Sequence[int], vocab_size: int) -> list[int]:
    try:
        ids = [operator.index(token) for token in tokens]
    except TypeError as error:
        raise ValueError(f"tokens must be a list of whole numbers ({error}).") from error
    if not ids:
        raise ValueError("tokens is empty; give at least one, such as the begin-of-text token.")
    for place, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ValueError(f"token {place} ({shown(token)}) must lie in 0..{vocab_size - 1}.")
    return ids


def _check_known(tokens_T: np.ndarray, vocab_size: int) -> None:
    """Refuse tokens for which the embedding table has no row."""
    beyond = np.flatnonzero(tokens_T >= vocab_size)
    if beyond.size:
        raise ValueError(
            f"the tokenizer gives token {beyond[0]} the id {tokens_T[beyond[0]]}, but the model's "
            f"table has {vocab_size} rows; load the tokenizer that belongs to the checkpoint."
        )


def _vision(config: ModelConfig) -> VisionConfig:
    if config.vision is None:
        raise ValueError(f"the model {config.name} reads no images; leave them out.")
    return config.vision


def _canvas(config: ModelConfig, image: ImageSource) -> Canvas:
    """Return the grid of tiles that an image is cut into."""
    size = load_image(image).size
    return choose_canvas(*size, tile=_vision(config).image_size, max_tiles=config.max_tiles)


def _image_runs(
    config: ModelConfig, tokenizer: Tokenizer, images: Sequence[ImageSource]
) -> list[list[int]]:
    """Return the run of tokens that stands for each image."""
    if not images:
        return []
    ids, per_tile = ImageTokenIds.from_tokenizer(tokenizer), _vision(config).tokens_per_tile
    canvases = [_canvas(config, image) for image in images]
    return [layout_tokens(canvas.rows, canvas.cols, per_tile, ids) for canvas in canvases]


def _check_patches(config: ModelConfig, tokens: list[int], images: Sequence[ImageSource]) -> None:
    """Refuse patch tokens that the images do not fill exactly."""
    per_tile = _vision(config).tokens_per_tile
    grids = [canvas.rows * canvas.cols for canvas in (_canvas(config, image) for image in images)]
    filled = sum(grid + 1 if grid > 1 else 1 for grid in grids) * per_tile  # +1: the global tile
    found = sum(token == config.patch_id for token in tokens)
    if found != filled:
        raise ValueError(
            f"the {len(images)} images of the request fill {filled} patch tokens, but {found} of "
            f"its tokens are one (id {config.patch_id}); give each image its own, {per_tile} for "
            "every tile."
        )
