"""Meta's tokenizer.model: byte-pair ranks, read by tiktoken."""

import base64
import os
import pathlib
from collections.abc import Iterator

import tiktoken

from llama4_jax.text import special_tokens as names
from llama4_jax.text.byte_level import ByteLevelTokenizer, split_runs
from llama4_jax.text.pattern import WORD_PATTERN
from llama4_jax.untrusted import read_bytes

MAX_BYTES = 64 << 20
"""Largest tokenizer.model; Llama 4's has 4 MB."""
MAX_CHARACTERS = 400_000
"""Longest text that Meta's tokenizer gives tiktoken at once; more makes its regex engine panic."""

_SPECIAL_TOKENS = {
    200_000: names.llama4_special_tokens,
    1_920: names.nano_special_tokens,
}
"""Which special tokens follow the ranks, by the number of ranks."""


class TiktokenTokenizer(ByteLevelTokenizer):
    """The vocabulary of a tokenizer.model file: ranks, then Llama 4's special tokens.

    Args:
        path: The file; each line is a token in base64, a space and its rank.

    Raises:
        ValueError: The file is no such file, or another family's.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        ranks = read_ranks(path)
        if len(ranks) not in _SPECIAL_TOKENS:
            raise ValueError(
                f"{path} has {len(ranks)} ranks but Llama 4's tokenizer.model has 200000 (and "
                "nano's 1920); take the tokenizer.model that came with the checkpoint."
            )
        spellings = _SPECIAL_TOKENS[len(ranks)]()
        special = {name: len(ranks) + i for i, name in enumerate(spellings)}
        self._encoding = tiktoken.Encoding(
            name="llama4", pat_str=WORD_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        super().__init__(
            token_bytes=[*sorted(ranks, key=ranks.__getitem__), *(n.encode() for n in spellings)],
            special_tokens=special,
            bos_id=special[names.BOS],
            eos_ids=tuple(special[name] for name in names.STOP_TOKENS),
            pad_id=special[names.PAD],
        )

    def _encode_ordinary(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in split_long(text):
            ids.extend(self._encoding.encode_ordinary(piece))
        return ids


def read_ranks(path: str | os.PathLike[str]) -> dict[bytes, int]:
    """Read the byte pairs of a tokenizer.model file.

    Returns:
        The rank of every token; the ranks are 0 .. n-1 and all single bytes are there.

    Raises:
        ValueError: A line does not read "base64 rank", or ranks or bytes are missing.
    """
    ranks: dict[bytes, int] = {}
    data = read_bytes(pathlib.Path(path), MAX_BYTES)
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(
                f'{path}, line {number}: expected "base64 rank", as tiktoken writes it. A '
                "SentencePiece tokenizer.model belongs to Llama 2 and is not read here."
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: the ranks are not 0 to {len(ranks) - 1}; fetch the file again.")
    missing = sum(bytes([b]) not in ranks for b in range(256))
    if missing:
        raise ValueError(f"{path}: {missing} of the 256 bytes are missing; fetch the file again.")
    return ranks


def split_long(text: str) -> Iterator[str]:
    """Cut text where Meta's tokenizer does: at every 400,000 characters, then inside long runs.

    The pieces joined are the text. An empty text gives nothing.
    """
    for begin in range(0, len(text), MAX_CHARACTERS):
        yield from split_runs(text[begin : begin + MAX_CHARACTERS])
