"""The model and inputs of `make bench-hf`, read by both sides of the comparison; numpy alone."""

import cases
import numpy as np

# Scout at a tenth of its width: an expert layer in every place, one layer of four without rotation,
# chunks and temperature of 8192, so that 1024 tokens lie in one chunk.
TEXT = cases.TEXT | {
    "vocab_size": 2048,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1024,
    "intermediate_size_mlp": 2048,
    "num_local_experts": 16,
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
}
LENGTH = 1024  # tokens of the prompt
LAYER = 0  # whose mixture of experts is measured alone


def token_ids() -> np.ndarray:
    """Return the prompt [1, LENGTH] int32."""
    rng = np.random.default_rng(0)
    return rng.integers(3, TEXT["vocab_size"], size=(1, LENGTH), dtype=np.int32)


def mixed_requests(count: int = 64) -> list[tuple[list[int], int]]:
    """Return prompts and how many new tokens each gets: many short ones, few long ones.

    Lengths are 16 to 1024 and 8 to 256, by Zipf's law.
    """
    rng = np.random.default_rng(2)
    prompts = np.clip(16 * rng.zipf(1.6, count), 16, LENGTH)
    answers = np.clip(8 * rng.zipf(1.6, count), 8, 256)
    words = TEXT["vocab_size"]
    return [
        (rng.integers(3, words, length).tolist(), int(new))
        for length, new in zip(prompts, answers, strict=True)
    ]


def layer_inputs() -> np.ndarray:
    """Return normalised hidden states [1, LENGTH, D] float32."""
    rng = np.random.default_rng(1)
    return rng.normal(size=(1, LENGTH, TEXT["hidden_size"])).astype(np.float32)
