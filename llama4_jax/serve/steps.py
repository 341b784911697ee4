"""The compiled steps of generation: read a piece of the prompts, then choose token after token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from llama4_jax import parallel
from llama4_jax.model import Cache, Llama4
from llama4_jax.serve.sampling import Sampling, sample

NO_TOKEN = -1  # stands where a finished row chose nothing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """A batch in the middle of generation.

    Attributes:
      cache: of everything the model has read.
      token_B: int32 [B], chosen last and not read yet.
      finished_B: bool [B]; a finished row reads and chooses nothing more.
      keys_B: random keys [B], one for each row.
      chosen: int32, tokens chosen so far by a row that is not finished.
    """

    cache: Cache
    token_B: jax.Array
    finished_B: jax.Array
    keys_B: jax.Array
    chosen: jax.Array


@functools.partial(jax.jit, donate_argnames=("cache", "last_BD"))
def read_piece(
    model: Llama4, cache: Cache, last_BD, tokens_BT, positions_BT, ends_B, tiles_NCHW=None
) -> tuple[Cache, jax.Array]:
    """Append one piece of every prompt to the cache.

    Args:
      model: reads it.
      cache: of what was read before; donated.
      last_BD: hidden state of each row's last token, where that was read before; donated.
      tokens_BT: int32 [B, T].
      positions_BT: int32 [B, T], -1 at padding.
      ends_B: int32 [B], where in this piece the row's last token stands; -1 if not in it.
      tiles_NCHW: of the patch tokens in this piece.

    Returns:
      The cache and `last_BD`, both brought up to date.
    """
    hidden = model.encode(tokens_BT, tiles_NCHW, positions_BT=positions_BT, cache=cache)
    assert hidden.cache is not None
    with jax.named_scope("last_token"):
        is_last_BT = jnp.arange(tokens_BT.shape[1]) == ends_B[:, None]
        found_BD = jnp.where(is_last_BT[..., None], hidden.x_BTD, 0).sum(axis=1)
        found_BD = parallel.shard(found_BD, (None, None)).astype(last_BD.dtype)
        return hidden.cache, jnp.where((ends_B >= 0)[:, None], found_BD, last_BD)


@functools.partial(jax.jit, static_argnames=("sampling", "stop_ids"), donate_argnames=("cache",))
def choose_first(
    model: Llama4, cache: Cache, last_BD, keys_B, limit_B, *, sampling: Sampling, stop_ids
) -> tuple[Decoding, jax.Array]:
    """Choose the first token of every row.

    Args:
      model: turns hidden states into logits.
      cache: of the prompts; donated.
      last_BD: hidden state of each prompt's last token.
      keys_B: random keys [B].
      limit_B: int32 [B], most tokens to choose; 0 for a row that is padding.
      sampling: how to choose.
      stop_ids: tokens that finish a row.

    Returns:
      The state of the batch, and the chosen tokens as int32 [B, 1].
    """
    decoding = Decoding(
        cache=cache,
        token_B=jnp.zeros_like(limit_B),
        finished_B=limit_B == 0,
        keys_B=keys_B,
        chosen=jnp.int32(0),
    )
    logits_BV = model.unembed(last_BD[:, None])[:, 0]
    decoding, new_B = _choose(decoding, logits_BV, limit_B, sampling, stop_ids)
    return decoding, new_B[:, None]


@functools.partial(
    jax.jit, static_argnames=("steps", "sampling", "stop_ids"), donate_argnames=("decoding",)
)
def choose_more(
    model: Llama4, decoding: Decoding, limit_B, *, steps: int, sampling: Sampling, stop_ids
) -> tuple[Decoding, jax.Array]:
    """Choose up to `steps` more tokens in every row, fewer once all rows are finished.

    Returns:
      The state of the batch, and the chosen tokens as int32 [B, steps], NO_TOKEN after a row's
      last.
    """

    def is_unfinished(carry):
        decoding, step, _ = carry
        return (step < steps) & ~jnp.all(decoding.finished_B)

    def step_once(carry):
        decoding, step, new_BT = carry
        positions_B = jnp.where(decoding.finished_B, -1, decoding.cache.lengths_B)
        output = model(
            decoding.token_B[:, None], positions_BT=positions_B[:, None], cache=decoding.cache
        )
        decoding = dataclasses.replace(decoding, cache=output.cache)
        decoding, new_B = _choose(decoding, output.logits_BTV[:, 0], limit_B, sampling, stop_ids)
        return decoding, step + 1, jax.lax.dynamic_update_slice(new_BT, new_B[:, None], (0, step))

    new_BT = jnp.full((decoding.token_B.shape[0], steps), NO_TOKEN, jnp.int32)
    decoding, _, new_BT = jax.lax.while_loop(is_unfinished, step_once, (decoding, 0, new_BT))
    return decoding, new_BT


def _choose(decoding: Decoding, logits_BV, limit_B, sampling: Sampling, stop_ids):
    """Choose one token per row; return the state after it and the tokens, NO_TOKEN if finished."""
    logits_BV = parallel.shard(logits_BV, (None, None))  # every device chooses for every row
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(decoding.keys_B, decoding.chosen)
    token_B = sample(logits_BV, keys_B, sampling)
    chosen = decoding.chosen + 1
    stops_B = jnp.isin(token_B, jnp.asarray(stop_ids, jnp.int32)) | (chosen >= limit_B)
    new_B = jnp.where(decoding.finished_B, NO_TOKEN, token_B)
    decoding = dataclasses.replace(
        decoding, token_B=token_B, finished_B=decoding.finished_B | stops_B, chosen=chosen
    )
    return decoding, new_B
