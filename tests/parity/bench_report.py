"""What `make bench-hf` makes of its measurements: medians, spreads, ratios, a table; no arrays."""

import dataclasses
import statistics
from collections.abc import Sequence

HEADER = (
    f"{'item':18} {'transformers as':28} {'ours':>21} {'transformers':>21} "
    f"{'tokens/s':>17}  times as fast"
)
NOTES = """
Times are medians, with the quartiles in brackets; a ratio is the median of those of single rounds,
in which one follows the other, with their quartiles. tokens/s: ours and theirs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One thing that both sides do.

    Attributes:
      name: of the item.
      tokens: that one run of so many seconds reads or makes.
      target: how many times as fast ours is to be.
    """

    name: str
    tokens: int
    target: float


ITEMS = (
    Item(name="layer, prompt", tokens=1024, target=3.0),
    Item(name="layer, token", tokens=1, target=1.5),
    Item(name="model, all logits", tokens=1024, target=3.0),
    Item(name="model, first token", tokens=1024, target=3.0),
    Item(name="model, more tokens", tokens=1, target=1.5),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """The median of some numbers, and their quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Summarise at least one number."""
        if len(values) == 1:
            return Spread(median=values[0], low=values[0], high=values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median=median, low=low, high=high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The rounds of one item: seconds of ours, and of transformers run in one way."""

    item: Item
    way: str
    ours: Sequence[float]
    theirs: Sequence[float]

    @property
    def ratio(self) -> Spread:
        """How many times as fast ours is, by rounds."""
        return Spread.of([b / a for a, b in zip(self.ours, self.theirs, strict=True)])

    @property
    def is_reached(self) -> bool:
        """Whether the median ratio is the target or more."""
        return self.ratio.median >= self.item.target

    def record(self) -> dict:
        """Return everything as JSON values."""
        values = {"ours_seconds": Spread.of(self.ours), "theirs_seconds": Spread.of(self.theirs)}
        return {
            "item": self.item.name,
            "way": self.way,
            "tokens": self.item.tokens,
            "rounds": len(self.ours),
            "target": self.item.target,
            **{k: dataclasses.asdict(v) for k, v in {**values, "ratio": self.ratio}.items()},
        }

    def line(self) -> str:
        """Lay out one line of the table."""

        def time(values: Sequence[float]) -> str:
            s = Spread.of(values)
            return f"{s.median * 1e3:.2f} ({s.low * 1e3:.2f}-{s.high * 1e3:.2f}) ms"

        rates = (self.item.tokens / Spread.of(v).median for v in (self.ours, self.theirs))
        rate = " ".join(f"{r:8.0f}" if r >= 100 else f"{r:8.1f}" for r in rates)
        verdict = "" if self.is_reached else f", BELOW {self.item.target}"
        ratio = f"{self.ratio.median:.2f} ({self.ratio.low:.2f}-{self.ratio.high:.2f}){verdict}"
        return (
            f"{self.item.name:18} {self.way:28} {time(self.ours):>21} {time(self.theirs):>21} "
            f"{rate}  {ratio}"
        )


def best_way(seconds: dict[str, Sequence[float]]) -> str:
    """Return the way to run an item whose median is the least; the first on ties."""
    return min(seconds, key=lambda way: statistics.median(seconds[way]))


def wrong_tokens(ours: Sequence[int], theirs: Sequence[int], gaps: Sequence[float], noise: float):
    """Count tokens that differ from the first clear difference on.

    Where the reference's two best logits are within `noise`, either is right, and whatever follows
    is another text.
    """
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            rest = zip(ours[i:], theirs[i:], strict=True)
            return 0 if gaps[i] <= noise else sum(x != y for x, y in rest)
    return 0
