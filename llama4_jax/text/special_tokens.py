"""The names of Llama 4's special tokens, in the order of their ids.

Two vocabularies carry them:

* **Llama 4**: 200,000 byte-pair tokens, then 2,048 special tokens (ids 200,000 to 202,047).
* **nano**: 1,920 byte-pair tokens, then 128 special tokens (ids 1,920 to 2,047). The first 93
  special tokens, from begin-of-text to patch, stand in Llama 4's order, so that
  `nano_id - 1920 == llama4_id - 200000` for each of them.

Vocabularies of Llama 3 spell some of them otherwise; `find` knows both spellings.

Source: the token names and ids in the `tokenizer.py` of Meta's `llama-models` package, 0.3.0.
"""

from collections.abc import Mapping

NUM_SPECIAL_TOKENS = 2048
NUM_NANO_SPECIAL_TOKENS = 128

BOS = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
FIM_PREFIX = "<|fim_prefix|>"
FIM_MIDDLE = "<|fim_middle|>"
FIM_SUFFIX = "<|fim_suffix|>"
HEADER_START = "<|header_start|>"
HEADER_END = "<|header_end|>"
EOM = "<|eom|>"
EOT = "<|eot|>"
STEP = "<|step|>"
PYTHON_START = "<|python_start|>"
PYTHON_END = "<|python_end|>"
PAD = "<|finetune_right_pad|>"
IMAGE_START = "<|image_start|>"
IMAGE_END = "<|image_end|>"
TILE_X_SEPARATOR = "<|tile_x_separator|>"
TILE_Y_SEPARATOR = "<|tile_y_separator|>"
IMAGE = "<|image|>"
PATCH = "<|patch|>"
THINKING_START = "<|reasoning_thinking_start|>"
THINKING_END = "<|reasoning_thinking_end|>"

STOP_TOKENS = (END_OF_TEXT, EOM, EOT)
"""The three tokens that end a generation, in id order."""

LLAMA3 = {
    HEADER_START: "<|start_header_id|>",
    HEADER_END: "<|end_header_id|>",
    EOM: "<|eom_id|>",
    EOT: "<|eot_id|>",
    PYTHON_START: "<|python_tag|>",
}
"""How Llama 3 spells tokens. It has none that ends code: the end of the message does."""


def find(special_tokens: Mapping[str, int], name: str) -> int | None:
    """Return the id of a special token in Llama 4's spelling or Llama 3's; None if it has none."""
    return special_tokens.get(name, special_tokens.get(LLAMA3.get(name, name)))


def _reserved(family: str, first: int, last: int) -> tuple[str, ...]:
    prefix = f"{family}_" if family else ""
    return tuple(f"<|{prefix}reserved_special_token_{i}|>" for i in range(first, last + 1))


_TEXT = (
    BOS,
    END_OF_TEXT,
    FIM_PREFIX,
    FIM_MIDDLE,
    FIM_SUFFIX,
    HEADER_START,
    HEADER_END,
    EOM,
    EOT,
    STEP,
    *_reserved("text_post_train", 0, 5),
    PYTHON_START,
    PYTHON_END,
    PAD,
    *_reserved("text_post_train", 8, 68),  # 6 and 7 never existed
)

_VISION = (
    IMAGE_START,
    IMAGE_END,
    *_reserved("vision", 0, 1),
    TILE_X_SEPARATOR,
    TILE_Y_SEPARATOR,
    *_reserved("vision", 2, 5),
    IMAGE,
    *_reserved("vision", 6, 6),
    PATCH,
)

_REASONING = (*_reserved("reasoning", 0, 7), THINKING_START, THINKING_END)


def llama4_special_tokens() -> tuple[str, ...]:
    """List the 2,048 special tokens of Llama 4; the i-th has id 200,000 + i."""
    named = (*_TEXT, *_VISION, *_reserved("vision", 7, 1047), *_REASONING)
    return (*named, *_reserved("", 0, NUM_SPECIAL_TOKENS - len(named) - 1))


def nano_special_tokens() -> tuple[str, ...]:
    """List the 128 special tokens of the nano vocabulary; the i-th has id 1,920 + i.

    The gap between patch (the last one at Llama 4's offset) and the reasoning tokens (the last
    ten) is filled with reserved vision tokens.
    """
    spare = NUM_NANO_SPECIAL_TOKENS - len(_TEXT) - len(_VISION) - len(_REASONING)
    return (*_TEXT, *_VISION, *_reserved("vision", 7, 6 + spare), *_REASONING)
