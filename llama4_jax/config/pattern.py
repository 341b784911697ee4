"""The layer pattern as data: which kinds of layer repeat, so that the decoder can scan groups."""

import dataclasses

from llama4_jax.config.model import TextConfig


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which tokens a layer's queries see.

    Attributes:
        chunk_size: those of their own chunk of so many tokens; None for all that are earlier.
        temperature: (floor, coefficient) of what multiplies queries by position; None for nothing.
    """

    chunk_size: int | None
    temperature: tuple[int, float] | None = None


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What distinguishes one decoder layer from another.

    Attributes:
        visibility: which tokens its queries see.
        has_rope: whether positions rotate queries and keys; else the layer is a NoPE layer.
        is_moe: whether it is a mixture of experts.
    """

    visibility: Visibility
    has_rope: bool
    is_moe: bool


@dataclasses.dataclass(frozen=True)
class LayerPattern:
    """`slots` repeated `num_groups` times, followed by `tail`.

    Layer `g * len(slots) + i` is slot `i` of group `g`. Scout: 12 groups of (local, local, local,
    NoPE), all MoE; Maverick: 12 groups of (dense, MoE, dense, MoE NoPE).
    """

    slots: tuple[LayerKind, ...]
    num_groups: int
    tail: tuple[LayerKind, ...]

    @property
    def num_layers(self) -> int:
        return len(self.slots) * self.num_groups + len(self.tail)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Return the kind of every layer."""
        return self.slots * self.num_groups + self.tail

    def kind(self, layer: int) -> LayerKind:
        """Return the kind of 0-based `layer`."""
        return self.kinds[layer]

    def name(self, layer: int) -> tuple[str, int | None]:
        """Return where `layer` lives in the decoder: a path, and its group or None in the tail."""
        scanned = len(self.slots) * self.num_groups
        if layer < scanned:
            return f"groups.slots.{layer % len(self.slots)}", layer // len(self.slots)
        return f"tail.{layer - scanned}", None


def _kind(config: TextConfig, layer: int) -> LayerKind:
    """Return the kind of a layer: chunks with RoPE, or everything earlier with a temperature."""
    is_moe, warm = layer in config.moe_layers, config.temperature
    if layer not in config.nope_layers:
        return LayerKind(Visibility(config.chunk_size), has_rope=True, is_moe=is_moe)
    temperature = (warm.floor, warm.coefficient) if warm else None
    return LayerKind(Visibility(None, temperature), has_rope=False, is_moe=is_moe)


def layer_pattern(config: TextConfig) -> LayerPattern:
    """Find the shortest repeating run of layer kinds; what is left over at the end is the tail."""
    kinds = tuple(_kind(config, layer) for layer in range(config.num_layers))
    period = next(
        p
        for p in range(1, len(kinds) + 1)
        if all(kinds[i] == kinds[i % p] for i in range(len(kinds)))
    )
    num_groups = len(kinds) // period
    return LayerPattern(kinds[:period], num_groups, kinds[num_groups * period :])
