"""The compiled steps of serving: read tokens into the cache, draw the next, score, encode tiles.

A model's arrays are passed as a flat list: taking a module apart costs more than a small step.
All integers of a call come in one array, so that a step is one transfer.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama4_jax import parallel
from llama4_jax.cache.paged import Pools
from llama4_jax.model import Llama4
from llama4_jax.model.likelihood import logprobs_of_logits
from llama4_jax.serve.sampling import Changes, DrawRows, change_logits, mask_logits, sample

LOGITS = 1 << 26  # most that exist at once while a prompt is scored: 256 MiB


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceState:
    """What stays on the devices from step to step.

    Attributes:
      pools: keys and values of all rows.
      features_NPD: of image tiles, N places for one tile's P patch tokens; None without vision.
    """

    pools: Pools
    features_NPD: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one call that reads tokens.

    Attributes:
      rows: of the call.
      tokens: of a row, at most.
      whole: pages of a row in layers that see everything.
      chunk: pages of a row in chunk layers.
      every: whether a draw may follow every token, and not only each row's last.
      keeps: whether hidden states of all tokens are returned, to be scored.
      images: whether some tokens are patches of images.
    """

    rows: int
    tokens: int
    whole: int
    chunk: int
    every: bool = False
    keeps: bool = False
    images: bool = False

    @property
    def draws(self) -> int:
        """Places from which a token may be drawn."""
        return self.rows * (self.tokens if self.every else 1)

    @property
    def columns(self) -> int:
        """Integers of a row: four numbers, tokens, places of features, pages."""
        return 4 + self.tokens * (1 + self.images) + self.whole + self.chunk


class Read(NamedTuple):
    """What a call leaves for a draw; R is rows, or rows * tokens if every token is drawn after.

    Attributes:
      x_RD: hidden states.
      positions_R: int32, where a token drawn after each will stand.
      rows_R: int32, the place of each row; beyond the last where nothing is kept.
      x_BTD: hidden states of all tokens, if they are to be scored.
    """

    x_RD: jax.Array
    positions_R: jax.Array
    rows_R: jax.Array
    x_BTD: jax.Array | None


class Likeliest(NamedTuple):
    """The likeliest tokens of some places: ids and log probabilities, in falling order."""

    ids: jax.Array
    logprobs: jax.Array


class Drawn(NamedTuple):
    """Tokens, and if asked for what the model thinks of them before temperature and the rest."""

    token_R: jax.Array
    logprob_R: jax.Array | None
    likeliest: Likeliest | None


def _model(leaves: list[jax.Array], structure) -> Llama4:
    return jax.tree.unflatten(structure, leaves)


