"""Draw which blocks of queries and keys attention copies, masks and multiplies.

    python -m experiments.benchmark.draw_schedule --output=schedule.png

The picture shows the real schedule of `kernels_pallas`: the summaries of blocks that its kernels
read, for three rows of 8,192 tokens in blocks of 256. Expect 144 of 1,024 blocks to be computed in
a layer with chunks of 2,048, 528 in one without, and 154 in four packed texts.
"""

import pathlib

import numpy as np
from absl import flags
from PIL import Image, ImageDraw, ImageFont

from experiments.benchmark.schedule import blocks_that_meet
from experiments.launch import launch

TOKENS, BLOCK, CHUNK = 8192, 256, 2048
PACKED = (700, 3000, 4200, 292)  # lengths of texts in a packed row
CELL, GAP, TOP = 9, 40, 64
SKIPPED, MASKED, WHOLE, INK = "#eceef1", "#f2a65a", "#3d6fb6", "#1f2430"


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's flags."""
    flags.DEFINE_string("output", "schedule.png", "Picture to write.", flag_values=values)


def schedule(positions_T: np.ndarray, segments_T: np.ndarray, chunk: int | None) -> np.ndarray:
    """Return [blocks, blocks]: 0 neither copied nor computed, 1 with a mask, 2 without."""
    met, whole = blocks_that_meet(positions_T, segments_T, chunk, BLOCK, BLOCK)
    return np.asarray(met.astype(int) + (met & whole))


def panels() -> list[tuple[str, np.ndarray]]:
    """Return a title and a schedule for each kind of row."""
    ordinary, one = np.arange(TOKENS), np.zeros(TOKENS, int)
    packed = np.concatenate([np.arange(n) for n in PACKED])
    texts = np.repeat(np.arange(len(PACKED)), PACKED)
    return [
        (f"RoPE layer, chunks of {CHUNK:,}", schedule(ordinary, one, CHUNK)),
        ("NoPE layer", schedule(ordinary, one, None)),
        ("RoPE layer, four packed texts", schedule(packed, texts, CHUNK)),
    ]


def draw(drawn: list[tuple[str, np.ndarray]]) -> Image.Image:
    """Draw schedules side by side, queries downwards and keys to the right."""
    side = TOKENS // BLOCK * CELL
    size = (GAP + len(drawn) * (side + GAP), TOP + side + 2 * GAP)
    picture = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for n, (title, cells) in enumerate(drawn):
        left = GAP + n * (side + GAP)
        count = f"{np.count_nonzero(cells)} of {cells.size:,} blocks computed"
        pen.text((left, 14), title, INK, font)
        pen.text((left, 36), count, INK, font)
        for (i, j), kind in np.ndenumerate(cells):
            x, y = left + j * CELL, TOP + i * CELL
            pen.rectangle((x, y, x + CELL - 2, y + CELL - 2), (SKIPPED, MASKED, WHOLE)[kind])
    legend = (("neither copied nor computed", SKIPPED), ("masked", MASKED), ("no mask", WHOLE))
    for n, (text, colour) in enumerate(legend):
        x, y = GAP + n * 260, TOP + side + 24
        pen.rectangle((x, y, x + 14, y + 14), colour)
        pen.text((x + 22, y - 2), text, INK, font)
    pen.text((GAP + 3 * 260, TOP + side + 22), "queries down, keys to the right", INK, font)
    return picture


def main(values: flags.FlagValues) -> None:
    """Draw, save, and say what was drawn."""
    drawn = panels()
    for title, cells in drawn:
        print(f"{title}: {np.count_nonzero(cells)} of {cells.size:,} blocks computed")
    draw(drawn).save(pathlib.Path(values.output))
    print(f"wrote {values.output}")


if __name__ == "__main__":
    launch(define_flags, main)
