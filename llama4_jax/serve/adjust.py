"""Which tokens' logits an answer changes: biases, penalties, stop tokens that may not come yet."""

from collections.abc import Iterator, Sequence

import numpy as np

from llama4_jax.serve.options import Options

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Adjuster:
    """Follow one answer, and say what its next draws change.

    Args:
      options: resolved.
      prompt_T: int32, the tokens that a repetition penalty counts from the beginning.
    """

    def __init__(self, options: Options, prompt_T: np.ndarray):
        self._options = options
        self._place: dict[int, int] = {}
        self._ids = np.zeros(0, np.int32)
        self._bias, self._factor, self._count = (np.zeros(0, np.float32) for _ in range(3))
        self._answered = 0
        for token, bias in options.logit_bias.items():
            place = self._at(token)
            self._bias[place] = bias
        if options.min_new_tokens:
            for token in options.stop_ids:
                self._at(token)
        if options.repetition_penalty != 1:
            for token in np.unique(prompt_T).tolist():
                place = self._at(token)
                self._factor[place] = options.repetition_penalty

    @property
    def size(self) -> int:
        """How many tokens' logits it changes so far."""
        return len(self._place)

    def add(self, token: int) -> None:
        """Take note of a token that was drawn."""
        place = self._at(token)
        self._count[place] += 1
        self._factor[place] = self._options.repetition_penalty
        self._answered += 1

    def draws(self, drafts: Sequence[int]) -> list[Arrays]:
        """Return what the next draw changes, and the one after each draft if it is accepted."""
        return list(self._draws(drafts))

    def _draws(self, drafts: Sequence[int]) -> Iterator[Arrays]:
        yield self._now()
        if not drafts:
            return
        kept = self._count.copy(), self._factor.copy(), self._answered
        for token in drafts:
            self.add(token)
            yield self._now()
        size = len(kept[0])
        self._count[:size], self._factor[:size], self._answered = kept
        self._count[size:], self._factor[size:] = 0, 1

    def _now(self) -> Arrays:
        options, count = self._options, len(self._place)
        times, bias = self._count[:count], self._bias[:count].copy()
        if self._answered < options.min_new_tokens:
            bias[[self._place[token] for token in options.stop_ids]] = -np.inf
        minus = options.presence_penalty * (times > 0) + options.frequency_penalty * times
        return self._ids[:count], bias, self._factor[:count].copy(), minus.astype(np.float32)

    def _at(self, token: int) -> int:
        """Return the place of a token among the arrays, a new one at its first time."""
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            more = max(16, place)
            self._ids = np.concatenate([self._ids, np.zeros(more, np.int32)])
            self._bias = np.concatenate([self._bias, np.zeros(more, np.float32)])
            self._factor = np.concatenate([self._factor, np.ones(more, np.float32)])
            self._count = np.concatenate([self._count, np.zeros(more, np.float32)])
        self._ids[place] = token
        return place
