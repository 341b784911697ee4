"""Text from ids that arrive one by one."""

import codecs
from collections.abc import Iterable

from llama4_jax.text.tokenizer import Tokenizer


class StreamDecoder:
    """Decode a growing sequence of ids without ever emitting half a character.

    The texts returned, joined, equal `tokenizer.decode` of all the ids, whatever the pieces were.

    Args:
        tokenizer: Whose ids they are.
        skip_special: Whether special tokens are left out rather than spelled.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """Return the characters that these ids complete; possibly none."""
        kept = (i for i in ids if not (self._skip_special and self._tokenizer.is_special(i)))
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, kept)))

    def finish(self) -> str:
        """Return what an unfinished character left behind (U+FFFD) and start afresh."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
