"""Compile programs beside the steps: a thread of its own, which no step waits for."""

import collections
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llama4_jax.serve import programs
from llama4_jax.serve.asked import Asked
from llama4_jax.serve.catalogue import Catalogue, Program
from llama4_jax.serve.programs import Read, Shape
from llama4_jax.serve.sampling import Changes, DrawRows


class Example(NamedTuple):
    """Arguments like those of the steps, without their values.

    Attributes:
      leaves: of the model.
      head: those that turn hidden states into logits.
      state: of the device.
      token_S: drawn last in every place.
      model: what all programs are told of the model.
      vocab_size: of the model.
      loops: most draws of a row by the device alone.
      tile_shape: of one image tile.
      is_placed: whether arrays are bound to their devices.
    """

    leaves: Any
    head: Any
    state: Any
    token_S: Any
    model: dict[str, Any]
    vocab_size: int
    loops: int
    tile_shape: tuple[int, ...]
    is_placed: bool

    @staticmethod
    def like(given: tuple[Any, ...], structure: Any, **sizes: Any) -> "Example":
        """Describe (leaves, head, state, token_S)."""

        def describe(x: jax.Array) -> jax.ShapeDtypeStruct:
            sharding = x.sharding if x.committed else None
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        is_placed = any(x.committed for x in jax.tree.leaves(given))
        described = jax.tree.map(describe, given)
        leaves, head, state, token_S = described
        model = {"structure": structure}
        return Example(leaves, head, state, token_S, model, is_placed=is_placed, **sizes)


class BackgroundCompiler:
    """Compile what requests need, then what would serve them better.

    jax keeps one compilation for all calls that are alike, so a step that calls a program
    afterwards finds it. Nothing is allocated on a device.

    Args:
      example: of the arguments.
      catalogue: told what has been compiled.
      enter: gives the context that steps run in.
      on_ready: called after each compilation, from the thread.
    """

    def __init__(
        self,
        example: Example,
        catalogue: Catalogue,
        *,
        enter: Callable[[], Any],
        on_ready: Callable[[], None],
    ):
        self.failure: Exception | None = None
        self._example, self._catalogue = example, catalogue
        self._enter, self._on_ready = enter, on_ready
        self._needed: collections.deque[Program] = collections.deque()
        self._liked: collections.deque[Program] = collections.deque()
        self._held: dict[int, list[Program]] = {}  # choices, and what they wait for
        self._any_read: Read | None = None
        self._changed, self._ends = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="compile", daemon=True)
        self._thread.start()

    def ask(self, liked: Sequence[Program], *, needed: Sequence[Program] = ()) -> None:
        """Let programs be compiled: those that are needed first."""
        with self._changed:
            self._needed.extend(needed)
            self._liked.extend(liked)
            self._changed.notify()

    def admits(self, number: int, asked: Asked) -> bool:
        """Are the programs of a choice compiled? If not, they will be, and it is held until then.

        This and `released` are for the thread of the steps.
        """
        needed = self._catalogue.missing(self._catalogue.needs(asked))
        if needed:
            self._held[number] = needed
            self.ask(self._catalogue.would_like(asked), needed=needed)
        return not needed

    def released(self) -> list[int]:
        """Return the choices that were held and need nothing any more.

        Raises:
          Exception: the compiler's, if it has failed.
        """
        if self.failure is not None:
            raise self.failure
        found = [n for n, needed in self._held.items() if not self._catalogue.missing(needed)]
        for number in found:
            del self._held[number]
        return found

    @property
    def has_news(self) -> bool:
        """Would `released` say something?"""
        held = tuple(self._held.values())
        is_met = any(not self._catalogue.missing(needed) for needed in held)
        return self.failure is not None or is_met

    def forget(self, number: int) -> None:
        """Hold a choice no longer, if it was."""
        self._held.pop(number, None)

    def close(self) -> None:
        """End after the program under way."""
        with self._changed:
            self._ends = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._enter():
                while (program := self._next()) is not None:
                    self._compile(program)
                    self._catalogue.add(program)
                    self._on_ready()
        except Exception as error:  # noqa: BLE001  the engine's next step raises it
            self.failure = error
            self._on_ready()

    def _next(self) -> Program | None:
        """Wait for a program that is missing; None at the end."""
        with self._changed:
            while not self._ends:
                while self._needed or self._liked:
                    program = (self._needed or self._liked).popleft()
                    if self._catalogue.missing([program]):
                        return program
                self._changed.wait()
        return None

    def _compile(self, program: Program) -> None:
        given, shape, form, count = self._example, program.shape, program.form, program.count
        if program.kind == "encode":
            tiles_MCHW = _like((count, *given.tile_shape), np.float32)
            places_M, features_NPD = _like((count,), np.int32), given.state.features_NPD
            lowered = programs.encode_tiles.lower(
                given.leaves, features_NPD, tiles_MCHW, places_M, **given.model
            )
        elif program.kind == "draw":
            assert form is not None
            changes, allowed_RW, words = None, None, -(-given.vocab_size // 32)
            if form.changes:
                kinds = np.int32, *[np.float32] * 3
                changes = Changes(*(_like((count, form.changes), kind) for kind in kinds))
            if form.masked:
                allowed_RW = _like((count, words), np.uint32)
            read, rows = self._drawn_from(count), _draw_rows(count)
            lowered = programs.draw_tokens.lower(
                given.head, given.token_S, read, rows, changes, allowed_RW,
                top=form.top, **given.model,
            )  # fmt: skip
        elif program.kind == "score":
            assert shape is not None
            assert form is not None
            x_BTD, targets_BT = self._read(shape).x_BTD, _like((shape.rows, shape.tokens), np.int32)
            chunks = programs.score_chunks(shape, given.vocab_size)
            lowered = programs.score_tokens.lower(
                given.head, x_BTD, targets_BT, top=form.top or 0, chunks=chunks, **given.model
            )
        elif program.kind == "loop":
            assert shape is not None
            lowered = programs.loop_tokens.lower(
                *self._call(shape), _draw_rows(shape.rows),
                shape=shape, loops=given.loops, **given.model,
            )  # fmt: skip
        else:
            assert shape is not None
            self._read(shape)
            return
        lowered.compile()

    def _call(self, shape: Shape) -> tuple[Any, ...]:
        given, ints_BX = self._example, _like((shape.rows, shape.columns), np.int32)
        return given.leaves, given.state, given.token_S, ints_BX

    def _read(self, shape: Shape) -> Read:
        """Compile a call that reads tokens; describe what it leaves."""
        lowered = programs.read_tokens.lower(*self._call(shape), shape=shape, **self._example.model)
        (_, found), (_, where) = lowered.out_info, lowered.compile().output_shardings

        def describe(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            sharding = sharding if self._example.is_placed else None
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        read = jax.tree.map(describe, found, where)
        self._any_read = read._replace(x_BTD=None)
        return read

    def _drawn_from(self, count: int) -> Read:
        """Describe the hidden states that so many draws are made from."""
        if self._any_read is None:
            self._read(self._catalogue.any_read())
        return jax.tree.map(lambda x: x.update(shape=(count, *x.shape[1:])), self._any_read)


def _like(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _draw_rows(count: int) -> DrawRows:
    float_B, int_B = _like((count,), np.float32), _like((count,), np.int32)
    return DrawRows(float_B, float_B, float_B, int_B, _like((count, 2), np.uint32))
