"""Shapes of mixtures of experts.

Who goes where is drawn on the host from a fixed seed, so that benchmarks can count what a schedule
of blocks does with it. Rows of no expert hold NaN, and so do their gates.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.experts import quantize
from kernels_pallas.experts.inputs import INT4_GROUP, WeightScales

_QUANTIZE: dict[str, Callable[[jax.Array], tuple[jax.Array, jax.Array]]] = {
    "int8": quantize.quantize_int8,
    "int4": quantize.quantize_int4,
    "fp8": quantize.quantize_fp8,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """A call of `expert_mlp`.

    Attributes:
        name: for the command line.
        T, X: tokens, and experts that each chooses.
        D, F, E: width of tokens, width inside an expert, experts.
        routing: "random" chooses evenly, different experts for a token; "hot" only the last one;
            "every_other" half of the experts.
        padding: tokens at the end that are routed to no expert.
        has_shared: whether there is something to add to the result.
        dtype: of tokens, gates, and matrices unless these are stored otherwise.
        stored: how matrices are stored, "float" or as `expert_mlp` describes it.
        has_gradient: whether its gradient is of interest; stored matrices have none.
    """

    name: str
    T: int
    X: int = 1
    D: int
    F: int
    E: int
    routing: Literal["random", "hot", "every_other"] = "random"
    padding: int = 0
    has_shared: bool = False
    dtype: str = "bfloat16"
    stored: str = "float"
    has_gradient: bool = True

    def __post_init__(self):
        """Check that tokens can choose, and that the matrices can be stored so."""
        if self.X > self.E or (self.routing == "hot" and self.X > 1):
            raise ValueError(f"{self.X} different experts must be chosen among those of a routing")
        if self.padding > self.T:
            raise ValueError(f"padding ({self.padding}) cannot exceed the {self.T} tokens")
        if self.stored not in ("float", *_QUANTIZE):
            raise ValueError(
                f"stored is {self.stored!r}; choose from float, {', '.join(_QUANTIZE)}"
            )

    def choices(self) -> np.ndarray:
        """Return the int32 experts that tokens choose [T, X]; E for padding."""
        order_TE = np.random.default_rng(0).random((self.T, self.E)).argsort(1)
        expert_TX = order_TE[:, : self.X]
        if self.routing == "hot":
            expert_TX = np.full_like(expert_TX, self.E - 1)
        if self.routing == "every_other":
            expert_TX = expert_TX // 2 * 2 + (1 if self.E > 1 else 0)
        expert_TX[self.T - self.padding :] = self.E
        return expert_TX.astype(np.int32)

    def sizes(self) -> np.ndarray:
        """Return how many rows each expert has [E]."""
        return np.bincount(self.choices().reshape(-1), minlength=self.E + 1)[: self.E]

    def build(self, key: jax.Array) -> dict[str, Any]:
        """Draw the arrays of the call, by the names of its arguments."""
        keys = jax.random.split(key, 6)
        x_TD = jax.random.normal(keys[0], (self.T, self.D)).astype(self.dtype)
        gate_TX = jax.random.uniform(keys[1], (self.T, self.X), minval=0.2).astype(self.dtype)
        if self.padding:
            is_real_T1 = jnp.arange(self.T)[:, None] < self.T - self.padding
            x_TD, gate_TX = (jnp.where(is_real_T1, x, jnp.nan) for x in (x_TD, gate_TX))
        arrays: dict[str, Any] = {"x_TD": x_TD, "gate_TX": gate_TX}
        scales = {}
        for name, each in zip(("gate", "up", "down"), keys[2:5], strict=True):
            ins, outs = (self.F, self.D) if name == "down" else (self.D, self.F)
            label = "w_down_EFD" if name == "down" else f"w_{name}_EDF"
            draw = functools.partial(self._matrix, each, ins, outs)
            arrays[label], scales[name] = jax.lax.map(draw, jnp.arange(self.E))
        if self.stored != "float":
            arrays["weight_scales"] = WeightScales(**scales)
        if self.has_shared:
            arrays["shared_TD"] = jax.random.normal(keys[5], x_TD.shape).astype(self.dtype)
        arrays["expert_TX"] = jnp.asarray(self.choices())
        return arrays

    def _matrix(self, key: jax.Array, ins: int, outs: int, number: jax.Array) -> tuple:
        """Draw the matrix of one expert; with its scales, or None."""
        w = jax.random.normal(jax.random.fold_in(key, number), (ins, outs)) / math.sqrt(ins)
        return (w.astype(self.dtype), None) if self.stored == "float" else _QUANTIZE[self.stored](w)

    def matrices_bytes(self) -> int:
        """Return the bytes of the three matrices of one expert, with their scales."""
        entries = 3 * self.D * self.F
        if self.stored == "float":
            return entries * jnp.dtype(self.dtype).itemsize
        if self.stored == "int4":
            return entries // 2 + 4 * entries // INT4_GROUP
        return entries + 4 * (2 * self.F + self.D)

    def flops(self, *, backward: bool = False) -> int:
        """Return the FLOPs of the products: three of each row going forward, six going back."""
        return (12 if backward else 6) * self.D * self.F * int(self.sizes().sum())

    def bytes(self, *, backward: bool = False) -> int:
        """Return the bytes of reading and writing what is needed, once.

        Forward that is the matrices of experts that have rows, the tokens, the result, and hidden
        rows each way. Backward, tokens, the gradients of result and tokens; the two products that
        the forward pass saved; their gradients and hidden rows each way; and the gradients of all
        matrices, zeros too.
        """
        sizes_E, width = self.sizes(), jnp.dtype(self.dtype).itemsize
        rows, hit = int(sizes_E.sum()), int((sizes_E > 0).sum())
        tokens, hidden = self.T * self.D * width, rows * self.F * width
        if backward:
            return (hit + self.E) * self.matrices_bytes() + 3 * tokens + 8 * hidden
        shared = tokens if self.has_shared else 0
        return hit * self.matrices_bytes() + 2 * tokens + 2 * hidden + shared


_SCOUT = {"D": 5120, "F": 8192, "E": 16}
_MAVERICK = {"D": 5120, "F": 8192, "E": 128}
_NANO = {"D": 128, "F": 160, "E": 4, "dtype": "float32"}

EXPERTS = (
    Experts(name="scout_experts_8k", T=8192, **_SCOUT),
    Experts(name="scout_experts_8k_hot", T=8192, routing="hot", **_SCOUT),
    Experts(name="scout_experts_4k_top2", T=4096, X=2, **_SCOUT),
    Experts(name="scout_experts_1", T=1, has_gradient=False, **_SCOUT),
    Experts(name="scout_experts_8", T=8, has_gradient=False, **_SCOUT),
    Experts(name="scout_experts_64", T=64, has_gradient=False, **_SCOUT),
    *(
        Experts(name=f"scout_experts_{name}_{stored}", T=T, stored=stored, **_SCOUT)
        for stored in ("int8", "int4", "fp8")
        for name, T in (("8k", 8192), ("64", 64))
    ),
    Experts(name="scout_experts_1_int4", T=1, stored="int4", **_SCOUT),
    Experts(name="maverick_experts_8k", T=8192, **_MAVERICK),
    Experts(name="maverick_experts_1", T=1, has_gradient=False, **_MAVERICK),
    Experts(name="maverick_experts_64", T=64, has_gradient=False, **_MAVERICK),
    Experts(name="nano_experts_2k", T=2048, **_NANO),
    Experts(name="nano_experts_1", T=1, **_NANO),
)

# Of no model: everything that may differ does, small enough for any device.
ODD = (
    Experts(
        name="odd_experts", T=333, X=2, D=256, F=384, E=6, padding=31, has_shared=True,
    ),
    Experts(name="odd_experts_1", T=1, D=256, F=384, E=6, has_shared=True),
    Experts(name="odd_experts_hot", T=700, D=256, F=384, E=4, routing="hot", padding=3),
    Experts(name="odd_experts_empty", T=129, D=384, F=256, E=16, routing="every_other"),
    Experts(name="odd_experts_nobody", T=20, D=256, F=256, E=4, padding=20),
    Experts(name="odd_experts_f32", T=77, X=2, D=256, F=384, E=6, padding=5, dtype="float32"),
    *(
        Experts(
            name=f"odd_experts_{stored}", T=45, X=2, D=256, F=384, E=6, padding=5,
            has_shared=True, stored=stored,
        )
        for stored in ("int8", "int4", "fp8")
    ),
)  # fmt: skip
