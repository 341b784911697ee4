"""Seeded damage: to JSON values, to bytes, to the source of a template."""

import copy
import json
import math
import random
from typing import Any

DEEP = json.loads("[" * 80 + "]" * 80)

STRANGE: list[Any] = [
    *(None, True, "x", "", [], ["x"], {}, {"a": 1}, -1, 0, 0.5, 2**31, 10**12, 10**400, -(10**12)),
    *(math.inf, -math.inf, math.nan, 1e308, [10**12], [[]], "\0", "é" * 10_000, "\ud800", DEEP),
]
"""Values that no key expects."""


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Return a copy with one to three places changed: a strange value, a neighbour's, or none."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        boxes = list(_boxes(value))
        box = rng.choice(boxes) if boxes else None
        if not box:
            return rng.choice(STRANGE)
        key = rng.choice(list(box)) if isinstance(box, dict) else rng.randrange(len(box))
        action = rng.randrange(5)
        if action == 0:
            del box[key]
        elif action == 1:
            other = rng.choice(boxes)
            box[key] = copy.deepcopy(rng.choice(list(_items(other)) or [None]))
        elif action == 2 and isinstance(box[key], int | float):
            box[key] *= rng.choice((-1, 0, 2, 1000))
        else:
            box[key] = copy.deepcopy(rng.choice(STRANGE))
    return value


def _boxes(value: Any):
    if isinstance(value, dict | list):
        if value:
            yield value
        for item in _items(value):
            yield from _boxes(item)


def _items(box: Any):
    return box.values() if isinstance(box, dict) else box


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return a copy with bytes changed, cut, doubled or moved, or a number made vast."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(found) + 1)
        length = min(len(found) - place, rng.choice((1, 2, 4, 8, 100)))
        match rng.randrange(6):
            case 0:
                found[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                del found[place:]
            case 2:
                del found[place : place + length]
            case 3:
                found[place:place] = found[place : place + length] * rng.choice((1, 50))
            case 4:
                found[place : place + 8] = rng.choice((b"\xff", b"\x7f", b"\0")) * length
            case 5:
                start = rng.randrange(len(found) + 1)
                found[place : place + length] = found[start : start + length]
    return bytes(found)


_PIECES = [
    *("{{", "}}", "{%", "%}", "{#", "'", '"', "(", ")", "[", "]", "|", "~", "+", "*", "**", "%"),
    *("{% for a in messages %}", "{% endfor %}", "{% if a %}", "{% endif %}", "{% set a = 1 %}"),
    *("{% macro f(a) %}", "{% endmacro %}", "{{ f(f) }}", "{{ messages * 99999999 }}", " 10**9 "),
    *("{{ a | tojson(indent=99999999) }}", "loop", "namespace(a=1)", "raise_exception", "."),
    *("not ", " is defined", " in ", "self", "'a' * 99999999", "{{ messages[0].content * 999 }}"),
]


def mutate_template(source: str, rng: random.Random) -> str:
    """Return a source with pieces of the language put in, taken out, doubled or moved."""
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(source) + 1)
        end = place + rng.choice((1, 3, 10, 60))
        before, piece, after = source[:place], source[place:end], source[end:]
        match rng.randrange(4):
            case 0:
                source = before + rng.choice(_PIECES) * rng.choice((1, 1, 40)) + piece + after
            case 1:
                source = before + after
            case 2:
                source = before + piece * rng.choice((2, 40)) + after
            case 3:
                other = rng.randrange(len(source) + 1)
                source = before + source[other : other + end - place] + after
    return source
