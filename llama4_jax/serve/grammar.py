"""Answers that follow a regular expression, a JSON schema, a list of texts or a grammar.

Which tokens may come next is found by llguidance (`pip install "llama4_jax[grammar]"`) and drawn
from on the device, as bits.
"""

import json
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from llama4_jax.serve.options import Options
from llama4_jax.text import Tokenizer


class Matcher(Protocol):
    """Follows one answer through a grammar."""

    @property
    def is_over(self) -> bool:
        """Can nothing more come?"""
        ...

    def masks(self, drafts: Sequence[int]) -> np.ndarray:
        """Return which tokens may come next, and next after each draft.

        Args:
          drafts: tokens that may follow those told so far.

        Returns:
          uint32 [1 + drafts, words]: bit i % 32 of word i // 32 is set if token i may come. After
          a draft that may not come, anything.
        """
        ...

    def advance(self, token: int) -> None:
        """Take note of a token that was drawn."""
        ...


class Grammars:
    """Make matchers for the answers of one model, from any thread.

    The first of them reads the vocabulary, which takes seconds where it is large.

    Args:
      tokenizer: of the model; None if it has none.
      vocab_size: rows of the model's table.
      stop_ids: tokens that end an answer; the grammar lets them come where it may end.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, stop_ids: Sequence[int]):
        self._given = tokenizer, vocab_size, stop_ids
        self._words = -(-vocab_size // 32)
        self._reading = threading.Lock()
        self._guidance: Any = None  # llguidance, once it is wanted
        self._tokenizer: Any = None

    def _read(self) -> None:
        tokenizer, vocab_size, stop_ids = self._given
        if tokenizer is None:
            raise ValueError("without a tokenizer an answer can have no form.")
        try:
            import llguidance
        except ImportError as error:
            raise ValueError(
                'regex, json_schema, choices and grammar need llguidance: pip install "llama4_jax'
                '[grammar]".'
            ) from error
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, stop_ids))
        self._tokenizer = llguidance.LLTokenizer(
            wrapper, n_vocab=vocab_size, eos_token=list(stop_ids) or None
        )
        self._guidance = llguidance

    def matcher(self, options: Options) -> Matcher:
        """Begin an answer.

        Raises:
          ValueError: the form it must have is malformed, there is no tokenizer, or llguidance is
            not installed.
        """
        with self._reading:
            if self._guidance is None:
                self._read()
        guidance: Any = self._guidance
        matcher = guidance.LLMatcher(self._tokenizer, self._grammar(options), log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().splitlines()[0]
            raise ValueError(f"the form that the answer must have is malformed: {reason}")
        return _Guided(matcher, self._words)

    def _grammar(self, options: Options) -> str:
        make = self._guidance.LLMatcher
        if options.regex is not None:
            return make.grammar_from_regex(options.regex)
        if options.json_schema is not None:
            schema = options.json_schema
            # Spaces wherever JSON allows them would let an answer go on with spaces for ever.
            style = {"whitespace_flexible": False}
            return make.grammar_from_json_schema(
                {"type": "object"} if schema is True else schema, style
            )
        if options.choices is not None:
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in options.choices)
            return make.grammar_from_lark(f"start: {texts}")
        assert options.grammar is not None
        return make.grammar_from_lark(options.grammar)


class _Vocabulary:
    """A tokenizer as llguidance reads it."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self.eos_token_id = stop_ids[0] if stop_ids else tokenizer.eos_ids[0]
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_tokens.values())

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"))


class _Guided:
    """A matcher of llguidance, whose masks have as many words as the model needs."""

    def __init__(self, matcher: Any, words: int):
        self._matcher, self._words = matcher, words

    @property
    def is_over(self) -> bool:
        return self._matcher.is_stopped()

    def masks(self, drafts: Sequence[int]) -> np.ndarray:
        found, taken = [self._mask()], 0
        for token in drafts:
            if self._matcher.is_stopped() or not self._matcher.try_consume_tokens([token]):
                break
            taken += 1
            found.append(self._mask())
        self._matcher.rollback(taken)
        found += [found[0]] * (1 + len(drafts) - len(found))
        return np.stack(found)

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)

    def _mask(self) -> np.ndarray:
        # There is one word too many for some vocabularies, and too few for a padded table.
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._words]
        return np.pad(found, (0, self._words - len(found)))
