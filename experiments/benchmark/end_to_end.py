"""Whole models with kernels on and off: a forward pass, decoding steps and training steps.

Small models that use every kernel, so that a fault that no single operation shows is seen here; and
a slice of Scout at its real width, whose decoding goes by the bytes of its weights.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kernels_pallas
from experiments.benchmark.programs import scout_slice
from experiments.benchmark.timing import Machine
from llama4_jax.config import ModelConfig, nano
from llama4_jax.config.runs import LossConfig, OptimizerConfig, RunConfig
from llama4_jax.model import Cache, Llama4
from llama4_jax.train.optimizer import make_optimizer
from llama4_jax.train.state import start_state
from llama4_jax.train.step import pretraining_step

STEPS = 20
ROWS, LENGTH = 8, 256
# Kernels round bfloat16 elsewhere than the reference does; a router may then choose another expert,
# whose share of a token is not small. Logits agree in norm, losses in their first two digits.
LOGITS_TOLERANCE = 0.1
LOSS_TOLERANCE = 0.02
SOURCE = pathlib.Path(__file__)


def small_model() -> ModelConfig:
    """Return nano in bfloat16, its experts of a width that the kernels of experts take."""
    config = nano()
    text = dataclasses.replace(config.text, expert_dim=256)
    return dataclasses.replace(config, text=text, vision=None, dtype="bfloat16")


def some_tokens(rows: int, length: int) -> np.ndarray:
    """Return int32 tokens [rows, length]: bytes of this file, over and over."""
    data = np.frombuffer(SOURCE.read_bytes(), np.uint8).astype(np.int32)
    return np.resize(data, (rows, length))


def loss_by_step(config: ModelConfig) -> tuple[list[float], float]:
    """Train on the same batch again and again; return losses, and seconds of a step."""
    run = RunConfig(
        name="steps",
        model=config,
        optimizer=OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=2),
        loss=LossConfig(balance=0.01),
        mixture=(("bytes", 1.0),),
        steps=STEPS,
        batch_size=ROWS,
        row_length=LENGTH,
    )
    tokens_BT = some_tokens(ROWS, LENGTH + 1)
    batch = {
        "tokens_BT": tokens_BT[:, :-1],
        "targets_BT": tokens_BT[:, 1:],
        "positions_BT": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "segments_BT": np.zeros((ROWS, LENGTH), np.int32),
        "loss_mask_BT": np.ones((ROWS, LENGTH), np.float32),
    }
    optimizer = make_optimizer(run.optimizer, steps=STEPS)
    model = Llama4(config, key=jax.random.key(0), param_dtype="float32")
    state, step = start_state(model, optimizer=optimizer), pretraining_step(run, optimizer)
    losses, begun = [], 0.0
    for number in range(STEPS):
        if number == 1:  # the first compiles
            begun = time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, (time.perf_counter() - begun) / (STEPS - 1)


def bytes_of_step(model: Llama4, cache: Cache, rows: int) -> float:
    """Return the bytes of weights and cache that a decoding step reads.

    Of the embedding table that is nothing, of routed experts as many as even routing hits.
    """
    text = model.config.text
    chosen = 1 - (1 - text.experts_per_token / text.num_experts) ** rows

    def read(path: tuple, x: jax.Array) -> float:
        where = jax.tree_util.keystr(path)
        share = 0 if ".embed." in where else chosen if ".experts." in where else 1
        return share * x.size * x.dtype.itemsize

    sizes = jax.tree_util.tree_map_with_path(read, model)
    return cache.num_bytes + sum(jax.tree.leaves(sizes))


def decoding(config: ModelConfig, rows: int, context: int) -> tuple[float, float]:
    """Decode token after token; return seconds of a step, and bytes that it must read."""
    model = jax.jit(lambda: Llama4(config, key=jax.random.key(0)))()
    cache = Cache.create(config.text, batch_size=rows, max_length=context, dtype=config.dtype)
    cache = dataclasses.replace(cache, lengths_B=jnp.full(rows, context - 64, jnp.int32))

    @functools.partial(jax.jit, donate_argnums=2)
    def step(model: Llama4, token_B1: jax.Array, cache: Cache) -> tuple[jax.Array, Cache | None]:
        output = model(token_B1, cache=cache)
        return output.logits_BTV.argmax(-1).astype(jnp.int32), output.cache

    token_B1 = jnp.arange(rows, dtype=jnp.int32)[:, None]  # all different, and so their experts
    token_B1, cache = step(model, token_B1, cache)
    jax.block_until_ready(token_B1)
    begun = time.perf_counter()
    for _ in range(STEPS):
        token_B1, cache = step(model, token_B1, cache)
    jax.block_until_ready(token_B1)
    spent = (time.perf_counter() - begun) / STEPS
    assert cache is not None
    return spent, bytes_of_step(model, cache, rows)


def logits_of(config: ModelConfig) -> jax.Array:
    """Score a text with random weights."""
    model = Llama4(config, key=jax.random.key(0))
    return jax.jit(lambda m, t: m(t).logits_BTV)(model, some_tokens(2, LENGTH))


def _on_and_off(run: Callable[[], Any]) -> tuple[Any, Any]:
    on = run()
    with kernels_pallas.reference_only():
        return on, run()


def _of_nano(here: Machine) -> Iterator[dict[str, Any]]:
    """Compare logits, losses and the time of decoding, with kernels and without."""
    config = small_model()
    on, off = _on_and_off(lambda: logits_of(config))
    error = float(jnp.linalg.norm(on - off) / jnp.linalg.norm(off))
    faults = [] if error <= LOGITS_TOLERANCE else [f"logits differ by {error:.2g}"]
    yield {"pass": "logits", "relative_error": error, "faults": faults}

    (spent, _), (reference, _) = _on_and_off(lambda: decoding(config, 8, 1024))
    yield {"pass": "decode", "seconds": spent, "ratios": {"reference": reference / spent}}

    (losses, spent), (wanted, reference) = _on_and_off(lambda: loss_by_step(config))
    apart = float(np.max(np.abs(np.subtract(losses, wanted)) / np.abs(wanted)))
    is_close = apart <= LOSS_TOLERANCE and losses[-1] < losses[0]
    faults = [] if is_close else [f"losses {losses} with kernels, {wanted} without"]
    yield {
        "pass": "train", "relative_error": apart, "seconds": spent, "faults": faults,
        "ratios": {"reference": reference / spent}, "losses": losses, "reference_losses": wanted,
    }  # fmt: skip


def _of_slice(here: Machine, rows: int) -> Iterator[dict[str, Any]]:
    """Decode with four layers of Scout, some 20 GB of random weights."""
    spent, size = decoding(scout_slice(4), rows, 8192)
    record = {"pass": "decode", "seconds": spent, "gbps": size / spent / 1e9}
    record |= {"tokens_per_second": rows / spent, "of_copying": size / spent / here.copying}
    yield record


_RUNS: dict[str, Callable[[Machine], Iterator[dict[str, Any]]]] = {
    "nano": _of_nano,
    "scout_4_layers_1": functools.partial(_of_slice, rows=1),
    "scout_4_layers_16": functools.partial(_of_slice, rows=16),
}
NAMES = tuple(_RUNS)


def records(here: Machine, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Run what is named, of `NAMES`, and yield a record of each pass as soon as it is known."""
    for name in names:
        for record in _RUNS[name](here):
            base = {"operation": "model", "shape": name, "backend": here.platform, "faults": []}
            yield {**base, **record}
