"""An answer in the making: its tokens, the text that is certain so far, and why it ended."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from llama4_jax.serve.options import Options
from llama4_jax.text import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length", "cancelled", "failed"]


@dataclasses.dataclass(frozen=True)
class Ending:
    """What ends an answer.

    Attributes:
      stop_ids: tokens; the text does not hold the one that ended it.
      stop: texts.
      include_stop: whether the text that ended it stays.
      limit: most tokens.
    """

    stop_ids: frozenset[int]
    stop: tuple[str, ...]
    include_stop: bool
    limit: int

    @staticmethod
    def of(options: Options) -> "Ending":
        """Return how these options, resolved, end an answer."""
        return Ending(
            frozenset(options.stop_ids),
            tuple(options.stop),
            options.include_stop,
            options.max_new_tokens,
        )


class Transcript:
    """Take tokens one by one and give the text that each makes certain.

    A text that may be the beginning of a stop text is held back until it is known not to be.

    Args:
      tokenizer: None gives no text.
      ending: of the answer.
      skip_special: whether special tokens are left out of the text.
    """

    def __init__(self, tokenizer: Tokenizer | None, ending: Ending, *, skip_special: bool = False):
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._ending = ending
        self._held = ""
        self._decoder = None
        if tokenizer is not None:
            self._decoder = StreamDecoder(tokenizer, skip_special=skip_special)

    def add(self, token: int) -> str:
        """Append a token; return the text it makes certain, the rest of it at the end."""
        self.tokens.append(token)
        is_stop = token in self._ending.stop_ids
        if is_stop:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self._ending.limit:
            self.finish_reason = "length"
        if self._decoder is None:
            return ""
        self._held += "" if is_stop else self._decoder.push([token])
        if self.finish_reason is not None:
            self._held += self._decoder.finish()
        found = self._find_stop()
        if found is not None:
            self.finish_reason, self._held = "stop", self._held[:found]
        keep = 0 if self.finish_reason is not None else self._pending(self._ending.stop)
        text, self._held = self._held[: len(self._held) - keep], self._held[-keep:] * bool(keep)
        return text

    def stop(self) -> str:
        """End the answer; return the text that was held back."""
        self.finish_reason = "stop"
        rest = self._held + ("" if self._decoder is None else self._decoder.finish())
        self._held = ""
        return rest

    def _find_stop(self) -> int | None:
        """Return where the text ends because of the stop text that is complete first."""
        found = [(self._held.find(stop) + len(stop), stop) for stop in self._ending.stop
                 if stop in self._held]  # fmt: skip
        if not found:
            return None
        end, stop = min(found, key=lambda place: (place[0], -len(place[1])))
        return end if self._ending.include_stop else end - len(stop)

    def _pending(self, stops: Sequence[str]) -> int:
        """Return the length of the longest end of the text that may begin a stop text."""
        longest = max(map(len, stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in stops):
                return length
        return 0
