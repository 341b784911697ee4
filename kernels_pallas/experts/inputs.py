"""The arrays of one mixture-of-experts call, and how stored weights stand for real ones."""

import contextlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

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


def stored_as(x: Inputs) -> Literal["float", "int8", "int4", "fp8"]:
    """Return how the matrices are stored."""
    if x.scales is None:
        return "float"
    if x.w_gate_NDF.dtype == jnp.float8_e4m3fn:
        return "fp8"
    return "int4" if x.scales.gate.ndim == 3 else "int8"


@contextlib.contextmanager
def holding(share: float) -> Iterator[None]:
    """Let kernels estimate their cost as if this share of the routed rows had an expert.

    Rows without one cost nothing, but a static estimate cannot see how many those are. Whoever
    sizes a buffer for more rows than it expects knows better.
    """
    with _held(share):
        yield


def expected_rows(num_rows: int) -> int:
    """Return how many of the routed rows are expected to have an expert, one at least."""
    return max(1, round(num_rows * _held.value))
