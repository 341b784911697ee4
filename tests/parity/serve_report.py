"""What `make bench-serve` makes of its figures: which are wanted, lines, a file; no arrays."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.benchmark.report import write_json

Figure = Callable[[], Mapping[str, Any]]


def wanted(text: str, known: Sequence[str]) -> list[str]:
    """Read names between commas; none are all.

    Raises:
      ValueError: one is not known.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"{name} is no figure; choose from {', '.join(known)}.")
    return [name for name in known if not names or name in names]


def tell(
    figures: Mapping[str, Figure], about: Mapping[str, Any], output: pathlib.Path | None
) -> dict[str, Mapping[str, Any]]:
    """Measure one figure after the other; print each and keep all so far as soon as it is known.

    Args:
      figures: how to measure each, by its name.
      about: the machine, kept beside them.
      output: a JSON file, which is whole whenever this is stopped.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for name, measure in figures.items():
        found[name] = measure()
        print(f"{name:4} {line(found[name])}", flush=True)
        if output:
            write_json(output, {**about, **found})
    return found


def line(values: Mapping[str, Any]) -> str:
    """Lay values out in a line."""
    return ", ".join(f"{name.replace('_', ' ')}: {_shown(value)}" for name, value in values.items())


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({line(value)})"
    if isinstance(value, list | tuple):
        return " ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
