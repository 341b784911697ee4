"""How text is cut into words before byte pairs are merged.

The pattern is that of tiktoken's public `o200k_base` encoding, which Llama 4 shares to the
character. Its alternatives, tried in order:

1. a word with at least one lower-case (or caseless) letter, preceded by upper-case ones and at
   most one sign, followed by an English contraction such as 'll;
2. a word with at least one upper-case (or caseless) letter, same surroundings;
3. one to three digits;
4. a run of signs after at most one space, with the line ends and slashes that follow;
5. white space up to and including line ends;
6. white space, except one character that belongs to the word after it;
7. any white space.

Source: tiktoken, `tiktoken_ext/openai_public.py`, `o200k_base`.
"""

_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SIGN = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

WORD_PATTERN = "|".join(
    (
        f"{_SIGN}[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}",
        f"{_SIGN}[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
