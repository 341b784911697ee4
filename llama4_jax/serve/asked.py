"""What the device has to know of a choice, and where features of image tiles are kept."""

import collections
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llama4_jax.serve.adjust import Adjuster
from llama4_jax.serve.options import Options
from llama4_jax.serve.plan import Piece
from llama4_jax.serve.scheduler import MAX_DRAFTS


class Tile(NamedTuple):
    """An image tile, and the digest of its pixels that names it."""

    digest: bytes
    pixels_CHW: np.ndarray


class Asked(NamedTuple):
    """What the device has to know of a choice.

    Attributes:
      options: resolved.
      key: uint32 [2], of its draws.
      prompt_T: int32, its tokens.
      patches_N: int, the positions of its patch tokens.
      tiles: whose features stand there, in order.
      adjuster: what changes its logits, if anything does.
    """

    options: Options
    key: np.ndarray
    prompt_T: np.ndarray
    patches_N: np.ndarray
    tiles: Sequence[Tile]
    adjuster: Adjuster | None = None

    @property
    def end(self) -> int:
        """Most tokens of it whose keys and values are ever kept."""
        return len(self.prompt_T) + max(self.options.max_new_tokens - 1, 0)

    @property
    def changes(self) -> int:
        """Most tokens whose logits are changed at its next draws."""
        return 0 if self.adjuster is None else self.adjuster.size + 1 + MAX_DRAFTS


class Features:
    """Which tile's features are in which place; those used longest ago give way."""

    def __init__(self, count: int):
        self._places: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        self._free = list(range(count))

    def fetch(
        self, wanted: Mapping[bytes, np.ndarray]
    ) -> tuple[dict[bytes, int], list[tuple[int, np.ndarray]]]:
        """Return the places of tiles, and those that are to be encoded with their places."""
        for digest in wanted:
            if digest in self._places:
                self._places.move_to_end(digest)
        new = []
        for digest, pixels in wanted.items():
            if digest not in self._places:
                place = self._free.pop() if self._free else self._places.popitem(last=False)[1]
                self._places[digest] = place
                new.append((place, pixels))
        return {digest: self._places[digest] for digest in wanted}, new


def patches_of(piece: Piece, row: Asked) -> tuple[int, int]:
    """Return which of a row's patch tokens a piece holds: from the first to before the last."""
    first, stop = np.searchsorted(row.patches_N, (piece.start, piece.end))
    return int(first), int(stop)


NOBODY = Asked(
    Options(temperature=0.0, top_p=1.0, top_k=0),
    np.zeros(2, np.uint32),
    np.zeros(0, np.int32),
    np.zeros(0, np.int64),
    (),
)
