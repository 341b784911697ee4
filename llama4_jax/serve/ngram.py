"""Drafts from what was read: the last few tokens stood there before, and these came after them."""

import numpy as np

LONGEST = 5  # tokens that agree, at most
MOST_AFTER_ONE = 4  # guesses where a single token agrees: they are seldom right
WINDOW = 1 << 14  # tokens that are searched, the last ones


def draft(tokens_T: np.ndarray, most: int) -> list[int]:
    """Guess the next tokens: what followed the latest place where the longest n-gram stood before.

    Args:
      tokens_T: int32, prompt and answer.
      most: tokens to guess.

    Returns:
      At most `most` tokens, none if no n-gram has stood before.
    """
    tokens_T = tokens_T[-WINDOW:]
    for size in range(LONGEST, 0, -1):
        places = len(tokens_T) - size  # of n-grams before the last one
        if places < 1:
            continue
        is_same = np.ones(places, bool)
        for offset in range(size):
            is_same &= tokens_T[offset : offset + places] == tokens_T[-size + offset]
        found = np.flatnonzero(is_same)
        if len(found):
            begin = int(found[-1]) + size
            count = most if size > 1 else min(most, MOST_AFTER_ONE)
            return tokens_T[begin : begin + count].tolist()
    return []
