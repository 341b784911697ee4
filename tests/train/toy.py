"""A toy with the interface of a model, and a tiny run of it: training itself is under test here."""

import dataclasses
from typing import Any

import grain
import jax
import numpy as np
from flax import nnx

from llama4_jax import parallel
from llama4_jax.config import ModelConfig, TextConfig
from llama4_jax.config.runs import LossConfig, OptimizerConfig, RunConfig
from llama4_jax.layers.param import constant, normal

VOCAB = 16
LENGTH = 8


@dataclasses.dataclass(frozen=True)
class Hidden:
    x_BTD: jax.Array
    router_load: None = None


class Toy(nnx.Module):
    """Predict the next token from this one through one matrix."""

    def __init__(self, key: jax.Array, *, embed_dim: int = 8) -> None:
        table, head = jax.random.split(key)
        axes: Any = (None, None)
        self.table_VD = normal(
            table, (VOCAB, embed_dim), axes, std=1.0, dtype="float32", role="embedding"
        )
        self.scale_D = constant(1.0, (embed_dim,), (None,), dtype="float32", role="norm")
        self.w_DV = normal(
            head, (embed_dim, VOCAB), ("weight_embed", "vocab"), std=0.1, dtype="float32"
        )

    def encode(self, tokens_BT: jax.Array, *_: Any, **__: Any) -> Hidden:
        x_BTD = parallel.take(self.table_VD[...], tokens_BT, out=("batch", "seq", "embed"))
        return Hidden(x_BTD * self.scale_D[...])

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        return parallel.einsum("BTD,DV->BTV", x_BTD, self.w_DV[...], out=("batch", "seq", "vocab"))


def build() -> Toy:
    return Toy(jax.random.key(0))


def make_run(**changes: Any) -> RunConfig:
    """Return a run of six steps, changed as asked."""
    text = TextConfig(
        vocab_size=VOCAB,
        embed_dim=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=8,
        expert_dim=8,
        num_experts=1,
        moe_layers=(),
        nope_layers=(),
        chunk_size=4,
        rope_scaling=None,
        use_qk_norm=False,
        temperature=None,
        max_positions=64,
    )
    model = ModelConfig(
        name="toy", text=text, vision=None, bos_id=0, eos_ids=(1,), pad_id=2, patch_id=None
    )
    run = RunConfig(
        name="toy",
        model=model,
        optimizer=OptimizerConfig(peak_learning_rate=0.05, warmup_steps=1),
        loss=LossConfig(chunks=2),
        mixture=(("cycle", 1.0),),
        steps=6,
        batch_size=4,
        row_length=LENGTH,
        log_interval=1,
        eval_interval=3,
        checkpoint_interval=100,
    )
    return dataclasses.replace(run, **changes)


def make_batch(seeds: np.ndarray) -> dict[str, np.ndarray]:
    """Make rows in which every token is followed by the token three above it."""
    tokens = (seeds[:, None] + 3 * np.arange(LENGTH + 1)) % VOCAB
    rows = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (len(seeds), LENGTH))
    return {
        "tokens_BT": tokens[:, :-1].astype(np.int32),
        "targets_BT": tokens[:, 1:].astype(np.int32),
        "loss_mask_BT": np.ones((len(seeds), LENGTH), np.float32),
        "positions_BT": rows,
        "segments_BT": np.zeros_like(rows),
    }


def make_dataset(batch_size: int = 4) -> grain.IterDataset:
    """Return an endless shuffled stream of batches."""
    rows = grain.MapDataset.range(VOCAB).shuffle(seed=3).repeat()
    return rows.to_iter_dataset().batch(batch_size).map(make_batch)
