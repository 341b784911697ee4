"""Tokens and their log probabilities in the forms that clients read."""

from collections.abc import Sequence
from typing import Any

from llama4_jax.serve.answers import TokenLogprobs
from llama4_jax.text import Tokenizer


def spell(tokenizer: Tokenizer | None, token: int) -> str:
    """Return the text of a token alone; of one within a character its bytes, as OpenAI does."""
    if tokenizer is None:
        return f"token_id:{token}"
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(
    tokenizer: Tokenizer | None, tokens: Sequence[int], found: Sequence[TokenLogprobs]
) -> dict[str, Any]:
    """Return log probabilities as a chat choice has them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = None if tokenizer is None else list(tokenizer.token_bytes(token))
        return {"token": spell(tokenizer, token), "logprob": logprob, "bytes": raw}

    content = [
        {
            **entry(token, one.logprob),
            "top_logprobs": [entry(*likely) for likely in one.likeliest],
        }
        for token, one in zip(tokens, found, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer | None,
    tokens: Sequence[int],
    found: Sequence[TokenLogprobs | None],
    *,
    offset: int = 0,
) -> dict[str, Any]:
    """Return log probabilities as a choice of a completion has them.

    Args:
      tokenizer: spells tokens.
      tokens: of the text.
      found: of each token; None for the first of a prompt, which has none.
      offset: characters of the choice's text before these tokens.
    """
    spelled = [spell(tokenizer, token) for token in tokens]
    offsets = []
    for text in spelled:
        offsets.append(offset)
        offset += 0 if text.startswith("bytes:") else len(text)
    return {
        "tokens": spelled,
        "token_logprobs": [None if one is None else one.logprob for one in found],
        "top_logprobs": [None if one is None else _likeliest(tokenizer, one) for one in found],
        "text_offset": offsets,
    }


def _likeliest(tokenizer: Tokenizer | None, one: TokenLogprobs) -> dict[str, float]:
    """Return the likeliest tokens by their texts; of equal texts the likelier one stays."""
    spelled: dict[str, float] = {}
    for token, logprob in one.likeliest:
        spelled.setdefault(spell(tokenizer, token), logprob)
    return spelled
