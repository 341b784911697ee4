"""Others' mixtures of experts from the same arrays, and dense products of as many FLOPs."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import ops as megablox

from experiments.benchmark.expert_work import MEGABLOX_TILES, megablox_work
from experiments.benchmark.peers import Peer
from kernels_pallas.shapes import Experts

DENSE_ROWS = 256  # from which one expert for all rows is a fair measure; fewer rows are bytes
RAGGED_EXPERTS = 16  # up to which XLA's grouped product, which may be dense over experts, is tried


def of_experts(shape: Experts) -> tuple[Peer, ...]:
    """List what to compare `expert_mlp` with on a shape."""
    if shape.stored != "float" or shape.padding:
        return ()
    found = []
    if shape.D % 128 == 0 and shape.F % 128 == 0:
        found.append(
            Peer(
                name="megablox",
                platforms=("tpu",),
                function=functools.partial(_pipeline, _megablox),
                work=functools.partial(megablox_work, shape),
            )
        )
    if shape.E <= RAGGED_EXPERTS:
        ragged = functools.partial(_pipeline, jax.lax.ragged_dot)
        found.append(Peer(name="ragged_dot", platforms=("cpu", "gpu"), function=ragged))
    if shape.T * shape.X >= DENSE_ROWS:
        found.append(
            Peer(
                name="dense",
                platforms=("cpu", "gpu", "tpu"),
                function=_dense,
                arrays=_of_one_expert,
                computes_the_same=False,
            )
        )
    return tuple(found)


def _pipeline(
    product: Callable[..., jax.Array],
    x_TD: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    *,
    expert_TX: jax.Array,
    gate_TX: jax.Array,
    shared_TD: jax.Array | None = None,
) -> jax.Array:
    """Gather, three grouped products, scatter."""
    X, E = expert_TX.shape[1], w_gate_EDF.shape[0]
    order_R = jnp.argsort(expert_TX.reshape(-1))
    sizes_E = jnp.bincount(expert_TX.reshape(-1), length=E).astype(jnp.int32)
    rows_RD = x_TD[order_R // X] * gate_TX.reshape(-1)[order_R][:, None]
    a_RF, b_RF = (product(rows_RD, w, sizes_E) for w in (w_gate_EDF, w_up_EDF))
    y_RD = product(jax.nn.silu(a_RF) * b_RF, w_down_EFD, sizes_E)
    y_TD = jnp.zeros_like(x_TD) if shared_TD is None else shared_TD
    return y_TD.at[order_R // X].add(y_RD)


def _megablox(x_RK: jax.Array, w_EKM: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """jax's grouped product, with the tiles that MaxText gives it."""
    R, (most, *sides) = x_RK.shape[0], MEGABLOX_TILES
    rows = min(most, -(-R // 16) * 16)
    x_PK = jnp.pad(x_RK, ((0, -R % rows), (0, 0)))
    return megablox.gmm(x_PK, w_EKM, sizes_E, x_RK.dtype, (rows, *sides))[:R]


def _of_one_expert(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return as many rows as are routed, and the matrices of one expert."""
    kept = {name: w[0] for name, w in arrays.items() if name.startswith("w_")}
    X = arrays["expert_TX"].shape[1]
    gate_R = arrays["gate_TX"].reshape(-1, 1)
    return {"x_TD": jnp.repeat(arrays["x_TD"], X, axis=0), "gate_TX": gate_R, **kept}


def _dense(x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, gate_TX) -> jax.Array:
    """Take all rows through the same matrices [D, F], [F, D]."""
    z_TD = x_TD * gate_TX
    return (jax.nn.silu(z_TD @ w_gate_EDF) * (z_TD @ w_up_EDF)) @ w_down_EFD
