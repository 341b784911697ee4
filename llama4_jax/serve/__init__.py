"""Serving: generate text and score it with a loaded checkpoint.

pretrained = from_pretrained(folder)
answers = generate(pretrained, [Request(prompt="def add(a, b):")], max_new_tokens=32)
scores = score(pretrained, [Request(prompt="print(1 + 1)")])
"""

from llama4_jax.serve.batching import BatchingConfig
from llama4_jax.serve.generate import Answer, NewToken, default_sampling, generate
from llama4_jax.serve.requests import Request
from llama4_jax.serve.sampling import Sampling
from llama4_jax.serve.score import Score, score

__all__ = [
    "Answer",
    "BatchingConfig",
    "NewToken",
    "Request",
    "Sampling",
    "Score",
    "default_sampling",
    "generate",
    "score",
]
