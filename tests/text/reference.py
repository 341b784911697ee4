"""Meta's `llama-models` package as the reference: its files, and its code without torch."""

import base64
import contextlib
import functools
import importlib.util
import pathlib
import sys
from unittest import mock

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from llama4_jax.checkpoint.location import NANO as NANO
from llama4_jax.text import TiktokenTokenizer, special_tokens
from llama4_jax.text.hf_tokenizer import bytes_by_character
from llama4_jax.text.pattern import WORD_PATTERN

ROOT = pathlib.Path(__file__).parents[2]


def llama_models_path(name: str) -> pathlib.Path:
    """Find a file of the installed package without importing it."""
    spec = importlib.util.find_spec("llama_models")
    assert spec is not None, "install the package: pip install 'llama4_jax[dev]'"
    return pathlib.Path(spec.submodule_search_locations[0]) / name


@functools.cache
def tokenizer_model() -> TiktokenTokenizer:
    """Load the real vocabulary once."""
    return TiktokenTokenizer(llama_models_path("llama4/tokenizer.model"))


@functools.cache
def meta_tokenizer():
    """Load the real vocabulary with Meta's code."""
    from llama_models.llama4.tokenizer import Tokenizer

    return Tokenizer.get_instance()


@functools.cache
def meta_chat_format():
    """Make Meta's ChatFormat; it imports torch for images only, so a stand-in does for text."""
    frameworks = ("torch", "torchvision", "torchvision.transforms")
    missing = {name: mock.MagicMock() for name in frameworks if name not in sys.modules}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sys.modules, missing))
        from llama_models.llama4.chat_format import ChatFormat
    return ChatFormat(meta_tokenizer())


def hugging_face_twin(path: pathlib.Path) -> None:
    """Write a tokenizer.json with the ranks of Meta's file, the way `transformers` converts it.

    Like the published files it stops after the vision tokens, and it appends a padding token
    whose name is not Meta's.
    """
    alphabet = {bytes([b]): c for c, b in bytes_by_character().items()}
    lines = llama_models_path("llama4/tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(t): int(r) for t, r in (line.split() for line in lines)}
    spelled = {t: "".join(alphabet[bytes([b])] for b in t) for t in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in pairs if a in ranks and b in ranks]
        merges.extend(sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])))
    model = models.BPE(
        vocab={spelled[t]: r for t, r in ranks.items()},
        merges=[(spelled[a], spelled[b]) for a, b in merges],
        ignore_merges=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    split = pre_tokenizers.Split(tokenizers.Regex(WORD_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    named = special_tokens.llama4_special_tokens()[: 201_134 - 200_000]
    tokenizer.add_special_tokens([*named, "<|finetune_right_pad_id|>"])
    tokenizer.save(str(path))
