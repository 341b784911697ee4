"""The one protocol of all tokenizers, and how a checkpoint folder's is found."""

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Protocol

from llama4_jax.text.hf_tokenizer import HFTokenizer
from llama4_jax.text.tiktoken_tokenizer import TiktokenTokenizer


class Tokenizer(Protocol):
    """What the rest of the library asks of a vocabulary; `byte_level.py` documents each part."""

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int
    special_tokens: Mapping[str, int]

    def encode(self, text: str, *, allow_special: bool = False, bos: bool = False) -> list[int]:
        """Turn text into ids."""

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Turn ids into text."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one id stands for."""

    def is_special(self, token_id: int) -> bool:
        """Say whether an id is a special token's."""

    def special_id(self, name: str) -> int:
        """Return the id of a special token by its spelling."""


# Hugging Face repositories keep Meta's files in original/; Meta's own folders have them on top.
_PLACES = (
    ("tokenizer.json", HFTokenizer),
    ("tokenizer.model", TiktokenTokenizer),
    ("original/tokenizer.model", TiktokenTokenizer),
)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | None:
    """Read the tokenizer of a checkpoint folder, or one tokenizer file.

    Args:
        path: A folder in Hugging Face's layout (tokenizer.json) or Meta's (tokenizer.model, beside
            params.json), or the path of such a file. tokenizer.json wins where both are present.

    Returns:
        The tokenizer; None for a folder that has none, because a model also serves bare ids.

    Raises:
        ValueError: There is nothing at path, or the file is damaged or of another family.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return HFTokenizer(path) if path.suffix == ".json" else TiktokenTokenizer(path)
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give a checkpoint folder or a tokenizer file.")
    for name, kind in _PLACES:
        if (path / name).is_file():
            return kind(path / name)
    return None
