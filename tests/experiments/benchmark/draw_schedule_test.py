import numpy as np
from PIL import Image

from experiments.benchmark import draw_schedule
from tests.house import tree


def test_the_drawn_schedule_computes_what_the_mask_asks_for():
    positions = np.arange(draw_schedule.TOKENS)
    cells = draw_schedule.schedule(positions, np.zeros_like(positions), draw_schedule.CHUNK)
    in_chunk = draw_schedule.CHUNK // draw_schedule.BLOCK
    row, column = np.indices(cells.shape)
    same_chunk = row // in_chunk == column // in_chunk
    np.testing.assert_array_equal(cells == 1, row == column)
    np.testing.assert_array_equal(cells == 2, same_chunk & (row > column))


def test_the_picture_of_the_page_is_the_one_that_the_program_draws():
    kept = Image.open(tree.ROOT / "kernels_pallas/schedule.png")
    np.testing.assert_array_equal(
        np.asarray(kept), np.asarray(draw_schedule.draw(draw_schedule.panels()))
    )
