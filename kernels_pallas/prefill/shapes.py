"""Shapes of prefill attention: a piece of each row against its cache."""

import dataclasses

from kernels_pallas.decode.shapes import Decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill(Decode):
    """A call of `prefill_attention`: as `Decode`, the queries of a row are its last T tokens."""

    def blocks_seen(self, q_block: int) -> list[tuple[int, int]]:
        """Return the slots [begin, end) that each block of queries sees, of all rows."""
        found = []
        for length in self.lengths or (self.S,) * self.B:
            seen = self._visible(length)
            for i in range(0, self.T, q_block):
                first, last = length - self.T + i, length - self.T + min(i + q_block, self.T)
                found.append((first + 1 - seen[i], last))
        return found

    def bytes_in_blocks(self, q_block: int, kv_block: int = 1) -> int:
        """Return the bytes if each block of queries reads the slots that it sees.

        Args:
            q_block: queries of a block.
            kv_block: slots that are read together, or not at all.
        """
        slots = sum(
            -(-end // kv_block) * kv_block - begin // kv_block * kv_block
            for begin, end in self.blocks_seen(q_block)
        )
        return 2 * slots * self._slot_bytes() + self._query_bytes()


PREFILL = (
    Prefill(name="scout_prefill_128k", T=2048, S=131_072, page_size=64),
    Prefill(name="scout_prefill_128k_int8", T=2048, S=131_072, page_size=64, dtype="int8"),
    Prefill(name="scout_prefill_128k_fp8", T=2048, S=131_072, page_size=64, dtype="float8_e4m3fn"),
    Prefill(name="scout_prefill_1m", T=8192, S=1_048_576, page_size=64),
    Prefill(
        name="scout_prefill_chunk", B=4, T=2048, S=8192, page_size=64, chunk_size=8192,
        temperature=None,
    ),
    Prefill(
        name="nano_prefill", B=4, T=64, S=512, N=4, K=2, H=32, page_size=16,
        temperature=(512, 0.1),
    ),
)  # fmt: skip

# Of no model: everything that may differ does, small enough for any device.
ODD = (
    Prefill(
        name="odd_prefill", B=3, S=1024, T=300, N=6, K=2, H=64, lengths=(1000, 515, 300),
        page_size=16, chunk_size=256, temperature=(64, 0.1), return_lse=True,
    ),
    Prefill(name="odd_prefill_9", S=80, T=9, N=2, K=1, H=64),
    Prefill(name="odd_prefill_256", B=2, S=512, T=70, N=4, K=2, H=256, lengths=(301, 70)),
    Prefill(
        name="odd_prefill_fp8", B=2, S=1024, T=200, N=10, K=2, dtype="float8_e4m3fn",
        lengths=(700, 233), page_size=64, return_lse=True,
    ),
    Prefill(
        name="odd_prefill_int8", B=2, S=1024, T=200, N=10, K=2, dtype="int8",
        lengths=(1024, 200), page_size=128, return_lse=True,
    ),
)  # fmt: skip
