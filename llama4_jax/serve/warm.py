"""Compile what most traffic needs, by serving requests to nobody, and foresee what others need."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from llama4_jax.serve.adjust import Adjuster
from llama4_jax.serve.asked import Asked
from llama4_jax.serve.catalogue import LADDER
from llama4_jax.serve.engine import Counters, Engine
from llama4_jax.serve.options import Options
from llama4_jax.serve.requests import Prompt


def warm(engine: Engine) -> None:
    """Serve prompts of few and many tokens, alone and together, and forget them.

    Steps that read prompts are compiled for the lengths up to a whole step, steps that draw for few
    rows and many, with log probabilities and without.

    Args:
      engine: serves nobody yet.
    """
    for count, length, options in _traffic(engine):
        for index in range(count):
            engine.submit(_prompt(engine, length, index), options)
        while engine.is_busy:
            engine.step()
    engine.counters = Counters()


def foreseen(engine: Engine) -> Iterator[Asked]:
    """Yield what requests may ask that `warm` compiles nothing for, the likely ones first."""
    plain = Options(max_new_tokens=1, temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0)
    asked = Asked(plain, np.zeros(2, np.uint32), np.zeros(1, np.int32), np.zeros(0, np.int64), ())
    model, lengths = engine.pretrained.config, [engine.scheduler.layout.page_size]
    while lengths[-1] * LADDER < engine.context:
        lengths.append(lengths[-1] * LADDER)
    first, *others = [
        asked._replace(prompt_T=np.zeros(length, np.int32)) for length in [*lengths, engine.context]
    ]
    yield first
    if model.vision is not None:
        yield first._replace(patches_N=np.zeros(1, np.int64))
    changed = dataclasses.replace(plain, presence_penalty=1.0)
    yield first._replace(options=changed, adjuster=Adjuster(changed, first.prompt_T))
    yield from others
    yield first._replace(options=dataclasses.replace(plain, prompt_logprobs=1))


def _traffic(engine: Engine) -> Iterator[tuple[int, int, Options]]:
    room = engine.context - 4
    two = Options(max_new_tokens=2, ignore_eos=True, temperature=1.0, top_p=0.9)
    longest = min(engine.config.step_tokens, room)
    lengths = [16]
    while lengths[-1] * LADDER < longest:
        lengths.append(lengths[-1] * LADDER)
    for length in sorted({*(min(n, longest) for n in lengths), longest}):
        yield 1, length, two
    rows = engine.config.max_rows
    while rows >= 1:
        few = 16 if rows * 16 <= room * engine.config.max_rows else 1
        yield rows, min(few, room), two
        rows //= LADDER
    yield 1, min(16, room), dataclasses.replace(two, logprobs=1)
    yield engine.config.max_rows, min(16, room), dataclasses.replace(two, logprobs=1)


def _prompt(engine: Engine, length: int, index: int) -> Prompt:
    """Make a prompt that no other begins like; patch tokens are no part of it."""
    model = engine.pretrained.config
    tokens_T = np.random.default_rng((length, index)).integers(0, model.text.vocab_size, length)
    tokens_T[tokens_T == model.patch_id] = model.pad_id
    return Prompt(index=index, tokens_T=tokens_T.astype(np.int32), images=())
