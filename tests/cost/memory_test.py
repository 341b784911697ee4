"""Bytes are those of the arrays themselves, and a device's part is what compilers lay out."""

import json
import math

import jax
import pytest

from experiments.benchmark.programs import scout_slice
from llama4_jax import parallel
from llama4_jax.config import FAMILIES, scout
from llama4_jax.config.runs import OptimizerConfig
from llama4_jax.cost import (
    cache_bytes,
    optimizer_bytes,
    serving_memory,
    training_memory,
    weight_bytes,
)
from llama4_jax.model import Cache, Llama4
from llama4_jax.train import make_optimizer, start_state
from tests.house import tree
from tests.tiny import maverick_like, scout_like

CONFIGS = [family() for family in FAMILIES.values()]
CONFIGS += [scout_like(balance_bias=True), maverick_like(chunk_size=None)]


def num_bytes(leaves):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_weights_and_moments_are_those_of_the_arrays(config):
    def build(dtype=None):
        return jax.eval_shape(
            lambda key: Llama4(config, key=key, param_dtype=dtype), jax.random.key(0)
        )

    assert weight_bytes(config) == num_bytes(build())
    assert weight_bytes(config, "float32") == num_bytes(build("float32"))
    optimizer = make_optimizer(OptimizerConfig(peak_learning_rate=1e-3, warmup_steps=1), steps=9)
    state = jax.eval_shape(lambda m: start_state(m, optimizer=optimizer), build("float32"))
    moments = state.opt_state
    counters = sum(leaf.ndim == 0 for leaf in jax.tree.leaves(moments))
    assert optimizer_bytes(config) == num_bytes(moments) - 4 * counters


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
@pytest.mark.parametrize("length", [1, 64, 1000])
def test_a_cache_has_the_bytes_of_its_arrays(config, length):
    length = min(length, config.text.max_positions)
    cache = jax.eval_shape(lambda: Cache.create(config.text, batch_size=3, max_length=length))
    assert cache_bytes(config.text, rows=3, length=length).total == cache.num_bytes


def test_a_token_of_scout_takes_a_quarter_for_good_and_the_rest_for_a_chunk():
    one = cache_bytes(scout().text)
    assert (one.whole, one.chunk) == (49_152, 147_456)
    million = cache_bytes(scout().text, length=1 << 20)
    assert million.whole == 49_152 << 20 and million.chunk == 147_456 * 8192


def compiled(name):
    text = (tree.ROOT / f"benchmarks/results/compile_{name}.json").read_text("utf-8")
    return [record for record in json.loads(text)["records"] if "figures" in record]


@pytest.mark.parametrize("record", compiled("v5p") + compiled("h100"), ids=lambda r: r["name"])
def test_a_device_holds_what_compilers_lay_out(record):
    """Prefill needs no output head, which its program therefore leaves out."""
    config, sizes = scout_slice(record["layers"]), parallel.parse_mesh(record["mesh"])
    context = sizes.get("context", 1)
    shards = math.prod(sizes.values()) // context
    if record["kind"] == "train":
        held = training_memory(config, shards=shards).total
    else:
        kept = {"rows": record.get("held") or record["rows"], "length": record["context"]}
        held = serving_memory(config, **kept, shards=shards, context=context).total
    if record["kind"] == "prefill":
        held -= 2 * config.text.vocab_size * config.text.embed_dim / shards
    assert record["figures"]["arguments"] == pytest.approx(held, rel=0.005)
