"""Hugging Face's tokenizer.json: byte-level BPE, read by tokenizers."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping

import tokenizers

from llama4_jax.text import special_tokens as names
from llama4_jax.text.byte_level import ByteLevelTokenizer, split_runs
from llama4_jax.untrusted import load_json, read_bytes

MAX_BYTES = 256 << 20
"""Largest tokenizer.json; Llama 4's has 28 MB."""
MAX_HOLES = 1 << 20
"""Most ids that stand for nothing below one that stands for something."""


class HFTokenizer(ByteLevelTokenizer):
    """The vocabulary of a tokenizer.json file.

    Unlike `tokenizers` and `transformers` it parses no special token of a text unless asked, and
    it never runs the file's post-processor, which would put a second begin-of-text token before
    a rendered dialogue.

    Llama 4's files name a padding token "<|finetune_right_pad_id|>" that is not in Meta's
    vocabulary and was appended to it; the true one, "<|finetune_right_pad|>" (200018), wins.

    Args:
        path: The file. A tokenizer_config.json beside it names the begin, end and padding tokens
            of vocabularies that lack Llama 4's.

    Raises:
        ValueError: The file cannot be read, its tokens are not bytes, or it has no end token.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = pathlib.Path(path)
        self._tokenizer = _read(path)
        self._tokenizer.encode_special_tokens = True  # that is: spelled ones are ordinary text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        _refuse_greedy(path, [token for token in added.values() if token.special])
        named = _named_tokens(path.parent, special)
        ends = [names.find(special, name) for name in names.STOP_TOKENS]
        eos_ids = tuple(end for end in ends if end is not None)
        if "eos" in named and named["eos"] not in eos_ids:
            eos_ids = (named["eos"], *eos_ids)
        if not eos_ids:
            raise ValueError(
                f"{path} has none of the end tokens {', '.join(names.STOP_TOKENS)}, and no "
                "tokenizer_config.json beside it names an eos_token of the vocabulary."
            )
        super().__init__(
            token_bytes=_token_bytes(self._tokenizer, {i: t.content for i, t in added.items()}),
            special_tokens=special,
            bos_id=special.get(names.BOS, named.get("bos")),
            eos_ids=eos_ids,
            pad_id=special.get(names.PAD, named.get("pad", eos_ids[0])),
        )

    def _encode_ordinary(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in split_runs(text):
            with _panics_named("the vocabulary's pattern cannot cut this text into words"):
                ids.extend(self._tokenizer.encode(piece, add_special_tokens=False).ids)
        return ids


@contextlib.contextmanager
def _panics_named(what: str) -> Iterator[None]:
    """Turn what tokenizers raises, panics of its compiled code included, into a ValueError."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime":
            raise ValueError(f"{what}: {str(error)[:200]}") from error
        raise


def _read(path: pathlib.Path) -> tokenizers.Tokenizer:
    content = read_bytes(path, MAX_BYTES)
    with _panics_named(f"{path} is not a tokenizer.json"):
        tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    decoder = tokenizer.decoder
    state = json.loads(decoder.__getstate__()) if decoder is not None else {}
    steps = state.get("decoders", [state])
    if not any(step.get("type") == "ByteLevel" for step in steps):
        raise ValueError(
            f"{path} decodes by {[step.get('type') for step in steps]}, but only byte-level "
            "vocabularies, as Llama 3 and 4 have them, are read here."
        )
    return tokenizer


def _refuse_greedy(path: pathlib.Path, tokens: list[tokenizers.AddedToken]) -> None:
    for token in tokens:
        if token.lstrip or token.rstrip or token.single_word:
            raise ValueError(
                f"{path}: the special token {token.content} has lstrip, rstrip or single_word "
                "set and would swallow or need its neighbours; Llama's special tokens stand alone."
            )


def _named_tokens(folder: pathlib.Path, special: Mapping[str, int]) -> dict[str, int]:
    """Return the ids of the bos, eos and pad tokens that tokenizer_config.json names."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    config = load_json(path)
    found = {}
    for key in ("bos", "eos", "pad"):
        entry = config.get(f"{key}_token")
        spelling = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(spelling, str) and spelling in special:
            found[key] = special[spelling]
    return found


def _token_bytes(tokenizer: tokenizers.Tokenizer, added: Mapping[int, str]) -> list[bytes | None]:
    """List the bytes of every id; holes in the numbering stay None."""
    byte_of = bytes_by_character()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    last = max(vocabulary.values(), default=-1)
    if last >= len(vocabulary) + MAX_HOLES:
        raise ValueError(f"tokenizer.json has {len(vocabulary)} tokens, but one has the id {last}.")
    table: list[bytes | None] = [None] * (1 + last)
    for spelling, token_id in vocabulary.items():
        if token_id in added or not all(c in byte_of for c in spelling):
            table[token_id] = spelling.encode("utf-8")
        else:
            table[token_id] = bytes(byte_of[c] for c in spelling)
    return table


def bytes_by_character() -> dict[str, int]:
    """Invert the byte-level alphabet: a printable Latin-1 byte is itself, others start at 256."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (b for b in range(256) if b not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
