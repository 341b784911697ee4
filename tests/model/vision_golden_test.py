"""Vision features and logits of texts with images, against both references, in float32."""

import functools

import jax
import numpy as np
import pytest

from llama4_jax.model import Llama4
from llama4_jax.model.vision import patchify, pixel_shuffle
from tests.golden import closed_form
from tests.golden.closed_form import TEXT_CASES, VISION, Case, Weights
from tests.golden.filled import QUICK_COMPILE, build
from tests.golden.stored import golden

TOLERANCE = 1e-4

quick_jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILE)


@quick_jit
def features(model: Llama4, tiles_NCHW: jax.Array) -> jax.Array:
    return model.vision(tiles_NCHW, dtype="float32")


@quick_jit
def forward(model: Llama4, ids_BT: jax.Array, tiles_NCHW: jax.Array) -> jax.Array:
    return model(ids_BT, tiles_NCHW=tiles_NCHW).logits_BTV


def test_pixel_shuffle_matches_transformers():
    ramp = np.arange(2 * 16 * 3, dtype=np.float32).reshape(2, 16, 3)
    ours = [pixel_shuffle(x_PD, 4, 2) for x_PD in ramp]
    np.testing.assert_array_equal(ours, golden("hf_vision")["pixel_shuffle"])


def test_pixel_shuffle_takes_the_two_columns_of_a_row_first():
    grid = np.arange(16, dtype=np.float32).reshape(16, 1)
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    np.testing.assert_array_equal(pixel_shuffle(grid, 4, 2), expected)


def test_patches_run_over_channel_row_column():
    tile = np.arange(3 * 4 * 4, dtype=np.float32).reshape(3, 4, 4)
    second = [2, 3, 6, 7, 18, 19, 22, 23, 34, 35, 38, 39]
    np.testing.assert_array_equal(patchify(tile, 2)[1], second)


def test_features_match_transformers():
    ours = features(build(TEXT_CASES["scout"]), closed_form.tiles(3))
    np.testing.assert_allclose(ours, golden("hf_vision")["scout.features"], atol=TOLERANCE)


def test_tiles_do_not_see_each_other():
    model = build(TEXT_CASES["scout"])
    reversed_tiles = np.ascontiguousarray(closed_form.tiles(3)[::-1])
    ours = features(model, reversed_tiles)[::-1]
    np.testing.assert_allclose(ours, golden("hf_vision")["scout.features"], atol=TOLERANCE)


@pytest.mark.parametrize("name", ["scout", "maverick_scaled"])
def test_logits_of_text_with_two_images_match_both_references(name):
    ids, count = closed_form.IMAGE_CASES["two_images"]
    ours = forward(build(TEXT_CASES[name]), ids[None].astype(np.int32), closed_form.tiles(count))
    for kind in ("hf_vision", "meta_text"):
        stored = golden(kind)[f"{name}.two_images"]
        np.testing.assert_allclose(ours[0, :, ::4], stored, atol=TOLERANCE, err_msg=kind)


def test_logits_of_one_image_match_numbers_that_need_no_file():
    ids, count = closed_form.IMAGE_CASES["one_image"]
    ours = forward(build(TEXT_CASES["scout"]), ids[None].astype(np.int32), closed_form.tiles(count))
    stored = golden("hf_vision")["scout.one_image"]
    np.testing.assert_allclose(ours[0, :, ::4], stored, atol=TOLERANCE)
    known = [2.06617, -1.12123, -1.30688, 1.12691]
    np.testing.assert_allclose(ours[0, 9, :4], known, atol=TOLERANCE)


def test_tiles_of_a_batch_go_to_its_rows_in_order():
    batch = closed_form.image_batch()
    ours = forward(build(TEXT_CASES["scout"]), batch.ids_BT.astype(np.int32), batch.tiles_NCHW)
    stored = golden("hf_vision")["scout.batch"]
    np.testing.assert_allclose(ours[:, :, ::4], stored, atol=TOLERANCE)


def class_token_first(weights: Weights) -> Weights:
    """Give the class token the first position embedding and patches the others."""
    table = weights["vision_model.positional_embedding_vlm"]
    return weights | {"vision_model.positional_embedding_vlm": np.roll(table, -1, axis=0)}


def columns_for_rows(weights: Weights) -> Weights:
    """Exchange the halves of each head that rotate by column and by row."""
    changed = dict(weights)
    for name, value in weights.items():
        if "vision" in name and (".q_proj." in name or ".k_proj." in name):
            heads = value.reshape(VISION.num_heads, 2, -1)
            changed[name] = heads[:, ::-1].reshape(value.shape).copy()
    return changed


def pixels_channel_last(weights: Weights) -> Weights:
    """Read patches as (row, column, channel)."""
    name, size = "vision_model.patch_embedding.linear.weight", VISION.patch_size
    w_OI = weights[name].reshape(-1, 3, size, size).transpose(0, 2, 3, 1)
    return weights | {name: w_OI.reshape(weights[name].shape).copy()}


def no_pre_norm(weights: Weights) -> Weights:
    """Halve what the first norm gives; a missing norm changes more."""
    name = "vision_model.layernorm_pre.weight"
    return weights | {name: weights[name] / 2}


@pytest.mark.parametrize(
    ("edit", "least"),
    [
        (class_token_first, 1.0),
        (columns_for_rows, 1.0),
        (pixels_channel_last, 3.0),
        (no_pre_norm, 0.5),
    ],
)
def test_a_mistake_shows_in_the_stored_features(edit, least):
    ours = features(build(Case(edit=edit)), closed_form.tiles(3))
    assert np.abs(ours - golden("hf_vision")["scout.features"]).max() > least
