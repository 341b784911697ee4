"""Group rows of similar length into batches, each small enough for one cache."""

from collections.abc import Iterator, Sequence

from llama4_jax.serve.chunks import bucket


def group(
    lengths: Sequence[int], *, max_rows: int, max_tokens: int, window: int
) -> Iterator[list[int]]:
    """Group rows by length, the shortest of each window first.

    Args:
      lengths: tokens that each row's cache must hold.
      max_rows: most rows of a batch.
      max_tokens: most tokens that a batch's cache holds, all rows together and padding included;
        a row longer than that makes a batch of its own.
      window: rows among which similar lengths are sought; all batches of one window come before
        those of the next, so that results can be delivered in order without much delay.

    Yields:
      Indices into `lengths`, each exactly once over all batches.
    """
    for start in range(0, len(lengths), window):
        indices = range(start, min(start + window, len(lengths)))
        yield from _group_window(lengths, indices, max_rows, max_tokens)


def _group_window(
    lengths: Sequence[int], indices: range, max_rows: int, max_tokens: int
) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in sorted(indices, key=lengths.__getitem__):
        tokens = bucket(len(batch) + 1) * bucket(lengths[index])
        if batch and (len(batch) == max_rows or tokens > max_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
