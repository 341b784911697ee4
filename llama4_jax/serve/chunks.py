"""Split prompts of very different lengths into chunks of few shapes, so that few programs compile.

Every step of prefill or scoring reads one chunk of each row and appends it to the cache. Sizes
are rounded up to powers of two, and a chunk never ends inside an image tile, because the tile's
features are written into its patch tokens as a whole.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

SHORTEST = 16  # tokens of the smallest chunk


def bucket(size: int, *, floor: int = 1) -> int:
    """Return the smallest power of two that is at least `size` and at least `floor`."""
    return max(floor, 1 << max(0, size - 1).bit_length())


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Row:
    """One row to read: its tokens, and the tiles that fill its patch tokens in order.

    Attributes:
      tokens_T: int32 [T].
      tiles_NCHW: float32 [N, C, height, width]; N may be 0.
      tile_spans_N2: int [N, 2], the first and last patch token of every tile.
    """

    tokens_T: np.ndarray
    tiles_NCHW: np.ndarray
    tile_spans_N2: np.ndarray


_EMPTY = Row(
    tokens_T=np.zeros(0, np.int32),
    tiles_NCHW=np.zeros((0, 0, 0, 0), np.float32),
    tile_spans_N2=np.zeros((0, 2), np.int64),
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PrefillChunk:
    """What one step reads: a stretch of every row, at the left of the arrays.

    Attributes:
      tokens_BT: int32 [B, T], padding at the right.
      positions_BT: int32 [B, T], places in the whole row; -1 at padding.
      starts_B: int32 [B], place of each stretch in its row.
      lengths_B: int32 [B], tokens of each stretch; 0 where the row has ended.
      tiles_NCHW: the tiles of these stretches in order of the rows, then blank ones; None if
        there is none.
    """

    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    starts_B: np.ndarray
    lengths_B: np.ndarray
    tiles_NCHW: np.ndarray | None


def split_prompts(
    rows: Sequence[Row], *, num_rows: int, chunk_length: int, pad_id: int
) -> Iterator[PrefillChunk]:
    """Split rows into chunks that together hold every token once and in order.

    Args:
      rows: at least one.
      num_rows: rows of the arrays; those beyond `rows` hold padding only.
      chunk_length: most tokens of a stretch, a power of two. A longer tile makes it longer.
      pad_id: token at padding.

    Yields:
      Chunks until all rows have ended; T is a power of two from SHORTEST to `chunk_length`.
    """
    rows = [*rows, *[_EMPTY] * (num_rows - len(rows))]
    longest_tile = max(
        (int(last - first) + 1 for row in rows for first, last in row.tile_spans_N2), default=1
    )
    chunk_length = bucket(longest_tile, floor=chunk_length)
    starts = [0] * num_rows
    while any(start < len(row.tokens_T) for start, row in zip(starts, rows, strict=True)):
        ends = [_end(row, start, chunk_length) for start, row in zip(starts, rows, strict=True)]
        yield _chunk(rows, starts, ends, pad_id)
        starts = ends


def _end(row: Row, start: int, chunk_length: int) -> int:
    """Return where the row's next stretch ends: before the tile that would not fit whole."""
    end = min(start + chunk_length, len(row.tokens_T))
    for first, last in row.tile_spans_N2:
        if first < end <= last:
            return int(first)
    return end


def _chunk(rows: Sequence[Row], starts: list[int], ends: list[int], pad_id: int) -> PrefillChunk:
    starts_B, ends_B = np.asarray(starts, np.int32), np.asarray(ends, np.int32)
    lengths_B = ends_B - starts_B
    offsets_T = np.arange(bucket(int(lengths_B.max()), floor=SHORTEST), dtype=np.int32)
    tokens_BT = np.full((len(rows), len(offsets_T)), pad_id, np.int32)
    tiles = []
    for index, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True)):
        tokens_BT[index, : end - start] = row.tokens_T[start:end]
        firsts_N = row.tile_spans_N2[:, 0]
        tiles += list(row.tiles_NCHW[(start <= firsts_N) & (firsts_N < end)])
    within_BT = offsets_T < lengths_B[:, None]
    return PrefillChunk(
        tokens_BT=tokens_BT,
        positions_BT=np.where(within_BT, starts_B[:, None] + offsets_T, -1).astype(np.int32),
        starts_B=starts_B,
        lengths_B=lengths_B,
        tiles_NCHW=_stack(tiles),
    )


def _stack(tiles: list[np.ndarray]) -> np.ndarray | None:
    """Stack tiles, and blank ones up to a power of two, whose features nothing takes up."""
    if not tiles:
        return None
    blanks = [np.zeros_like(tiles[0])] * (bucket(len(tiles)) - len(tiles))
    return np.stack([*tiles, *blanks])
