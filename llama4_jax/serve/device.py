"""Lay a plan out as calls of few shapes, and dispatch them without waiting for any."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.cache.paged import Pools
from llama4_jax.pretrained import Pretrained
from llama4_jax.serve import programs
from llama4_jax.serve.asked import NOBODY, Asked, Features, patches_of
from llama4_jax.serve.background import Example
from llama4_jax.serve.catalogue import SHORTEST, Catalogue, Form, Program
from llama4_jax.serve.options import MAX_LOGPROBS
from llama4_jax.serve.plan import CacheLayout, Piece, Plan, bucket
from llama4_jax.serve.programs import DeviceState, Drawn, Likeliest, Read, Shape
from llama4_jax.serve.sampling import Changes, DrawRows
from llama4_jax.serve.sizes import EngineConfig

NOWHERE = 1 << 30  # the place of a token's features, if it has none


class Extras(NamedTuple):
    """What changes one choice's logits at each of its draws in a call; None for nothing.

    Attributes:
      changes: of each draw, (ids, bias, factor, minus).
      allowed_DW: uint32 bits of each draw.
    """

    changes: Sequence[tuple[np.ndarray, ...]] | None
    allowed_DW: np.ndarray | None


@dataclasses.dataclass(eq=False)
class Call:
    """Pieces that are read together, and what is known of them.

    Attributes:
      pieces: one for each row, as many as there are.
      shape: of the call.
      draws: of a row.
      read: hidden states; None if draws were made with them.
      drawn: what was drawn; None if nothing is.
      scores: log probabilities of the tokens after each, if wanted.
    """

    pieces: list[Piece]
    shape: Shape
    draws: int
    read: Read | None = None
    drawn: Drawn | None = None
    scores: tuple[jax.Array, Likeliest | None] | None = None


# Programs that are compiled, by everything else that they depend on.
_compiled: dict[tuple, set[Program]] = collections.defaultdict(set)

_create_pools = jax.jit(
    Pools.create,
    static_argnums=0,
    static_argnames=("whole_pages", "chunk_pages", "page_size", "dtype", "kv_cache"),
)


class Device:
    """The model and the cache on their devices.

    Args:
      pretrained: the model; its mesh must be active while this is used.
      layout: of the cache.
      config: of the engine.
    """

    def __init__(self, pretrained: Pretrained, layout: CacheLayout, config: EngineConfig):
        self.config, self.layout = pretrained.config, layout
        self._rows = config.max_rows
        model = pretrained.model
        self._leaves, self._structure = jax.tree.flatten(model)
        head = {id(x) for x in jax.tree.leaves(
            model.embed if self.config.text.tie_embeddings else model.head)}  # fmt: skip
        self._head = [leaf if id(leaf) in head else None for leaf in self._leaves]
        self._loops = config.loops
        pools = _create_pools(
            self.config.text,
            whole_pages=layout.whole_pages or 0,
            chunk_pages=layout.chunk_pages,
            page_size=layout.page_size,
            dtype=self.config.dtype,
            kv_cache=config.kv_cache,
        )
        vision, features_NPD, self._tile_shape = self.config.vision, None, ()
        if vision is not None:
            self._per_tile = vision.tokens_per_tile
            # Any step finds room for all that it reads.
            least = config.step_tokens // self._per_tile + 2 * self._rows
            count = max(config.feature_tiles, least)
            self._features = Features(count)
            sizes = count, self._per_tile, self.config.text.embed_dim
            features_NPD = jnp.zeros(sizes, self.config.dtype)
            self._tile_shape = (vision.num_channels, vision.image_size, vision.image_size)
        self._state = DeviceState(pools, features_NPD)
        self._token_S = jnp.zeros(self._rows, jnp.int32)
        where = self._leaves[0].sharding
        if self._leaves[0].committed and len(where.device_set) == 1:  # as a step leaves them
            self._state, self._token_S = jax.device_put((self._state, self._token_S), where)
        self._draw_rows: dict[tuple, DrawRows] = {}
        arrays = jax.tree.leaves((self._state, self._leaves))
        shapes = tuple((x.shape, str(x.dtype)) for x in arrays)
        mesh = jax.sharding.get_abstract_mesh()
        ready = _compiled[self._structure, shapes, mesh, pretrained.mesh, pretrained.rules]
        pages = -(-config.context(self.config) // layout.page_size)
        self.catalogue = Catalogue(layout, config, pages=pages, ready=ready)

    def example(self) -> Example:
        """Return what its programs are given, as they leave it after each step."""
        if self.config.vision is not None:  # the first tile decides where features lie
            self._encode([], 1)
        given = self._leaves, self._head, self._state, self._token_S
        return Example.like(
            given,
            self._structure,
            vocab_size=self.config.text.vocab_size,
            loops=self._loops,
            tile_shape=self._tile_shape,
        )

    # -------------------------------------------------------------------------------- reading

    def read(self, plan: Plan, asked: Mapping[int, Asked], *, draws: bool) -> list[Call]:
        """Dispatch what a plan reads.

        Args:
          plan: of a step.
          asked: of all its rows.
          draws: whether rows that are answering also draw, without more ado.
        """
        calls = []
        if plan.decode and draws and all(len(piece.tokens_T) == 1 for piece in plan.decode):
            calls.append(self._loop(plan.decode, asked))
        elif plan.decode:
            calls += self._read_pieces(plan.decode, asked, every=True)
        groups = collections.defaultdict(list)
        for piece in plan.prefill:
            scored = asked[piece.number].options.prompt_logprobs is not None
            first, stop = patches_of(piece, asked[piece.number])
            length = bucket(len(piece.tokens_T), floor=SHORTEST)
            groups[length, scored, first < stop].append(piece)
        for (_, scored, images), pieces in groups.items():
            calls += self._read_pieces(pieces, asked, keeps=scored, images=images)
        return calls

    def _read_pieces(
        self, pieces: list[Piece], asked: Mapping[int, Asked], **how: bool
    ) -> list[Call]:
        rows = [asked[piece.number] for piece in pieces]
        shape = self.catalogue.shape("read", pieces, rows, **how)
        if shape is None:  # together they are a new program, one by one they are none
            return [call for p in pieces for call in self._read_pieces([p], asked, **how)]
        self.catalogue.use(Program("read", shape))
        ints_BX = self._integers(pieces, asked, shape)
        self._state, read = programs.read_tokens(
            self._leaves,
            self._state,
            self._token_S,
            ints_BX,
            structure=self._structure,
            shape=shape,
        )
        return [Call(pieces, shape, shape.tokens if shape.every else 1, read)]

    def _loop(self, pieces: list[Piece], asked: Mapping[int, Asked]) -> Call:
        """Dispatch draws of rows that need nothing from the host between two of them."""
        rows = [asked[piece.number] for piece in pieces]
        shape = self.catalogue.shape("loop", pieces, rows, every=True)
        assert shape is not None
        self.catalogue.use(Program("loop", shape))
        call = Call(pieces, shape, self._loops)
        ints_BX = self._integers(pieces, asked, shape)
        for row_X, piece in zip(ints_BX, pieces, strict=False):
            row_X[2] *= piece.loops
        self._state, self._token_S, call.drawn = programs.loop_tokens(
            self._leaves,
            self._state,
            self._token_S,
            ints_BX,
            self._rows_of(pieces, asked, shape.rows, 1),
            structure=self._structure,
            shape=shape,
            loops=self._loops,
        )
        call.drawn.token_R.copy_to_host_async()
        return call

    def _integers(
        self, pieces: list[Piece], asked: Mapping[int, Asked], shape: Shape
    ) -> np.ndarray:
        """Lay out what `programs.read_tokens` is told of each row."""
        places = self._fetch(pieces, asked) if shape.images else {}
        ints_BX = np.zeros((shape.rows, shape.columns), np.int32)
        first = 4 + shape.tokens * (1 + shape.images)
        for row_X, piece in zip(ints_BX, pieces, strict=False):
            count = len(piece.tokens_T)
            row_X[:4] = piece.row, piece.start, -count if piece.is_drawn else count, piece.draws
            row_X[4 : 4 + count] = piece.tokens_T
            if shape.images:
                row_X[4 + shape.tokens : first] = NOWHERE
                self._place(piece, asked[piece.number], places, row_X[4 + shape.tokens : first])
            row_X[first : first + len(piece.whole)] = piece.whole
            start = first + shape.whole
            row_X[start : start + len(piece.chunk)] = piece.chunk
        return ints_BX

    def _fetch(self, pieces: list[Piece], asked: Mapping[int, Asked]) -> dict[bytes, int]:
        """Encode what tiles of these pieces have no features yet; return the places of all."""
        per_tile, wanted = self._per_tile, {}
        for piece in pieces:
            row = asked[piece.number]
            first, stop = patches_of(piece, row)
            wanted |= dict(row.tiles[first // per_tile : -(-stop // per_tile)])
        places, new = self._features.fetch(wanted)
        while new:
            count = self.catalogue.tiles(len(new))
            self._encode(new[:count], count)
            new = new[count:]
        return places

    def _encode(self, new: list[tuple[int, np.ndarray]], count: int) -> None:
        """Encode up to so many tiles into their places."""
        self.catalogue.use(Program("encode", count=count))
        tiles_MCHW = np.zeros((count, *self._tile_shape), np.float32)
        places_M = np.full(count, NOWHERE, np.int32)
        for i, (place, pixels_CHW) in enumerate(new):
            tiles_MCHW[i], places_M[i] = pixels_CHW, place
        assert self._state.features_NPD is not None
        features_NPD = programs.encode_tiles(
            self._leaves,
            self._state.features_NPD,
            tiles_MCHW,
            places_M,
            structure=self._structure,
        )
        self._state = dataclasses.replace(self._state, features_NPD=features_NPD)

    def _place(
        self, piece: Piece, row: Asked, places: Mapping[bytes, int], out: np.ndarray
    ) -> None:
        """Write where the features of a piece's patch tokens are."""
        first, stop = patches_of(piece, row)
        patches = np.arange(first, stop)
        tiles = np.asarray([places.get(tile.digest, 0) for tile in row.tiles])
        index = tiles[patches // self._per_tile] * self._per_tile + patches % self._per_tile
        out[row.patches_N[first:stop] - piece.start] = index

    # -------------------------------------------------------------------------------- drawing

    def draw(self, call: Call, asked: Mapping[int, Asked], extras: Mapping[int, Extras]) -> None:
        """Dispatch the draws and the scores of a call."""
        if call.shape.keeps:
            self._score(call, asked)
        if call.read is None or not any(piece.draws for piece in call.pieces):
            return
        changes = [e.changes for e in extras.values() if e.changes is not None]
        longest = max((max(len(ids), 1) for rows in changes for ids, *_ in rows), default=0)
        rows, count = [asked[piece.number] for piece in call.pieces], call.shape.rows * call.draws
        form = self.catalogue.draw(rows, count, longest)
        self.catalogue.use(Program("draw", None, form, count))
        self._token_S, call.drawn = programs.draw_tokens(
            self._head,
            self._token_S,
            call.read._replace(x_BTD=None),
            self._rows_of(call.pieces, asked, call.shape.rows, call.draws),
            *self._extras(call, extras, form),
            structure=self._structure,
            top=form.top,
        )
        for array in jax.tree.leaves(call.drawn):
            array.copy_to_host_async()

    def _rows_of(
        self, pieces: list[Piece], asked: Mapping[int, Asked], count: int, draws: int
    ) -> DrawRows:
        """Return how the rows of a call draw; the same rows are sent once."""
        key = (*(piece.number for piece in pieces), count, draws)
        if key not in self._draw_rows:
            if len(self._draw_rows) >= 64:
                self._draw_rows.clear()
            rows = [asked[piece.number] for piece in pieces]
            rows += [NOBODY] * (count - len(rows))
            rows = [row for row in rows for _ in range(draws)]
            made = DrawRows.of([row.options for row in rows], [row.key for row in rows])
            self._draw_rows[key] = jax.device_put(made)
        return self._draw_rows[key]

    def _extras(
        self, call: Call, extras: Mapping[int, Extras], form: Form
    ) -> tuple[Changes | None, np.ndarray | None]:
        """Lay out what changes the logits of each draw, as a form has room for it."""
        vocab, draws = self.config.text.vocab_size, call.draws
        count, changes, allowed = call.shape.rows * draws, None, None
        if form.changes:
            fill, size = (vocab, 0.0, 1.0, 0.0), (count, form.changes)
            kinds = (np.int32, *[np.float32] * 3)
            changes = Changes(*(np.full(size, f, k) for f, k in zip(fill, kinds, strict=True)))
        if form.masked:
            allowed = np.full((count, -(-vocab // 32)), 0xFFFFFFFF, np.uint32)
        for i, piece in enumerate(call.pieces):
            extra = extras.get(piece.number, Extras(None, None))
            for t, parts in enumerate(extra.changes or ()):
                for array, part in zip(changes or (), parts, strict=True):
                    array[i * draws + t, : len(part)] = part
            if extra.allowed_DW is not None and allowed is not None:
                allowed[i * draws : i * draws + len(extra.allowed_DW)] = extra.allowed_DW
        return changes, allowed

    def _score(self, call: Call, asked: Mapping[int, Asked]) -> None:
        shape = call.shape
        targets_BT = np.zeros((shape.rows, shape.tokens), np.int32)
        for row_T, piece in zip(targets_BT, call.pieces, strict=False):
            after = asked[piece.number].prompt_T[piece.start + 1 : piece.end + 1]
            row_T[: len(after)] = after
        wanted = max(asked[piece.number].options.prompt_logprobs or 0 for piece in call.pieces)
        top = MAX_LOGPROBS if wanted or self.catalogue.is_closed else 0
        self.catalogue.use(Program("score", shape, Form(top)))
        assert call.read is not None
        assert call.read.x_BTD is not None
        call.scores = programs.score_tokens(
            self._head,
            call.read.x_BTD,
            targets_BT,
            structure=self._structure,
            top=top,
            chunks=programs.score_chunks(shape, self.config.text.vocab_size),
        )
