"""Compile what most traffic needs, by serving requests to nobody."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from llama4_jax.serve.engine import Counters, Engine
from llama4_jax.serve.options import Options
from llama4_jax.serve.requests import Prompt

_STEP = 4  # rows from one compiled step to the next: between them the larger one serves


def warm(engine: Engine) -> None:
    """Serve prompts of few and many tokens, alone and together, and forget them.

    Steps that read prompts are compiled for the lengths up to a whole step, steps that draw for few
    rows and many, with log probabilities and without. Penalties, grammars and images are compiled
    when the first request asks for them.

    Args:
      engine: serves nobody yet.
    """
    for count, length, options in _traffic(engine):
        for index in range(count):
            engine.submit(_prompt(engine, length, index), options)
        while engine.is_busy:
            engine.step()
    engine.counters = Counters()


def _traffic(engine: Engine) -> Iterator[tuple[int, int, Options]]:
    room = engine.context - 4
    two = Options(max_new_tokens=2, ignore_eos=True, temperature=1.0, top_p=0.9)
    longest = min(engine.config.step_tokens, room)
    lengths = [16]
    while lengths[-1] * _STEP < longest:
        lengths.append(lengths[-1] * _STEP)
    for length in sorted({*(min(n, longest) for n in lengths), longest}):
        yield 1, length, two
    rows = engine.config.max_rows
    while rows >= 1:
        few = 16 if rows * 16 <= room * engine.config.max_rows else 1
        yield rows, min(few, room), two
        rows //= _STEP
    yield 1, min(16, room), dataclasses.replace(two, logprobs=1)
    yield engine.config.max_rows, min(16, room), dataclasses.replace(two, logprobs=1)


def _prompt(engine: Engine, length: int, index: int) -> Prompt:
    """Make a prompt that no other begins like; patch tokens are no part of it."""
    model = engine.pretrained.config
    tokens_T = np.random.default_rng((length, index)).integers(0, model.text.vocab_size, length)
    tokens_T[tokens_T == model.patch_id] = model.pad_id
    return Prompt(index=index, tokens_T=tokens_T.astype(np.int32), images=())
