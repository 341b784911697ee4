"""Pictures become the references' tiles to the bit, and bad files become clear errors."""

import base64
import io
import json
import os
import pathlib
import urllib.parse
import zlib

import numpy as np
import pytest
from PIL import Image

from llama4_jax.config import VisionConfig
from llama4_jax.data import images
from llama4_jax.data.images import (
    Canvas,
    ImageTokenIds,
    choose_canvas,
    fit_size,
    layout_tokens,
    load_image,
    preprocess,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
RECORD = json.loads((GOLDEN / "images.json").read_text())
IDS = ImageTokenIds(
    image_start=80, image_end=81, image=90, patch=92, tile_x_separator=84, tile_y_separator=85
)


def picture(width, height):
    """The closed-form picture of the program that made the golden files."""
    x, y = np.arange(width, dtype=np.int64)[None, :], np.arange(height, dtype=np.int64)[:, None]
    waves = [(x * 7 + y * 3) % 256, (x * x // 5 + y * 11) % 256]
    board = ((x // 9 + y // 9) % 2) * 200 + (x * y) % 56
    return Image.fromarray(np.stack([*waves, board], -1).astype(np.uint8))


def vision(tile):
    """A vision config for a tile size; only the tile and its tokens matter here."""
    return VisionConfig(image_size=tile, patch_size=tile // 4)


def encode(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


# width, height -> rows, cols, width and height after resizing
EXAMPLES = [
    (336, 336, 1, 1, 336, 336),
    (100, 60, 1, 1, 336, 201),
    (337, 336, 1, 2, 337, 336),
    (640, 480, 2, 2, 640, 480),
    (800, 300, 1, 3, 800, 300),
    (300, 800, 3, 1, 300, 800),
    (1024, 768, 3, 4, 1024, 768),
    (1920, 1080, 3, 5, 1680, 945),
    (2000, 500, 2, 6, 2000, 500),
    (400, 400, 2, 2, 400, 400),
    (4000, 3000, 3, 4, 1344, 1008),
    (10000, 10, 1, 16, 5376, 5),
    (1, 1, 1, 1, 336, 336),
    (100_000, 1, 1, 16, 5376, 1),
]


@pytest.mark.parametrize("width, height, rows, cols, new_width, new_height", EXAMPLES)
def test_examples_get_their_canvas_and_size(width, height, rows, cols, new_width, new_height):
    canvas = choose_canvas(width, height)
    assert canvas == Canvas(rows, cols)
    assert fit_size(width, height, canvas) == (new_width, new_height)


def test_sixteen_tiles_allow_fifty_canvases_in_the_references_order():
    canvases = images._canvases(16)
    assert len(set(canvases)) == len(canvases) == 50
    # Square grids appear where 16 = 4 x 4 first meets the ratio one, the largest first.
    squares = [canvas.rows for canvas in canvases if canvas.rows == canvas.cols]
    assert squares == [4, 3, 2, 1]
    assert canvases[0] == Canvas(1, 16)


def test_every_canvas_equals_the_reference_for_500_random_sizes():
    for width, height, tile, most, rows, cols in RECORD["canvases"]:
        assert choose_canvas(width, height, tile, most) == Canvas(rows, cols), (width, height, tile)


def test_a_canvas_needs_positive_sizes():
    with pytest.raises(ValueError, match=r"width \(0\) must be at least 1"):
        choose_canvas(0, 5)
    with pytest.raises(ValueError, match=r"max_tiles \(0\)"):
        choose_canvas(5, 5, max_tiles=0)


@pytest.mark.parametrize("number", range(len(RECORD["cases"])))
def test_tiles_equal_the_reference_to_the_bit(number):
    case = RECORD["cases"][number]
    tiles = preprocess(
        picture(case["width"], case["height"]), vision(case["tile"]), case["max_tiles"]
    )
    assert (tiles.rows, tiles.cols, len(tiles.tiles_NCHW)) == (
        case["rows"],
        case["cols"],
        case["tiles"],
    )
    assert tiles.tiles_NCHW.dtype == np.float32
    flat = tiles.tiles_NCHW.reshape(-1)
    golden = np.load(GOLDEN / "images.npz")[f"case_{number:02d}"]
    spread = np.linspace(0, flat.size - 1, golden.size).astype(np.int64)
    np.testing.assert_array_equal(flat[spread], golden)
    assert abs(flat.astype(np.float64).mean() - case["mean"]) < 1e-12


def test_the_two_references_differ_by_no_more_than_a_grey_level_and_bfloat16():
    # A grey level is 0.0078 and bfloat16 near one has steps of 0.0039, rounded thrice.
    assert max(case["gap"] for case in RECORD["cases"]) < 0.016


def test_tiles_are_row_major_padded_with_black_and_end_with_the_whole_picture():
    image = Image.new("RGB", (64, 40), (255, 255, 255))
    image.paste((255, 0, 0), (32, 0, 64, 32))
    tiles = preprocess(image, vision(32), 4).tiles_NCHW
    assert tiles.shape == (5, 3, 32, 32)
    np.testing.assert_array_equal(tiles[0], 1)
    np.testing.assert_array_equal(tiles[1, 0], 1)
    np.testing.assert_array_equal(tiles[1, 1:], -1)
    np.testing.assert_array_equal(tiles[2, :, :8], 1)
    np.testing.assert_array_equal(tiles[2, :, 8:], -1)
    # The global tile keeps no black border: it is the picture squashed to a square.
    assert tiles[4].min(axis=(1, 2)).tolist() == [1, -1, -1]
    np.testing.assert_array_equal(tiles[4, :, 30:], 1)


def test_layout_of_one_tile():
    assert layout_tokens(1, 1, 3, IDS) == [80, 90, 92, 92, 92, 81]
    assert len(layout_tokens(1, 1, 144, IDS)) == 147


def test_layout_separates_tiles_and_ends_every_row():
    x, y, p = 84, 85, 92
    assert layout_tokens(2, 2, 1, IDS) == [80, p, x, p, y, p, x, p, y, 90, p, 81]
    assert layout_tokens(2, 1, 2, IDS) == [80, p, p, y, p, p, y, 90, p, p, 81]


@pytest.mark.parametrize(
    "rows, cols, length", [(2, 2, 727), (4, 4, 2467), (16, 1, 2467), (1, 16, 2467)]
)
def test_layout_has_the_documented_length(rows, cols, length):
    assert len(layout_tokens(rows, cols, 144, IDS)) == length


def test_all_fifty_layouts_equal_the_references():
    letter = {80: "s", 81: "e", 90: "i", 92: "p", 84: "x", 85: "y"}
    assert len(RECORD["layouts"]) == 50
    for rows, cols, expected in RECORD["layouts"]:
        tokens = layout_tokens(rows, cols, 1, IDS)
        assert "".join(letter[token] for token in tokens) == expected


def test_several_pictures_fill_exactly_their_patch_tokens():
    config = vision(32)
    frames = [preprocess(picture(*size), config, 4) for size in ((8, 8), (64, 40), (40, 20))]
    tokens = [token for frame in frames for token in images.image_tokens(frame, config, IDS)]
    stacked = images.stack_tiles(frames, config)
    assert len(stacked) == 1 + 5 + 3
    assert tokens.count(IDS.patch) == len(stacked) * config.tokens_per_tile
    np.testing.assert_array_equal(stacked[1:6], frames[1].tiles_NCHW)
    assert images.stack_tiles([], config).shape == (0, 3, 32, 32)


def test_token_ids_come_from_the_tokenizer_by_name():
    class Tokenizer:
        def special_id(self, name):
            return {"<|image_start|>": 200080, "<|patch|>": 200092}.get(name, 7)

    ids = ImageTokenIds.from_tokenizer(Tokenizer())
    assert (ids.image_start, ids.patch, ids.image) == (200080, 200092, 7)


# ------------------------------------------------------------------------------- picture files


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    assert list_pixels(load_image(encode(image))) == [(10, 20, 30), (255, 255, 255)]


def list_pixels(image):
    assert image.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def test_grey_with_alpha_and_transparent_palettes_become_white_too():
    grey = Image.new("LA", (1, 1), (0, 0))
    assert list_pixels(load_image(encode(grey))) == [(255, 255, 255)]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([1, 2, 3, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert list_pixels(load_image(encode(palette))) == [(1, 2, 3), (40, 50, 60)]
    clear = encode(palette, transparency=1)
    assert list_pixels(load_image(clear)) == [(1, 2, 3), (255, 255, 255)]


@pytest.mark.parametrize("mode, value, rgb", [("L", 77, 77), ("1", 1, 255), ("I;16", 257 * 9, 9)])
def test_greyscale_of_any_depth_becomes_rgb(mode, value, rgb):
    assert list_pixels(load_image(encode(Image.new(mode, (1, 1), value)))) == [(rgb, rgb, rgb)]


def test_sixteen_bit_white_stays_white():
    white = Image.new("I;16", (1, 1), 65535)
    assert list_pixels(load_image(encode(white, "TIFF"))) == [(255, 255, 255)]


def test_cmyk_becomes_rgb():
    ink = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    assert list_pixels(load_image(encode(ink, "TIFF"))) == [(255, 0, 0)]


def test_float_pixels_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match="save it with 8 or 16 bits"):
        load_image(encode(Image.new("F", (1, 1), 0.5), "TIFF"))


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (3, 2), (0, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn a quarter to the right
    upright = load_image(encode(image, "PNG", exif=exif))
    assert upright.size == (2, 3)
    assert upright.getpixel((1, 0)) == (255, 255, 255)


def test_one_pixel_and_first_frame():
    assert load_image(encode(Image.new("RGB", (1, 1), (1, 2, 3)))).size == (1, 1)
    frames = [Image.new("RGB", (2, 2), colour) for colour in ((9, 9, 9), (200, 0, 0))]
    moving = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(moving).getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize("kind", images.FORMATS)
def test_truncated_files_are_refused_by_name(kind, tmp_path):
    data = encode(picture(60, 50), kind)
    path = tmp_path / "cut.picture"
    for length in (len(data) // 2, 40, 12, 3):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.picture"):
            load_image(path)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_foreign_files_are_refused_by_name(content, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.txt"):
        load_image(str(path))


@pytest.mark.parametrize("kind", images.FORMATS)
def test_every_format_that_is_named_is_read(kind):
    assert load_image(encode(picture(20, 10), kind)).size == (20, 10)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "TGA", "JPEG2000", "ICNS"])
def test_a_format_that_is_not_named_is_refused(kind, monkeypatch):
    def start_a_program(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", start_a_program)
    with pytest.raises(ValueError, match="is not a picture in one of PNG, JPEG"):
        load_image(encode(picture(16, 16), kind))


def test_pipes_devices_and_vast_files_are_refused_before_they_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png is a device or a pipe"):
        load_image(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="/dev/zero is a device or a pipe"):
        load_image("/dev/zero")
    with (tmp_path / "vast.png").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"vast\.png has 1099511627776 bytes"):
        load_image(tmp_path / "vast.png")


def test_missing_files_and_folders_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.png' cannot be read: No such file"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        load_image(tmp_path)


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_decompression_bombs_are_refused_before_they_unpack(side):
    bomb = bytearray(encode(Image.new("1", (8, 8))))
    header = b"IHDR" + side.to_bytes(4) + side.to_bytes(4) + bytes(bomb[24:29])
    bomb[12:33] = header + zlib.crc32(header).to_bytes(4)
    with pytest.raises(ValueError, match=r"image bytes has .* downscale"):
        load_image(bytes(bomb))


def test_a_damaged_exif_block_does_not_spoil_the_picture():
    plain = encode(Image.new("RGB", (2, 1), (5, 5, 5)), "JPEG", exif=b"Exif\x00\x00garbage")
    assert load_image(plain).size == (2, 1)


def test_a_data_url_may_be_base64_or_percent_encoded():
    image = picture(3, 2)
    data = encode(image)
    urls = (
        "data:image/png;base64," + base64.b64encode(data).decode(),
        "data:image/png," + urllib.parse.quote(data),
    )
    for url in urls:
        np.testing.assert_array_equal(images.load_image(url), images.load_image(data))


@pytest.mark.parametrize("url", ["data:image/png;base64,@@", "data:image/png;base64", "data:"])
def test_a_damaged_data_url_is_refused(url):
    with pytest.raises(ValueError, match="no data: URL"):
        images.load_image(url)


@pytest.mark.parametrize("url", ["http://x/a.png", "https://x/a.png", "file:///etc/passwd"])
def test_a_picture_elsewhere_is_not_fetched(url):
    with pytest.raises(ValueError, match="pass its bytes, or a data: URL"):
        images.load_image(url)


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2, 4), np.uint8), np.zeros((2, 2, 3)), np.zeros((0, 2), np.uint8)]
)
def test_an_array_that_is_no_picture_is_refused(array):
    with pytest.raises(ValueError, match=r"must be \[H, W, 3\] or \[H, W\] of uint8"):
        images.load_image(array)
