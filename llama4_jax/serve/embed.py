"""Texts as vectors: the mean of the last hidden states, of length 1."""

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.model import Llama4
from llama4_jax.pretrained import Pretrained
from llama4_jax.serve.requests import Requests, read_requests

_SHORTEST = 16


def embed(pretrained: Pretrained, requests: Requests) -> tuple[list[list[float]], list[int]]:
    """Return a vector [D] of length 1 for every text, and how many tokens it had.

    A model that was trained to continue text was not trained for this: near vectors mean texts that
    go on alike more than texts that mean the same.

    Args:
      pretrained: the model, and its tokenizer if it has one.
      requests: texts, or requests of tokens, without images.

    Raises:
      RequestError: one cannot be read.
      ValueError: one has images or is longer than the model's positions.
    """
    prompts, most = read_requests(pretrained, requests), pretrained.config.text.max_positions
    for prompt in prompts:
        if prompt.images:
            raise ValueError(f"request {prompt.index} has images; only text becomes a vector.")
        if len(prompt.tokens_T) > most:
            raise ValueError(
                f"request {prompt.index} has {len(prompt.tokens_T)} tokens, more than the {most} "
                "positions of the model; shorten it."
            )
    vectors = []
    for prompt in prompts:
        length = len(prompt.tokens_T)
        size = min(most, max(_SHORTEST, 1 << (length - 1).bit_length()))
        tokens_BT = np.zeros((1, size), np.int32)
        tokens_BT[0, :length] = prompt.tokens_T
        with pretrained.on_mesh():
            vector_D = _embed(pretrained.model, tokens_BT, np.int32(length))
        vectors.append(np.asarray(vector_D).tolist())
    return vectors, [len(prompt.tokens_T) for prompt in prompts]


@jax.jit
def _embed(model: Llama4, tokens_BT: jax.Array, length: jax.Array) -> jax.Array:
    """Return the mean of the hidden states of the first `length` tokens, of length 1."""
    at_T = jnp.arange(tokens_BT.shape[1])
    positions_BT = jnp.where(at_T < length, at_T, -1)[None]
    x_TD = model.encode(tokens_BT, positions_BT=positions_BT).x_BTD[0].astype(jnp.float32)
    mean_D = jnp.where((at_T < length)[:, None], x_TD, 0).sum(0) / length
    return mean_D / jnp.maximum(jnp.linalg.norm(mean_D), 1e-12)