@functools.partial(jax.jit, static_argnames=("structure", "shape"), donate_argnames=("state",))
def read_tokens(
    leaves: list, state: DeviceState, token_S: jax.Array, ints_BX, *, structure, shape: Shape
) -> tuple[DeviceState, Read]:
    """Append some tokens of some rows to the cache.

    Args:
      leaves: of the model.
      state: donated.
      token_S: int32, drawn last in every place.
      ints_BX: int32, of each row its place, the position of its first token, how many it has
        (minus that, if the first is the one drawn last), whether a draw follows; its tokens; the
        places of their features (any too large one for none); its pages, whole and of the chunk.
      structure: of the model.
      shape: what is where.
    """
    model, (B, T) = _model(leaves, structure), (shape.rows, shape.tokens)
    sizes = (4, T, T * shape.images, shape.whole, shape.chunk)
    bounds = [sum(sizes[:i]) for i in range(1, len(sizes))]
    numbers_B4, tokens_BT, places_BT, whole_BW, chunk_BW = jnp.split(ints_BX, bounds, axis=1)
    row_B, start_B, count_B, draws_B = numbers_B4.T
    first_B = jnp.where(count_B < 0, token_S[row_B], tokens_BT[:, 0])
    count_B, tokens_BT = jnp.abs(count_B), tokens_BT.at[:, 0].set(first_B)
    offsets_T = jnp.arange(T, dtype=jnp.int32)
    positions_BT = jnp.where(offsets_T < count_B[:, None], start_B[:, None] + offsets_T, -1)
    features_BTD = None
    if shape.images:
        assert state.features_NPD is not None
        features = state.features_NPD.reshape(-1, state.features_NPD.shape[-1])
        features_BTD = features.at[places_BT].get(mode="fill", fill_value=0)
    hidden = model.encode(
        tokens_BT,
        features_BTD=features_BTD,
        positions_BT=positions_BT,
        cache=state.pools.cache(model.config.text, whole_BW, chunk_BW),
    )
    assert hidden.cache is not None
    with jax.named_scope("drawn_from"):
        x_BTD = parallel.shard(hidden.x_BTD, (None, None, None))
        places_B = jnp.where(draws_B > 0, row_B, token_S.shape[0])
        if shape.every:
            x_RD, positions_R = x_BTD.reshape(B * T, -1), positions_BT.reshape(-1) + 1
            nowhere = jnp.full((B, T - 1), token_S.shape[0], jnp.int32)
            rows_R = jnp.concatenate([places_B[:, None], nowhere], axis=1).reshape(-1)
        else:
            last_B = jnp.maximum(count_B - 1, 0)
            x_RD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
            positions_R, rows_R = start_B + count_B, places_B
    state = dataclasses.replace(state, pools=Pools.of(hidden.cache))
    return state, Read(x_RD, positions_R, rows_R, x_BTD if shape.keeps else None)


@functools.partial(
    jax.jit, static_argnames=("structure", "shape", "loops"), donate_argnames=("state",)
)
def loop_tokens(
    leaves: list,
    state: DeviceState,
    token_S: jax.Array,
    ints_BX,
    rows: DrawRows,
    *,
    structure,
    shape: Shape,
    loops: int,
) -> tuple[DeviceState, jax.Array, Drawn]:
    """Read a token of some rows and draw the next, so many times over.

    Args:
      leaves: of the model.
      state: donated.
      token_S: int32, drawn last in every place.
      ints_BX: int32 as `read_tokens` takes them, but for the count, which is that of draws.
      rows: how each draws.
      structure: of the model.
      shape: what is where; one token a row.
      loops: most draws of a row.

    Returns:
      The state and `token_S` brought up to date, and what was drawn, `loops` places for each row.
    """
    model = _model(leaves, structure)
    numbers_B4, first_B1, whole_BW, chunk_BW = jnp.split(ints_BX, (4, 5, 5 + shape.whole), axis=1)
    row_B, start_B, count_B, _ = numbers_B4.T
    first_B = jnp.where(count_B < 0, token_S[row_B], first_B1[:, 0])
    count_B = jnp.abs(count_B)

    def once(carry):
        i, pools, token_B, drawn_BT = carry
        positions_B = jnp.where(i < count_B, start_B + i, -1)
        cache = pools.cache(model.config.text, whole_BW, chunk_BW)
        output = model(token_B[:, None], positions_BT=positions_B[:, None], cache=cache)
        assert output.cache is not None
        logits_BV = parallel.shard(output.logits_BTV[:, 0], (None, None))
        token_B = jnp.where(positions_B < 0, token_B, sample(logits_BV, positions_B + 1, rows))
        drawn_BT = jax.lax.dynamic_update_slice(drawn_BT, token_B[:, None], (0, i))
        return i + 1, Pools.of(output.cache), token_B, drawn_BT

    drawn_BT = jnp.zeros((shape.rows, loops), jnp.int32)
    start = jnp.int32(0), state.pools, first_B, drawn_BT
    _, pools, token_B, drawn_BT = jax.lax.while_loop(lambda c: c[0] < count_B.max(), once, start)
    places_B = jnp.where(count_B > 0, row_B, token_S.shape[0])
    token_S = token_S.at[places_B].set(token_B, mode="drop")
    state = dataclasses.replace(state, pools=pools)
    return state, token_S, Drawn(drawn_BT.reshape(-1), None, None)


