"""Text logits against both references, over more than four chunks, in float32.

Each model is filled with the closed-form weights of `tests/golden/closed_form.py`: their logits
have unit scale, and every wrong variant shows.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.golden import closed_form
from tests.golden.closed_form import SCOUT, TEXT_CASES, Case, Weights
from tests.golden.filled import QUICK_COMPILE, build
from tests.golden.stored import golden

# Two float32 programs that sum in different orders differ by up to 1e-5 here.
TOLERANCE = 1e-4
# Small enough to see the epsilon of a norm.
TIGHT = 2e-5


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
def forward(model, ids_BT):
    hidden = model.encode(ids_BT)
    return model.unembed(hidden.x_BTD), hidden.router_logits_LBTE


def logits(case: Case) -> np.ndarray:
    ids_BT = closed_form.tokens(case.length)[None].astype(np.int32)
    return np.asarray(forward(build(case), ids_BT)[0])[0]


def distance(logits_TV: np.ndarray, kind: str, name: str) -> float:
    """Return how far logits are from a stored run, over the columns that it keeps."""
    stored = golden(kind)[name]
    stride = closed_form.VOCAB_SIZE // stored.shape[-1]
    return float(np.abs(logits_TV[:, ::stride] - stored).max())


@pytest.mark.parametrize("name", TEXT_CASES)
def test_logits_match_both_references(name):
    ours = logits(TEXT_CASES[name])
    tolerance = TIGHT if name == "scout_tiny_queries" else TOLERANCE
    assert distance(ours, "hf_text", name) < tolerance
    if name in golden("meta_text"):
        assert distance(ours, "meta_text", name) < tolerance


@pytest.mark.parametrize(
    ("one", "other", "least"),
    [
        ("scout_no_temperature", "scout", 0.14),
        ("maverick_no_temperature", "maverick", 0.14),
        ("scout_no_qk_norm", "scout", 3.0),
        ("maverick_qk_norm", "maverick", 3.0),
        ("scout_unscaled", "scout", 0.0025),
        ("scout_two_experts", "scout", 1.0),
        ("scout_tied_routers", "scout", 1.0),
    ],
)
def test_every_switch_shows_in_the_stored_logits(one, other, least):
    first, second = golden("hf_text")[one], golden("hf_text")[other]
    stride = second.shape[-1] // first.shape[-1]
    assert np.abs(first - second[:, ::stride]).max() > least


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_router_logits_match_transformers(name):
    ids_BT = closed_form.tokens(37)[None].astype(np.int32)
    _, ours_LBTE = forward(build(TEXT_CASES[name]), ids_BT)
    stored_LTE = golden("hf_text")[name + ".router_logits"]
    np.testing.assert_allclose(ours_LBTE[:, 0], stored_LTE, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["scout", "maverick_scaled"])
def test_logits_match_sums_that_need_no_file(name):
    total, magnitude, last = {
        "scout": (-83.27918, 10371.6192, [0.08325, 0.61874, -1.04553, 0.39381]),
        "maverick_scaled": (162.48903, 10318.7735, [-0.03144, 0.32366, 0.05026, 3.85379]),
    }[name]
    ours = logits(TEXT_CASES[name]).astype(np.float64)
    # 9472 logits, each off by up to 1e-5 with random signs.
    assert ours.sum() == pytest.approx(total, abs=5e-3)
    assert np.abs(ours).sum() == pytest.approx(magnitude, abs=5e-3)
    np.testing.assert_allclose(ours[36, :4], last, atol=TOLERANCE)


def swap_gate_and_up(weights: Weights) -> Weights:
    """Exchange the halves of the experts' fused matrix."""
    return {
        name: np.roll(value, value.shape[-1] // 2, axis=-1) if "gate_up" in name else value
        for name, value in weights.items()
    }


def interleave_gate_and_up(weights: Weights) -> Weights:
    """Read the experts' fused matrix as gate, up, gate, up."""
    return {
        name: np.concatenate([value[..., ::2], value[..., 1::2]], axis=-1)
        if "gate_up" in name
        else value
        for name, value in weights.items()
    }


def drop_shared_expert(weights: Weights) -> Weights:
    """Silence the shared expert."""
    return {
        name: np.zeros_like(value) if "shared_expert.down" in name else value
        for name, value in weights.items()
    }


def rotate_halves(weights: Weights) -> Weights:
    """Lay q and k out for a rotation of halves, as other Llamas store them."""
    changed = dict(weights)
    for name, value in weights.items():
        if "language" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
            pairs = value.reshape(-1, 2, SCOUT.head_dim // 2, SCOUT.embed_dim)
            changed[name] = pairs.transpose(0, 2, 1, 3).reshape(value.shape)
    return changed


def double_the_experts(weights: Weights) -> Weights:
    """Double what the routed experts give."""
    return {
        name: 2 * value if name.endswith("experts.down_proj") else value
        for name, value in weights.items()
    }


def exchange_experts_1_and_3(weights: Weights) -> Weights:
    """Tie the routers, then exchange the two experts that tie."""
    return {
        name: value[[0, 3, 2, 1]] if ".experts." in name else value
        for name, value in closed_form.with_tied_routers(weights).items()
    }


def scout(**changes) -> Case:
    return Case(shape=dataclasses.replace(SCOUT, **changes))


# What a wrong model would compute, the stored run it would be compared with, and the least error
# that must show: about half of what it is.
MISTAKES = {
    "temperature one token late": (scout(floor=5), "scout", 0.015),
    "NoPE one layer early": (scout(nope_interval=3), "scout", 2.0),
    "rotation in every layer": (scout(nope_interval=1000), "scout", 1.2),
    "epsilon of 1e-6": (
        Case(shape=dataclasses.replace(SCOUT, norm_eps=1e-6), edit=closed_form.with_tiny_queries),
        "scout_tiny_queries",
        0.1,
    ),
    "up before gate": (Case(edit=swap_gate_and_up), "scout", 2.3),
    "gate and up interleaved": (Case(edit=interleave_gate_and_up), "scout", 3.6),
    "no shared expert": (Case(edit=drop_shared_expert), "scout", 3.9),
    "rotation of halves": (Case(edit=rotate_halves), "scout", 2.8),
    "experts twice as loud": (Case(edit=double_the_experts), "scout", 1.7),
    "highest index on a tie": (Case(edit=exchange_experts_1_and_3), "scout_tied_routers", 1.0),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows_in_the_stored_logits(mistake):
    case, name, least = MISTAKES[mistake]
    assert distance(logits(case), "hf_text", name) > least


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_chunks_matter_from_the_second_chunk_on(name):
    case = TEXT_CASES[name]
    wide = Case(shape=dataclasses.replace(case.shape, chunk_size=4096))
    apart = np.abs(logits(wide) - golden("hf_text")[name]).max(axis=-1)
    assert apart[: case.shape.chunk_size].max() < TOLERANCE
    assert apart[case.shape.chunk_size] > 1.0
