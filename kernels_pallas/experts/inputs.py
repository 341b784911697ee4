"""The arrays of a mixture-of-experts call, checked, and how stored weights stand for real ones.

Both operations check what they are given here, so that a kernel can rely on it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

INT4_GROUP = 128  # input channels that share a scale

_held = jax.make_user_context(default_value=1.0)


class WeightScales(NamedTuple):
    """Float32 scales of quantised matrices, by which what is stored is multiplied.

    int8 and float8_e4m3fn matrices have one scale for each output channel: gate and up [E, F], down
    [E, D]. int4 matrices have one for each group of 128 input channels: gate and up [E, D / 128,
    F], down [E, F / 128, D]; they are packed two input channels to an int8, the even one in the low
    nibble, the odd one in the high one: w_gate and w_up [E, D / 2, F], w_down [E, F / 2, D].
    """

    gate: jax.Array
    up: jax.Array
    down: jax.Array


class Arguments(NamedTuple):
    """What `expert_mlp` and `expert_mlp_parallel` are given, as arrays, with nothing wrong."""

    x_TD: jax.Array
    w_gate: jax.Array
    w_up: jax.Array
    w_down: jax.Array
    expert_TX: jax.Array
    gate_TX: jax.Array
    shared_TD: jax.Array | None
    scales: WeightScales | None
    group: jax.Array | None

    @classmethod
    def checked(cls, *given: Any) -> "Arguments":
        """Make arrays of arguments in the order of the fields.

        Raises:
            ValueError: shapes or dtypes disagree.
        """
        arguments = cls(*jax.tree.map(jnp.asarray, given))
        arguments._check_shapes()
        arguments._check_dtypes()
        return arguments._replace(
            expert_TX=arguments.expert_TX.astype(jnp.int32),
            group=jax.tree.map(lambda group: group.astype(jnp.int32), arguments.group),
        )

    def _check_shapes(self) -> None:
        matrices = 3 if self.group is None else 4
        for name, array, ndim in (
            ("x_TD", self.x_TD, 2),
            ("expert_TX", self.expert_TX, 2),
            ("w_gate_EDF", self.w_gate, matrices),
            *([] if self.group is None else [("group", self.group, 0)]),
        ):
            if array.ndim != ndim:
                raise ValueError(f"{name} has shape {array.shape}; it must have {ndim} dimensions")
        (T, D), X, (*stack, E, _, F) = self.x_TD.shape, self.expert_TX.shape[1], self.w_gate.shape
        is_int4 = self.scales is not None and self.scales.gate.ndim == self.w_gate.ndim
        if is_int4 and (D % INT4_GROUP or F % INT4_GROUP):
            raise ValueError(f"int4 matrices need D ({D}) and F ({F}) in groups of {INT4_GROUP}")
        if not X:
            raise ValueError(f"expert_TX has shape {self.expert_TX.shape}; choose one at least")
        halves = 2 if is_int4 else 1
        expected: dict[str, tuple[jax.Array, tuple[int, ...]]] = {
            "w_gate_EDF": (self.w_gate, (*stack, E, D // halves, F)),
            "w_up_EDF": (self.w_up, (*stack, E, D // halves, F)),
            "w_down_EFD": (self.w_down, (*stack, E, F // halves, D)),
            "expert_TX": (self.expert_TX, (T, X)),
            "gate_TX": (self.gate_TX, (T, X)),
        }
        if self.shared_TD is not None:
            expected["shared_TD"] = (self.shared_TD, (T, D))
        if self.scales is not None:
            ins, out = ((D // INT4_GROUP,), (F // INT4_GROUP,)) if is_int4 else ((), ())
            expected["weight_scales.gate"] = (self.scales.gate, (*stack, E, *ins, F))
            expected["weight_scales.up"] = (self.scales.up, (*stack, E, *ins, F))
            expected["weight_scales.down"] = (self.scales.down, (*stack, E, *out, D))
        for name, (array, shape) in expected.items():
            if array.shape != shape:
                raise ValueError(
                    f"{name} has shape {array.shape}; x_TD {self.x_TD.shape} asks for {shape}"
                )

    def _check_dtypes(self) -> None:
        dtypes = {w.dtype for w in (self.w_gate, self.w_up, self.w_down)}
        if len(dtypes) > 1:
            raise ValueError(f"the matrices are of {sorted(map(str, dtypes))}; give them one dtype")
        (dtype,), rows = dtypes, self.x_TD.dtype
        is_quantized = dtype in (jnp.int8, jnp.float8_e4m3fn)
        if is_quantized != (self.scales is not None):
            remedy = "needs weight_scales" if is_quantized else "takes no weight_scales"
            raise ValueError(f"a matrix of {dtype} {remedy}")
        if not is_quantized and dtype != rows:
            raise ValueError(f"x_TD is {rows} and the matrices {dtype}; cast one of them")
        if self.shared_TD is not None and self.shared_TD.dtype != rows:
            raise ValueError(f"x_TD is {rows} and shared_TD {self.shared_TD.dtype}; cast one")
        if not jnp.issubdtype(self.expert_TX.dtype, jnp.integer):
            raise ValueError(f"expert_TX is {self.expert_TX.dtype}; experts are whole numbers")


class Inputs(NamedTuple):
    """The arrays of one call; see `api.expert_mlp`.

    The matrices are those of several layers, flattened: expert e's are number first + e.
    """

    x_TD: jax.Array
    w_gate_NDF: jax.Array
    w_up_NDF: jax.Array
    w_down_NFD: jax.Array
    expert_TX: jax.Array
    gate_TX: jax.Array
    first: jax.Array
    shared_TD: jax.Array | None
    scales: WeightScales | None

    def matrices(self, *names: str) -> tuple[list[jax.Array], list[jax.Array] | None]:
        """Return the matrices called gate, up or down, and their scales if they are quantised."""
        every = {"gate": self.w_gate_NDF, "up": self.w_up_NDF, "down": self.w_down_NFD}
        scales = None
        if self.scales is not None:
            scales = [getattr(self.scales, name) for name in names]
        return [every[name] for name in names], scales


def stored_as(x: Inputs) -> Literal["float", "int8", "int4", "fp8"]:
    """Return how the matrices are stored."""
    if x.scales is None:
        return "float"
    if x.w_gate_NDF.dtype == jnp.float8_e4m3fn:
        return "fp8"
    return "int4" if x.scales.gate.ndim == 3 else "int8"


def among_layers(dw_EDF: jax.Array, first: jax.Array, w_NDF: jax.Array) -> jax.Array:
    """Place the gradients of E matrices among zeros for those of other layers, in their dtype."""
    dw_EDF = dw_EDF.astype(w_NDF.dtype)
    if dw_EDF.shape == w_NDF.shape:
        return dw_EDF
    return jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(w_NDF), dw_EDF, first, axis=0)


@contextlib.contextmanager
def cost_hint(*, occupancy: float) -> Iterator[None]:
    """Let kernels estimate their cost as if this share of the routed rows had an expert.

    Rows without one cost nothing, but a static estimate cannot see how many those are. Whoever
    sizes a buffer for more rows than it expects knows better.
    """
    with _held(occupancy):
        yield


def occupancy_hint() -> float:
    """Return the occupancy in force, for what is traced later."""
    return _held.value


def expected_rows(num_rows: int) -> int:
    """Return how many of the routed rows are expected to have an expert, one at least."""
    return max(1, round(num_rows * _held.value))
