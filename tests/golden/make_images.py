"""Make images.json and images.npz: what both references do to test pictures of many sizes.

Needs a Python with torch, torchvision, transformers and llama-models; the versions that made the
files are written into images.json. Run from the repository root:

    python tests/golden/make_images.py tests/golden

The references are Meta's `VariableSizeImageTransform` with its global tile, and Hugging Face's
`Llama4ImageProcessor`. The test pictures come from `picture`, a closed form that the tests repeat.
For each picture the grid, the tile count, and a spread of pixels of Meta's float32 tiles are kept,
together with the largest difference between the two references.
"""

import importlib.metadata
import json
import pathlib
import sys
import types

import numpy as np
import torch
from PIL import Image

# (width, height, tile, max_tiles): ordinary, thin, tiny and large pictures; other tile sizes.
CASES = (
    (336, 336, 336, 16), (337, 336, 336, 16), (336, 337, 336, 16), (100, 60, 336, 16),
    (60, 100, 336, 16), (640, 480, 336, 16), (800, 300, 336, 16), (300, 800, 336, 16),
    (1024, 768, 336, 16), (1920, 1080, 336, 16), (2000, 500, 336, 16), (400, 400, 336, 16),
    (1500, 1100, 336, 16), (2400, 150, 336, 16), (150, 2400, 336, 16), (1, 1, 336, 16),
    (1, 700, 336, 16), (3000, 3, 336, 16), (511, 769, 336, 4), (1344, 1344, 336, 16),
    (673, 1009, 336, 1), (8, 8, 32, 4), (64, 40, 32, 4), (97, 33, 32, 16), (33, 97, 28, 5),
)  # fmt: skip
KEPT = 97  # pixels kept of each case, evenly spread over the flattened tiles


def picture(width, height):
    """Return an RGB picture of waves and a checkerboard whose bytes follow from its size alone."""
    x = np.arange(width, dtype=np.int64)[None, :]
    y = np.arange(height, dtype=np.int64)[:, None]
    red = (x * 7 + y * 3) % 256
    green = (x * x // 5 + y * 11) % 256
    blue = ((x // 9 + y // 9) % 2) * 200 + (x * y) % 56
    return Image.fromarray(np.stack([red, green, blue], -1).astype(np.uint8))


def import_torchvision():
    """Import torchvision even where its compiled operators do not fit the installed torch."""
    try:
        import torchvision
    except RuntimeError:
        for module in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[module]
        # Detection operators, which resizing never calls, only have to be declared.
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        import torchvision

        torchvision.library = library  # keeps the declarations alive
    return torchvision


def meta_tiles(image, tile, max_tiles):
    """Return (tiles, rows, cols) of Meta's transform, the global tile appended."""
    from llama_models.llama4 import preprocess

    tiles, (rows, cols) = preprocess.VariableSizeImageTransform(tile)(image, max_tiles)
    if len(tiles) > 1:
        whole = preprocess.ResizeNormalizeImageTransform(tile, tile)(image)
        tiles = torch.cat([tiles, whole[None]])
    return tiles.numpy(), rows, cols


def hugging_face_tiles(image, tile, max_tiles):
    """Return (tiles, rows, cols) of the transformers processor."""
    from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor

    processor = Llama4ImageProcessor(size={"height": tile, "width": tile}, max_patches=max_tiles)
    out = processor(image, return_tensors="pt")
    rows, cols = out["aspect_ratios"][0].tolist()
    return out["pixel_values"].float().numpy().reshape(-1, 3, tile, tile), rows, cols


def canvas_table():
    """Return [[width, height, tile, max_tiles, rows, cols], ...] of Meta's choice, sizes only."""
    from llama_models.llama4 import preprocess

    rng = np.random.default_rng(4)
    sizes = np.exp(rng.uniform(0, np.log(12_000), (500, 2))).astype(int).tolist()
    sizes += [(4000, 3000), (10000, 10), (10, 10000), (1920, 1080), (2**20, 2**20)]
    table = []
    for width, height in sizes:
        for tile, most in ((336, 16), (32, 4), (448, 12)):
            transform = preprocess.VariableSizeImageTransform(tile)
            grids = torch.tensor(transform.find_supported_resolutions(most, tile))
            across, down = transform.get_best_fit((width, height), grids)
            table.append([width, height, tile, most, down // tile, across // tile])
    return table


def layout_table():
    """Return [[rows, cols, layout], ...] of both references with one patch token a tile.

    A layout spells the tokens as letters: start, image, patch, x and y separator, end.
    """
    from llama_models.llama4 import chat_format
    from transformers.models.llama4.processing_llama4 import Llama4Processor

    names = ("image_start", "image", "patch", "tile_x_separator", "tile_y_separator", "image_end")
    letters = dict(zip((f"<|{name}|>" for name in names), "sipxye", strict=True))
    side = types.SimpleNamespace(height=2, width=2)
    format_ = types.SimpleNamespace(
        vision_args=types.SimpleNamespace(patch_size=side, pixel_shuffle_ratio=1.0),
        tokenizer=types.SimpleNamespace(special_tokens=letters),
    )
    table = []
    for rows, cols in ((r, c) for r in range(1, 17) for c in range(1, 17) if r * c <= 16):
        count = rows * cols + (rows * cols > 1)
        image = types.SimpleNamespace(
            image_tiles=torch.zeros(count, 3, 2, 2), aspect_ratio=(rows, cols)
        )
        meta = "".join(chat_format.ChatFormat._encode_image(format_, image))
        face = Llama4Processor._prompt_split_image(None, (rows, cols), 1)
        for name, letter in letters.items():
            face = face.replace(name, letter)
        if meta != face:
            raise SystemExit(f"the references lay {rows} x {cols} tiles out differently")
        table.append([rows, cols, meta])
    return table


def main(folder):
    """Compare both references on every case and write the golden files."""
    import_torchvision()
    records, kept = [], {}
    for number, (width, height, tile, most) in enumerate(CASES):
        image = picture(width, height)
        meta, rows, cols = meta_tiles(image, tile, most)
        face, face_rows, face_cols = hugging_face_tiles(image, tile, most)
        if (rows, cols, meta.shape) != (face_rows, face_cols, face.shape):
            raise SystemExit(f"the references disagree on {width} x {height}")
        gap = float(np.abs(meta - face).max())
        records.append(
            {
                "width": width,
                "height": height,
                "tile": tile,
                "max_tiles": most,
                "rows": rows,
                "cols": cols,
                "tiles": len(meta),
                "mean": float(meta.astype(np.float64).mean()),
                "gap": round(gap, 5),
            }
        )
        spread = np.linspace(0, meta.size - 1, KEPT).astype(np.int64)
        kept[f"case_{number:02d}"] = meta.reshape(-1)[spread]
        print(f"{width:5d} x {height:<5d} tile {tile:3d}: {rows:2d} rows {cols:2d} cols, "
              f"references differ by at most {gap:.5f}")  # fmt: skip
    packages = ("torch", "torchvision", "transformers", "llama_models", "pillow", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    parts = {"versions": json.dumps(versions)}
    for name, rows in (
        ("cases", records),
        ("canvases", canvas_table()),
        ("layouts", layout_table()),
    ):
        parts[name] = "[\n  " + ",\n  ".join(json.dumps(row) for row in rows) + "\n]"
    text = ",\n".join(f'"{name}": {part}' for name, part in parts.items())
    (folder / "images.json").write_text("{\n" + text + "\n}\n")
    np.savez_compressed(folder / "images.npz", **kept)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
