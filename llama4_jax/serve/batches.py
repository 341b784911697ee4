"""Group rows of similar length into batches, each small enough for one cache."""

from collections.abc import Iterator, Sequence

from llama4_jax.serve.pieces import bucket


def group(lengths: Sequence[int], *, max_rows: int, max_tokens: int) -> Iterator[list[int]]:
    """Group rows by length, the shortest first.

    Args:
      lengths: tokens that each row's cache must hold.
      max_rows: most rows of a batch.
      max_tokens: most tokens that a batch's cache holds, all rows together and padding included;
        a row longer than that makes a batch of its own.

    Yields:
      Indices into `lengths`, each exactly once over all batches.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        tokens = bucket(len(batch) + 1) * bucket(lengths[index])
        if batch and (len(batch) == max_rows or tokens > max_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
