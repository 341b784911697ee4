"""The compiled steps of generation: read a chunk of the prompts, then sample token after token."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama4_jax import parallel
from llama4_jax.model import Cache, Llama4
from llama4_jax.serve.sampling import Numbers, SamplingRows, sample

NO_TOKEN = -1  # stands where a finished row samples nothing, and pads lists of stop tokens


class RowRules(NamedTuple):
    """What the rows of a batch were asked: arrays, so that other numbers are no new program.

    Attributes:
      sampling: how each row draws.
      keys_B: typed random keys [B], one for each row.
      limit_B: int32 [B], most tokens to sample; 0 for a row that is padding.
      stop_ids_BS: int32 [B, S], tokens that finish a row; NO_TOKEN where there are fewer.
    """

    sampling: SamplingRows
    keys_B: jax.Array
    limit_B: Numbers
    stop_ids_BS: Numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """A batch in the middle of generation.

    Attributes:
      cache: of everything the model has read.
      token_B: int32 [B], sampled last and not read yet.
      finished_B: bool [B]; a finished row reads and samples nothing more.
      sampled_B: int32 [B], tokens sampled so far.
    """

    cache: Cache
    token_B: jax.Array
    finished_B: jax.Array
    sampled_B: jax.Array


@functools.partial(jax.jit, donate_argnames=("cache", "last_BD"))
def prefill_chunk(
    model: Llama4, cache: Cache, last_BD, tokens_BT, positions_BT, ends_B, tiles_NCHW=None
) -> tuple[Cache, jax.Array]:
    """Append one chunk of every prompt to the cache.

    Args:
      model: reads it.
      cache: of what was read before; donated.
      last_BD: hidden state of each row's last token, where that was read before; donated.
      tokens_BT: int32 [B, T].
      positions_BT: int32 [B, T], -1 at padding.
      ends_B: int32 [B], where in this chunk the row's last token stands; -1 if not in it.
      tiles_NCHW: of the patch tokens in this chunk.

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


@functools.partial(jax.jit, donate_argnames=("cache",))
def sample_first(
    model: Llama4, cache: Cache, last_BD: jax.Array, rules: RowRules
) -> tuple[DecodeState, jax.Array]:
    """Sample the first token of every row.

    Args:
      model: turns hidden states into logits.
      cache: of the prompts; donated.
      last_BD: hidden state of each prompt's last token.
      rules: of the rows.

    Returns:
      The state of the batch, and the tokens as int32 [B, 1].
    """
    state = DecodeState(
        cache=cache,
        token_B=jnp.zeros_like(rules.limit_B),
        finished_B=rules.limit_B == 0,
        sampled_B=jnp.zeros_like(rules.limit_B),
    )
    logits_BV = model.unembed(last_BD[:, None])[:, 0]
    state, new_B = _sample(state, logits_BV, rules)
    return state, new_B[:, None]


@functools.partial(jax.jit, static_argnames=("steps",), donate_argnames=("state",))
def decode_steps(
    model: Llama4, state: DecodeState, rules: RowRules, *, steps: int
) -> tuple[DecodeState, jax.Array]:
    """Sample up to `steps` more tokens in every row, fewer once all rows are finished.

    Returns:
      The state of the batch, and the tokens as int32 [B, steps], NO_TOKEN after a row's last.
    """

    def is_unfinished(carry):
        state, step, _ = carry
        return (step < steps) & ~jnp.all(state.finished_B)

    def step_once(carry):
        state, step, new_BT = carry
        positions_B = jnp.where(state.finished_B, -1, state.cache.lengths_B)
        output = model(state.token_B[:, None], positions_BT=positions_B[:, None], cache=state.cache)
        state = dataclasses.replace(state, cache=output.cache)
        state, new_B = _sample(state, output.logits_BTV[:, 0], rules)
        return state, step + 1, jax.lax.dynamic_update_slice(new_BT, new_B[:, None], (0, step))

    new_BT = jnp.full((state.token_B.shape[0], steps), NO_TOKEN, jnp.int32)
    state, _, new_BT = jax.lax.while_loop(is_unfinished, step_once, (state, 0, new_BT))
    return state, new_BT


def _sample(
    state: DecodeState, logits_BV: jax.Array, rules: RowRules
) -> tuple[DecodeState, jax.Array]:
    """Sample one token per row; return the state after it and the tokens, NO_TOKEN if finished."""
    logits_BV = parallel.shard(logits_BV, (None, None))  # every device samples for every row
    keys_B = jax.vmap(jax.random.fold_in)(rules.keys_B, state.sampled_B)
    token_B = sample(logits_BV, keys_B, rules.sampling)
    sampled_B = state.sampled_B + ~state.finished_B
    stops_B = (token_B[:, None] == rules.stop_ids_BS).any(-1) | (sampled_B >= rules.limit_B)
    new_B = jnp.where(state.finished_B, NO_TOKEN, token_B)
    state = dataclasses.replace(
        state, token_B=token_B, finished_B=state.finished_B | stops_B, sampled_B=sampled_B
    )
    return state, new_B
