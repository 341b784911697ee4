"""Turn picture files into the tiles and placeholder tokens that the model reads.

A picture is fitted without distortion on a canvas of up to `max_tiles` square tiles, padded with
black at the right and the bottom, and cut into tiles row by row. When there is more than one tile,
the whole picture squashed into one more tile (the global tile) follows them. Every tile becomes
`tokens_per_tile` patch tokens in the prompt. A video is a list of frames, each a picture.

Source of the arithmetic: `llama_models.llama4.preprocess` and `Llama4ImageProcessor` of
transformers; they agree on canvases and tiles, and the pixels here are the former's to the bit.
"""

import base64
import dataclasses
import functools
import io
import math
import pathlib
import re
import struct
import warnings
import zlib
from collections.abc import Iterable, Sequence
from typing import Protocol
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image, ImageOps, features

from llama4_jax.config import VisionConfig
from llama4_jax.untrusted import read_bytes, shown

# Pillow warns from here on that a small file may unpack to gigabytes. The model sees at most 16
# tiles of 336 x 336 (1.8 megapixels), so nothing is lost by asking for a smaller picture.
MAX_PIXELS = 89_478_485
MAX_BYTES = 1 << 29
"""Largest picture file: MAX_PIXELS uncompressed, in six bytes each."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""What is read. Pillow knows others, one of which (EPS) it hands to a program of its own."""

# What Pillow's decoders raise on truncated, damaged or foreign bytes, besides OSError.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)


class SpecialTokens(Protocol):
    """The part of a tokenizer that the image layout needs."""

    def special_id(self, name: str) -> int:
        """Return the id of the special token spelled `name`."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTokenIds:
    """Ids of the special tokens that lay out a picture in a prompt."""

    image_start: int
    image_end: int
    image: int
    patch: int
    tile_x_separator: int
    tile_y_separator: int

    @classmethod
    def from_tokenizer(cls, tokenizer: SpecialTokens) -> "ImageTokenIds":
        """Look the six tokens up by their Llama 4 names.

        Raises:
            ValueError: the tokenizer lacks one of them.
        """
        names = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: tokenizer.special_id(f"<|{name}|>") for name in names})


@dataclasses.dataclass(frozen=True)
class Canvas:
    """A grid of tiles, counted in tiles."""

    rows: int
    cols: int


@dataclasses.dataclass(frozen=True, eq=False)
class ImageTiles:
    """The tiles of one picture, row by row, the global tile last when there are several.

    Attributes:
        tiles_NCHW: [rows * cols (+ 1 if that is above 1), 3, tile, tile] float32 in [-1, 1].
        rows: tiles from top to bottom, without the global tile.
        cols: tiles from left to right.
    """

    tiles_NCHW: np.ndarray
    rows: int
    cols: int


def load_image(source: str | pathlib.Path | bytes | np.ndarray | Image.Image) -> Image.Image:
    """Read a picture as upright RGB; transparent parts become white.

    Any colour mode and depth of FORMATS is accepted; the EXIF orientation is applied; of an
    animation the first frame is taken.

    Args:
        source: a path, the bytes of a picture file, a `data:` URL of them, an array [H, W, 3] or
            [H, W] of uint8, or a picture, which is taken as it is.

    Raises:
        ValueError: the file is missing, no picture, damaged, truncated, above MAX_PIXELS, or of a
            pixel type without a defined white. The message names the file.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, str) and re.match(r"\w+:", source):
        source = _from_url(source)
    name = "image bytes" if isinstance(source, bytes) else f"image {shown(str(source))}"
    try:
        data = source if isinstance(source, bytes) else read_bytes(pathlib.Path(source), MAX_BYTES)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is damaged, which is then refused or left out
        return _decode(data, name)


