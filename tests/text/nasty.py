"""Random strings made to upset tokenizers."""

import random

_SCRIPTS = (
    (0x20, 0x7F),
    (0x00, 0x20),
    (0xA0, 0x180),
    (0x300, 0x370),  # combining marks
    (0x370, 0x530),
    (0x590, 0x700),
    (0x900, 0xE00),
    (0x1C0, 0x1D0),  # title-case letters
    (0x2000, 0x2070),  # odd spaces, joiners, direction marks
    (0x2460, 0x2500),  # numbers in circles
    (0x3040, 0x3100),
    (0x4E00, 0x4F00),
    (0xAC00, 0xAD00),
    (0xE000, 0xE010),
    (0xFF00, 0xFF60),
    (0x1D400, 0x1D500),
    (0x1F300, 0x1F650),
    (0xF0000, 0xF0010),
    (0x10FFF0, 0x10FFFE),
)
_PIECES = (
    " ",
    "  ",
    "\n",
    "\r\n",
    "\n\n",
    "\t",
    "\u00a0",
    "\u2028",
    "'s",
    "'LL",
    "n't",
    "DON'T",
    "/",
    "//",
    "http://",
    "123",
    "1234567",
    "<|",
    "|>",
    "<|eot|>",
    "<|header_start|>",
    "camelCase",
    "ABCdef",
    "\u0130\u017f",
    "\u00df\u1e9e",
    "e\u0301",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\ufeff",
    "\ufffd",
    "\x00",
    "...",
    "!!/\n",
    "def f(x):\n    return x\n",
    "\u0661\u0662\u0663\u0664",
)


def nasty_strings(count: int, seed: int) -> list[str]:
    """Make strings of one to forty pieces from many scripts and known trouble."""
    random_ = random.Random(seed)
    return [_nasty_string(random_) for _ in range(count)]


def _nasty_string(random_: random.Random) -> str:
    scripts = random_.sample(_SCRIPTS, k=random_.randint(1, 4))
    pieces = []
    for _ in range(random_.randint(1, 40)):
        if random_.random() < 0.35:
            pieces.append(random_.choice(_PIECES))
        else:
            first, last = random_.choice(scripts)
            pieces.append(chr(random_.randrange(first, last)) * random_.choice((1, 1, 1, 2, 5)))
    return "".join(pieces)
