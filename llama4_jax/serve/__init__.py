"""Serving: generate text and score it with a loaded checkpoint.

pretrained = from_pretrained(folder)
answers = generate(pretrained, [Request(prompt="def add(a, b):")], max_new_tokens=32)
scores = score(pretrained, [Request(prompt="print(1 + 1)")])
"""

from llama4_jax.serve.answers import Event, TokenLogprobs
from llama4_jax.serve.engine import Engine
from llama4_jax.serve.generate import Answer, NewToken, generate
from llama4_jax.serve.options import Options, Sampling
from llama4_jax.serve.requests import Request, RequestError
from llama4_jax.serve.score import Score, score
from llama4_jax.serve.sizes import EngineConfig

__all__ = [
    "Answer",
    "Engine",
    "EngineConfig",
    "Event",
    "NewToken",
    "Options",
    "Request",
    "RequestError",
    "Sampling",
    "Score",
    "TokenLogprobs",
    "generate",
    "score",
]