@functools.partial(jax.jit, static_argnames=("structure", "top"))
def draw_tokens(
    leaves: list,
    token_S: jax.Array,
    read: Read,
    rows: DrawRows,
    changes: Changes | None = None,
    allowed_RW=None,
    *,
    structure,
    top: int | None,
) -> tuple[jax.Array, Drawn]:
    """Draw a token after each of some hidden states.

    Args:
      leaves: of the model; those that turn hidden states into logits are enough.
      token_S: int32, drawn last in every place.
      read: what was read.
      rows: how each draws.
      changes: to the logits of single tokens.
      allowed_RW: uint32 bits of the tokens that may be drawn.
      structure: of the model.
      top: how many likeliest tokens are wanted beside each log probability; None wants neither.

    Returns:
      `token_S` brought up to date, and what was drawn.
    """
    logits_RV = _model(leaves, structure).unembed(read.x_RD[:, None])[:, 0]
    logits_RV = parallel.shard(logits_RV, (None, None))  # every device draws for every row
    from_RV = logits_RV if changes is None else change_logits(logits_RV, changes)
    if allowed_RW is not None:
        from_RV = mask_logits(from_RV, allowed_RW)
    token_R = sample(from_RV, read.positions_R, rows)
    token_S = token_S.at[read.rows_R].set(token_R, mode="drop")
    if top is None:
        return token_S, Drawn(token_R, None, None)
    logprob_R, likeliest = _judge(logits_RV, token_R, top)
    return token_S, Drawn(token_R, logprob_R, likeliest)


def score_chunks(shape: Shape, vocab_size: int) -> int:
    """Return in how many parts a call is scored, so that at most `LOGITS` exist at once."""
    chunks = 1
    while chunks < shape.tokens and shape.rows * shape.tokens * vocab_size > LOGITS * chunks:
        chunks *= 2
    return chunks


@functools.partial(jax.jit, static_argnames=("structure", "top", "chunks"))
def score_tokens(
    leaves: list, x_BTD: jax.Array, targets_BT, *, structure, top: int, chunks: int
) -> tuple[jax.Array, Likeliest | None]:
    """Score the token after each of some hidden states, the logits of T / chunks at a time.

    Returns:
      float32 log probabilities [B, T], and the likeliest tokens [B, T, top].
    """
    model, (B, T) = _model(leaves, structure), targets_BT.shape

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, chunks, T // chunks, *x.shape[2:]), 1, 0)

    def score(part: tuple[jax.Array, jax.Array]):
        logits_BtV = parallel.shard(model.unembed(part[0]), (None, None, None))
        found = _judge(logits_BtV.reshape(-1, logits_BtV.shape[-1]), part[1].reshape(-1), top)
        return jax.tree.map(lambda x: x.reshape(*part[1].shape, *x.shape[1:]), found)

    found = jax.lax.map(score, (split(x_BTD), split(targets_BT)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T, *x.shape[3:]), found)


def _judge(
    logits_RV: jax.Array, token_R: jax.Array, top: int
) -> tuple[jax.Array, Likeliest | None]:
    """Return the log probability of tokens, and the likeliest in their places."""
    found = logprobs_of_logits(logits_RV[None], token_R[None])
    logprob_R, log_z_R = found.logprob_BT[0], found.log_z_BT[0]
    if not top:
        return logprob_R, None
    values, ids = jax.lax.top_k(logits_RV, min(top, logits_RV.shape[-1]))
    return logprob_R, Likeliest(ids, values - log_z_R[..., None])


@functools.partial(jax.jit, static_argnames=("structure",), donate_argnames=("features_NPD",))
def encode_tiles(
    leaves: list, features_NPD: jax.Array, tiles_MCHW, places_M, *, structure
) -> jax.Array:
    """Encode tiles and store their features at these places; one beyond the last is dropped."""
    new_MPD = _model(leaves, structure).encode_images(tiles_MCHW)
    new_MPD = parallel.shard(new_MPD, (None, None, None)).astype(features_NPD.dtype)
    return features_NPD.at[places_M].set(new_MPD, mode="drop")