def _decode(data: bytes, name: str) -> Image.Image:
    """Read the bytes of a picture file, which messages call `name`."""
    formats = [kind for kind in FORMATS if kind != "AVIF" or features.check("avif")]
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} has over {MAX_PIXELS} pixels; downscale it first") from error
    except _DECODE_ERRORS as error:
        raise ValueError(
            f"{name} ({len(data)} bytes) is not a picture in one of {', '.join(FORMATS)}"
        ) from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"{name} has {image.width} x {image.height} pixels, above {MAX_PIXELS}; downscale it"
        )
    try:
        image.load()
        return to_rgb(_upright(image))
    except _DECODE_ERRORS as error:
        raise ValueError(
            f"{name} ({image.format}, {image.width} x {image.height}) is damaged, truncated or "
            f"of an unsupported pixel type: {error}"
        ) from error


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (3,)) or not pixels.size:
        raise ValueError(
            f"an image array has shape {pixels.shape} and dtype {pixels.dtype}; it must be "
            "[H, W, 3] or [H, W] of uint8"
        )
    return to_rgb(Image.fromarray(pixels))


def _from_url(url: str) -> bytes | str:
    """Decode a `data:` URL; a name with a colon that is no URL is returned as it is.

    Raises:
        ValueError: it is damaged, or the picture is elsewhere.
    """
    if url.startswith(("http:", "https:", "ftp:", "file:", "gs:", "s3:")):
        raise ValueError(
            f"image {url[:80]!r} is somewhere else and is not fetched; read it yourself and pass "
            "its bytes, or a data: URL of them"
        )
    if not url.startswith("data:"):
        return url
    header, comma, body = url.partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        is_base64 = header.endswith(";base64")
        return base64.b64decode(body, validate=True) if is_base64 else unquote_to_bytes(body)
    except ValueError as error:
        raise ValueError(f"image {url[:40]!r} is no data: URL ({error})") from error


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a damaged EXIF block counts as none."""
    try:
        return ImageOps.exif_transpose(image)
    except _DECODE_ERRORS:
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB: transparency over white, 16-bit scaled to 8-bit.

    Raises:
        ValueError: floating-point pixels, or integers outside 0..65535, whose white is undefined.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("integer pixels outside 0..65535; save it with 8 or 16 bits")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


@functools.cache
def _canvases(max_tiles: int) -> tuple[Canvas, ...]:
    """List the grids of at most `max_tiles` tiles in the references' order, which settles ties.

    Largest count first, and for each count by ascending rows; then gathered by aspect ratio in
    order of first appearance. 16 tiles give 50 grids.
    """
    groups: dict[float, list[Canvas]] = {}
    for count in range(max_tiles, 0, -1):
        for rows in range(1, count + 1):
            if count % rows == 0:
                cols = count // rows
                groups.setdefault(rows / cols, []).append(Canvas(rows, cols))
    return tuple(canvas for group in groups.values() for canvas in group)


def choose_canvas(width: int, height: int, tile: int = 336, max_tiles: int = 16) -> Canvas:
    """Choose the grid of tiles that a picture is fitted on.

    The scale of a grid is min(grid width / width, grid height / height) in float32. The smallest
    scale of at least 1 wins, else the largest; among equal scales the smallest grid.

    Args:
        width: of the picture, pixels.
        height: of the picture, pixels.
        tile: side of a tile, pixels.
        max_tiles: most tiles in a grid, without the global tile.

    Raises:
        ValueError: a size below 1.

    Source: `get_best_fit` in both references.
    """
    for name, value in (("width", width), ("height", height), ("tile", tile)):
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1 pixel")
    if max_tiles < 1:
        raise ValueError(f"max_tiles ({max_tiles}) must be at least 1")
    canvases = _canvases(max_tiles)
    # float32 because the references compare float32 scales: float64 would split their ties.
    across = np.array([c.cols * tile for c in canvases], np.float32) / np.float32(width)
    down = np.array([c.rows * tile for c in canvases], np.float32) / np.float32(height)
    scales = np.minimum(across, down)
    enlarging = scales[scales >= 1]
    best = enlarging.min() if enlarging.size else scales.max()
    tied = [canvas for canvas, scale in zip(canvases, scales, strict=True) if scale == best]
    return min(tied, key=lambda canvas: canvas.rows * canvas.cols)


def fit_size(width: int, height: int, canvas: Canvas, tile: int = 336) -> tuple[int, int]:
    """Return the (width, height) that a picture is resized to before it is padded to its canvas.

    The picture keeps its aspect ratio, fills the canvas where it is larger, and is never enlarged
    beyond one tile on its limiting side.

    Source: `resize_without_distortion` in `llama_models.llama4.preprocess`.
    """
    box_width = min(max(width, tile), canvas.cols * tile)
    box_height = min(max(height, tile), canvas.rows * tile)
    across, down = box_width / width, box_height / height
    if across < down:
        return box_width, max(1, min(math.floor(height * across), box_height))
    return max(1, min(math.floor(width * down), box_width)), box_height


def normalize(image: Image.Image) -> np.ndarray:
    """Map 8-bit RGB to [3, height, width] float32 in [-1, 1] as (x / 255 - 0.5) / 0.5."""
    pixels_HWC = np.asarray(image.convert("RGB"), np.float32)
    return (pixels_HWC.transpose(2, 0, 1) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


def preprocess(image: Image.Image, vision_config: VisionConfig, max_tiles: int = 16) -> ImageTiles:
    """Fit a picture on its canvas and cut it into tiles.

    Resizing is Pillow's antialiased bilinear filter on 8-bit pixels; padding is black.

    Args:
        image: any Pillow picture; `load_image` gives one from a file.
        vision_config: gives the side of a tile (`image_size`).
        max_tiles: most tiles, without the global tile.
    """
    tile = vision_config.image_size
    image = image if image.mode == "RGB" else to_rgb(image)
    canvas = choose_canvas(image.width, image.height, tile=tile, max_tiles=max_tiles)
    fitted = image.resize(
        fit_size(image.width, image.height, canvas, tile), Image.Resampling.BILINEAR
    )
    padded = Image.new("RGB", (canvas.cols * tile, canvas.rows * tile), (0, 0, 0))
    padded.paste(fitted)
    pixels = normalize(padded).reshape(3, canvas.rows, tile, canvas.cols, tile)
    tiles_NCHW = pixels.transpose(1, 3, 0, 2, 4).reshape(-1, 3, tile, tile)
    if len(tiles_NCHW) > 1:
        whole = normalize(image.resize((tile, tile), Image.Resampling.BILINEAR))
        tiles_NCHW = np.concatenate([tiles_NCHW, whole[None]])
    return ImageTiles(np.ascontiguousarray(tiles_NCHW), canvas.rows, canvas.cols)


def layout_tokens(rows: int, cols: int, tokens_per_tile: int, ids: ImageTokenIds) -> list[int]:
    """Return the token ids that stand for one picture in a prompt.

    One tile: start, image, patches, end. Several: start, then each row's tiles with x separators
    between them and a y separator after every row, then image, the global tile's patches, end.
    """
    patches = [ids.patch] * tokens_per_tile
    tokens = [ids.image_start]
    if rows * cols > 1:
        for _ in range(rows):
            tokens += patches
            for _ in range(cols - 1):
                tokens += [ids.tile_x_separator, *patches]
            tokens.append(ids.tile_y_separator)
    return [*tokens, ids.image, *patches, ids.image_end]


def image_tokens(tiles: ImageTiles, vision_config: VisionConfig, ids: ImageTokenIds) -> list[int]:
    """Return the token ids for the tiles that `preprocess` made."""
    return layout_tokens(tiles.rows, tiles.cols, vision_config.tokens_per_tile, ids)


def stack_tiles(images: Iterable[ImageTiles], vision_config: VisionConfig) -> np.ndarray:
    """Concatenate the tiles of several pictures (or video frames) in prompt order.

    Returns:
        [total tiles, 3, tile, tile] float32, the model's `tiles_NCHW`; no pictures give 0 tiles.
    """
    side = vision_config.image_size
    none: Sequence[np.ndarray] = [np.zeros((0, 3, side, side), np.float32)]
    return np.concatenate([*none, *(image.tiles_NCHW for image in images)])
