"""Parameters are counted by part as the model declares them."""

import jax
import pytest

from llama4_jax.config import FAMILIES, maverick, scout
from llama4_jax.cost import count_parameters
from llama4_jax.model import Llama4
from tests.tiny import maverick_like, scout_like

CONFIGS = [family() for family in FAMILIES.values()]
CONFIGS += [scout_like(), maverick_like(experts_per_token=2), maverick_like(chunk_size=None)]
CONFIGS += [scout_like(tie_embeddings=True), scout_like(balance_bias=True, moe_layers=(1, 4))]

# Which part a leaf belongs to, by what stands in its name; the first that does.
PARTS = (
    ("vision.", "vision"),
    ("projector.", "projector"),
    ("embed.table", "embedding"),
    ("head.", "head"),
    ("norm", "norms"),
    (".attention.", "attention"),
    (".router_", "router"),
    (".bias_E", "buffers"),
    (".experts.", "routed"),
    (".shared.", "shared"),
    (".ffn.", "dense"),
)


def declared(config):
    """Count the leaves of a model that is built of shapes alone, by part."""
    model = jax.eval_shape(lambda key: Llama4(config, key=key), jax.random.key(0))
    found = dict.fromkeys((part for _, part in PARTS), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        found[next(part for word, part in PARTS if word in name)] += leaf.size
    return found


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_every_part_is_what_the_model_declares(config):
    count, found = count_parameters(config), declared(config)
    assert {part: getattr(count, part) for part in found} == found
    assert count.total == sum(found.values())


@pytest.mark.parametrize(
    ("family", "total", "active"),
    [
        (scout, 108_641_793_536, 17_172_894_720),
        (maverick, 401_583_781_376, 17_184_691_200),
    ],
)
def test_the_released_models_have_the_sizes_of_their_names(family, total, active):
    count = count_parameters(family())
    assert (count.total, count.active) == (total, active)


def test_a_token_is_multiplied_with_the_head_and_its_own_experts_but_not_with_the_table():
    text = scout().text
    layer = 5120 * 128 * (40 + 8 + 8 + 40) + 2 * 3 * 5120 * 8192 + 5120 * 16
    assert count_parameters(scout()).multiplied == 48 * layer + 5120 * text.vocab_size
    tied = scout_like(tie_embeddings=True)
    assert count_parameters(tied).multiplied == count_parameters(scout_like()).multiplied
