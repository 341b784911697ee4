"""Mix sources of examples in given shares of the tokens."""

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np

from llama4_jax.data.packing import Example

# Examples of a part that are made to estimate its typical length and tiles.
SAMPLED = 48


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One source in a mixture.

    Attributes:
        name: of the source, for messages.
        examples: one epoch of it.
        share: of all tokens, relative to the other parts; positive.
    """

    name: str
    examples: grain.MapDataset[Example]
    share: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """An endless stream of examples of several parts.

    Attributes:
        examples: every part is repeated, reshuffled each epoch where it was shuffled.
        tiles_per_slot: expected tiles per packed token.
    """

    examples: grain.MapDataset[Example]
    tiles_per_slot: float


def mix(parts: Sequence[Part]) -> Mixture:
    """Interleave parts so that each one's share of the tokens is as asked.

    Examples of a part with short examples come more often: a part is drawn with frequency
    share / (mean slots of its examples), the mean taken over a spread of SAMPLED examples.

    Raises:
        ValueError: no part, an empty part, or a share that is not positive.
    """
    if not parts:
        raise ValueError("a mixture needs at least one part; name a source and its share")
    frequencies, tiles = [], 0.0
    for part in parts:
        if not part.share > 0:
            raise ValueError(f"the share of {part.name!r} ({part.share}) must be positive")
        if not len(part.examples):
            raise ValueError(f"the source {part.name!r} has no example; leave it out")
        sample = _sample(part.examples)
        mean_slots = sum(example.num_slots for example in sample) / len(sample)
        mean_tiles = sum(example.num_tiles for example in sample) / len(sample)
        frequencies.append(part.share / mean_slots)
        tiles += part.share * mean_tiles / mean_slots
    total_share = sum(part.share for part in parts)
    endless = [part.examples.repeat() for part in parts]
    return Mixture(
        examples=grain.MapDataset.mix(endless, weights=frequencies),
        tiles_per_slot=tiles / total_share,
    )


def _sample(examples: grain.MapDataset[Example]) -> list[Example]:
    """Make up to SAMPLED examples, evenly spread."""
    places = np.linspace(0, len(examples) - 1, min(SAMPLED, len(examples)))
    made = (examples[int(place)] for place in places)
    return [example for example in made if example is not None]
