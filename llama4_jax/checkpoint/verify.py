"""Say what is wrong with a checkpoint before any of it is used, from names and shapes alone."""

import difflib
from collections.abc import Mapping

Shape = tuple[int, ...]

_SHOWN = 12


def check_tensors(where: str, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Compare the tensors that a model needs with those that a checkpoint has.

    Args:
      where: the checkpoint, for the message.
      expected: shape of every tensor that must be there.
      found: shape of every tensor that is there, without those that may be ignored.

    Raises:
      ValueError: names every missing, misnamed, misshapen and unexpected tensor, with both shapes.
    """
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    lines = [
        f"{key} has shape {found[key]}, expected {shape}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    for key in missing:
        # Searching for names is slow; what is not shown is only counted.
        twin = _twin(key, expected[key], extra, found) if len(lines) < _SHOWN else None
        if twin is None:
            lines.append(f"{key} {expected[key]} is missing")
        else:
            extra.remove(twin)
            lines.append(
                f"{key} {expected[key]} is missing; is it misnamed as {twin} {found[twin]}?"
            )
    lines += [f"{key} {found[key]} is not part of this model" for key in extra]
    if lines:
        shown = "".join(f"\n  {line}" for line in lines[:_SHOWN])
        rest = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise ValueError(f"{where} does not hold the model that its config describes:{shown}{rest}")


def _twin(key: str, shape: Shape, extra: list[str], found: Mapping[str, Shape]) -> str | None:
    """Return the unexpected tensor of the same shape whose name is nearest to a missing one's."""
    candidates = [name for name in extra if found[name] == shape]
    near = difflib.get_close_matches(key, candidates[:200], n=1, cutoff=0.6)
    return near[0] if near else None
