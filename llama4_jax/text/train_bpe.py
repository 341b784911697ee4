"""Train a small byte-level BPE vocabulary that carries Llama 4's special tokens.

The result has the layout and the pre-tokenisation of Llama 4's vocabulary at another size: byte
tokens, merges in the order learned, then special tokens in the last rows.
"""

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from llama4_jax.text import special_tokens
from llama4_jax.text.pattern import WORD_PATTERN

NUM_BYTES = 256


def train_bpe(
    texts: Iterable[str],
    vocab_size: int = 2048,
    special_names: tuple[str, ...] | None = None,
) -> tokenizers.Tokenizer:
    """Learn byte pairs from texts and append the special tokens.

    The outcome depends on the texts alone: equal pair counts are decided by the lower ids.

    Args:
        texts: The training texts. Special tokens spelled in them are ordinary text.
        vocab_size: Rows of the whole vocabulary, special tokens included.
        special_names: Special tokens in id order; the nano set when absent.

    Returns:
        A tokenizer whose ids are 0..255 bytes, then merges, then special tokens; its
        post-processor begins every text with the begin-of-text token.

    Raises:
        ValueError: The vocabulary has no room for the bytes, or the texts are too few to fill it.
    """
    names = special_tokens.nano_special_tokens() if special_names is None else special_names
    num_base = vocab_size - len(names)
    if num_base < NUM_BYTES:
        raise ValueError(
            f"vocab_size ({vocab_size}) must be at least {NUM_BYTES + len(names)}: "
            f"{NUM_BYTES} bytes and {len(names)} special tokens."
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_base,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != num_base:
        raise ValueError(
            f"The texts gave {tokenizer.get_vocab_size()} byte-pair tokens but {num_base} are "
            "wanted; give more text or a smaller vocab_size."
        )
    tokenizer.add_special_tokens(list(names))
    _begin_every_text(tokenizer)
    return tokenizer


def _begin_every_text(tokenizer: tokenizers.Tokenizer) -> None:
    """Prepend the begin-of-text token once to a text, and once to each text of a pair."""
    bos = special_tokens.BOS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
