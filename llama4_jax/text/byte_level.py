"""What Meta's and Hugging Face's vocabularies share: tokens are bytes, special tokens are apart.

A special token spelled in a text is ordinary text unless the caller asks for special tokens, so
that a user cannot type one. Ids become bytes before they become text, so that decoding in pieces
(`stream.py`) equals decoding at once.
"""

import abc
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

_UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()

MAX_RUN = 25_000
"""Longest run of white space, or of anything else, that is left whole: merging is quadratic, and
the engines that cut words give up on longer ones."""


class ByteLevelTokenizer(abc.ABC):
    """A vocabulary whose tokens stand for byte strings.

    Args:
        token_bytes: The bytes of every id; None for an id that stands for nothing.
        special_tokens: The id of every special token, by its spelling.
        bos_id: Begins a text; None when the vocabulary has no such token.
        eos_ids: Each of them ends a generation.
        pad_id: Fills up a batch.
    """

    def __init__(
        self,
        *,
        token_bytes: Sequence[bytes | None],
        special_tokens: Mapping[str, int],
        bos_id: int | None,
        eos_ids: tuple[int, ...],
        pad_id: int,
    ) -> None:
        self._token_bytes = token_bytes
        self.special_tokens: Mapping[str, int] = MappingProxyType(dict(special_tokens))
        self._special_ids = frozenset(special_tokens.values())
        self._special_pattern = _pattern_of(special_tokens)
        self.vocab_size = len(token_bytes)
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.pad_id = pad_id

    def __repr__(self) -> str:
        """Say how large it is, not what is in it."""
        return f"{type(self).__name__}({self.vocab_size} ids, {len(self._special_ids)} special)"

    @abc.abstractmethod
    def _encode_ordinary(self, text: str) -> list[int]:
        """Encode well-formed text in which nothing is special."""

    def encode(self, text: str, *, allow_special: bool = False, bos: bool = False) -> list[int]:
        """Turn text into ids.

        Args:
            text: Any string; unpaired surrogates become U+FFFD.
            allow_special: Whether special tokens spelled in the text become their ids. Leave it
                off for text that somebody else wrote.
            bos: Whether to begin with the begin-of-text token; never doubled.

        Returns:
            The ids. Decoding them gives the text back (well-formed text, exactly).

        Raises:
            ValueError: bos is asked of a vocabulary without a begin-of-text token.
        """
        text = _well_formed(text)
        ids = self._encode_special(text) if allow_special else self._encode_ordinary(text)
        if not bos:
            return ids
        if self.bos_id is None:
            raise ValueError("This vocabulary has no begin-of-text token; encode with bos=False.")
        return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def _encode_special(self, text: str) -> list[int]:
        ids, start = [], 0
        for match in self._special_pattern.finditer(text):
            if match.start() > start:
                ids.extend(self._encode_ordinary(text[start : match.start()]))
            ids.append(self.special_tokens[match.group()])
            start = match.end()
        if start < len(text):
            ids.extend(self._encode_ordinary(text[start:]))
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Turn ids into text; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: Any of the vocabulary. One beyond it becomes U+FFFD, because a model's table may
                have more rows than its vocabulary and such a row may be sampled.
            skip_special: Whether special tokens are left out rather than spelled.

        Raises:
            ValueError: An id is negative.
        """
        kept = (i for i in ids if not (skip_special and self.is_special(i)))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one id stands for; a special token's are its spelling.

        Raises:
            ValueError: The id is negative.
        """
        token_id = int(token_id)
        if token_id < 0:
            raise ValueError(f"A token id must be at least 0, not {token_id}; drop the padding.")
        found = self._token_bytes[token_id] if token_id < self.vocab_size else None
        return _UNKNOWN if found is None else found

    def is_special(self, token_id: int) -> bool:
        """Say whether an id is a special token's."""
        return int(token_id) in self._special_ids

    def special_id(self, name: str) -> int:
        """Return the id of a special token by its spelling, such as "<|eot|>".

        Raises:
            ValueError: The vocabulary has no such special token.
        """
        try:
            return self.special_tokens[name]
        except KeyError:
            raise ValueError(
                f"{name!r} is not among the {len(self.special_tokens)} special tokens of this "
                "vocabulary; they are the keys of `special_tokens`."
            ) from None


def split_runs(text: str) -> Iterator[str]:
    """Cut text inside long runs, which Meta's tokenizer does too.

    A run is a stretch of white space or a stretch without any; it is cut at every MAX_RUN
    characters. The pieces joined are the text. An empty text gives an empty piece.
    """
    start = 0
    for run in re.finditer(r"\s+|\S+", text):
        for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _pattern_of(spellings: Iterable[str]) -> re.Pattern[str]:
    """Compile a pattern that finds the spellings, the longest first."""
    ordered = sorted(spellings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _well_formed(text: str) -> str:
    """Join surrogate pairs and replace unpaired ones, as tiktoken does."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
