"""Experts divided over devices: every row travels to the device of its expert, and back.

A device keeps a queue of rows for each of its peers. In a round it sends the next rows of every
queue, at most `load_factor` times what each would be if all were equally long, applies its own
experts to what it received, and sends the results back. There are as many rounds as the longest
queue of any device needs, which is known at run time only: one when tokens choose evenly, more when
they do not. So nothing is dropped, and no buffer is sized for the worst case.

A round goes by XLA's collectives, with the products between them; or, on TPUs, all of a forward
round is one kernel (`tpu_remote`) that multiplies what has arrived while the rest is under way.
Gradients go by collectives.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from kernels_pallas.backend import Backend, device_kind, is_interpreting, platform, vary_alike
from kernels_pallas.experts.api import expert_mlp
from kernels_pallas.experts.dispatch import Dispatch, combine_sorted, sort_rows
from kernels_pallas.experts.inputs import Arguments, WeightScales, expecting
from kernels_pallas.experts.tpu_remote import exchange

Axes = str | tuple[str, ...]
Transport = Literal["xla", "dma"]


class _Plan(NamedTuple):
    """The static arguments of a call."""

    axes: Axes
    num_local: int
    load_factor: float
    backend: Backend | None
    transport: Transport

    def rows(self, num_routed: int) -> int:
        """Return the most rows of a queue that leave in one round."""
        peers = jax.lax.axis_size(self.axes)
        return min(num_routed, math.ceil(self.load_factor * num_routed / peers))

    def share(self, num_routed: int) -> float:
        """Return the share of a round's places that have a row on the mean device."""
        return min(1.0, num_routed / (jax.lax.axis_size(self.axes) * self.rows(num_routed)))


class _Arrays(NamedTuple):
    """What a call may be differentiated in, and the rest."""

    x_TD: jax.Array
    w_gate: jax.Array
    w_up: jax.Array
    w_down: jax.Array
    gate_TX: jax.Array
    expert_TX: jax.Array
    scales: WeightScales | None
    group: jax.Array | None


def expert_mlp_parallel(
    x_TD: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    *,
    expert_TX: jax.Array,
    gate_TX: jax.Array,
    axes: Axes,
    shared_TD: jax.Array | None = None,
    weight_scales: WeightScales | None = None,
    group: jax.Array | None = None,
    load_factor: float = 1.25,
    backend: Backend | None = None,
    transport: Transport = "xla",
) -> jax.Array:
    """Apply experts that are divided over mesh axes to tokens that are divided over the same.

    Call it inside `jax.shard_map`, on one device's tokens and experts: device i of the axes has the
    experts i * E to (i + 1) * E - 1. Differentiable as `expert_mlp` is; the gradient repeats the
    journey and the products of the forward pass and keeps nothing.

    Args:
        x_TD: this device's tokens.
        w_gate_EDF, w_up_EDF, w_down_EFD: this device's matrices, E of them.
        expert_TX: int32 chosen experts among those of all devices; another id contributes nothing.
        gate_TX: gate of each choice.
        axes: mesh axes that divide both.
        shared_TD: what to add to the result.
        weight_scales: scales of this device's quantised matrices.
        group: int32 scalar; see `expert_mlp`.
        load_factor: rows that may travel from a device to another in one round, relative to T * X /
            devices, the mean.
        backend: of the products; "tpu" or None for "dma".
        transport: "xla" for collectives, "dma" for the TPU kernel, which has products of its own;
            the gradient goes by collectives.

    Returns:
        y_TD in the dtype of x.

    Raises:
        ValueError: shapes or dtypes disagree, the load factor is no positive number, or nobody
            knows the transport.
        NotImplementedError: the named backend or transport cannot take these arrays here.
    """
    if not 0 < load_factor < math.inf:
        raise ValueError(
            f"load_factor ({load_factor}) must be a positive number; 1.25 is the default"
        )
    if transport not in get_args(Transport):
        raise ValueError(f"transport {transport!r} is unknown; choose from xla, dma")
    given = Arguments.checked(
        x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, expert_TX, gate_TX, shared_TD, weight_scales, group
    )
    if not given.x_TD.size:
        return given.x_TD
    plan = _Plan(axes, given.w_gate.shape[-3], load_factor, backend, transport)
    arrays = vary_alike(_Arrays(*(getattr(given, name) for name in _Arrays._fields)))
    if transport == "dma":
        _check_dma(plan, arrays)
    with jax.named_scope("expert_mlp_parallel"):
        y_TD = _apply(plan, arrays)
    return y_TD if given.shared_TD is None else y_TD + given.shared_TD


def _check_dma(plan: _Plan, arrays: _Arrays) -> None:
    """Raise if the kernel cannot take these arrays here."""
    peers, rows = jax.lax.axis_size(plan.axes), plan.rows(arrays.expert_TX.size)
    w_gate, dtype = arrays.w_gate, arrays.x_TD.dtype
    reason = exchange.refusal(peers, rows, w_gate, plan.num_local, dtype)
    if plan.backend not in (None, "tpu"):
        reason = f"it has products of its own, so that backend {plan.backend!r} cannot be obeyed"
    if reason is None and not is_interpreting() and platform() != "tpu":
        reason = f"it needs a TPU, and this is {device_kind()}"
    if reason is not None:
        raise NotImplementedError(
            f"transport 'dma' of experts refuses: {reason}; 'xla' takes whatever `expert_mlp` does"
        )


class _Queues(NamedTuple):
    """This device's rows in the order in which they leave: by device, then by expert.

    Attributes:
        to: the order of rows.
        begin_P, length_P: where the queue of each peer begins, and how long it is.
        rows: most rows of a queue that leave in one round.
        rounds: int32, the same on all devices.
    """

    to: Dispatch
    begin_P: jax.Array
    length_P: jax.Array
    rows: int
    rounds: jax.Array

    @staticmethod
    def of(plan: _Plan, expert_TX: jax.Array) -> "_Queues":
        peers = jax.lax.axis_size(plan.axes)
        to = sort_rows(expert_TX, peers * plan.num_local)
        length_P = to.group_sizes_E.reshape(peers, plan.num_local).sum(1)
        rows = plan.rows(expert_TX.size)
        rounds = jax.lax.pmax(-(-length_P.max() // rows), plan.axes)
        return _Queues(to, jnp.cumsum(length_P) - length_P, length_P, rows, rounds)

    def leaving(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return which sorted rows leave in a round, [P, rows], and where there are any.

        A place without one has the last row of its queue: nothing there is NaN unless that is.
        """
        place = number * self.rows + jnp.arange(self.rows)[None]
        begin_P1, length_P1 = self.begin_P[:, None], self.length_P[:, None]
        last_or_it = begin_P1 + jnp.minimum(place, length_P1 - 1)
        return jnp.maximum(last_or_it, 0), place < length_P1


def _exchange(x_PR: jax.Array, axes: Axes) -> jax.Array:
    """Send part p to device p; what comes back is in the order of the senders."""
    return jax.lax.all_to_all(x_PR, axes, split_axis=0, concat_axis=0, tiled=True)


class _Round(NamedTuple):
    """Rows of one round: by peer, or flat over the peers where they are computed."""

    x_RD: jax.Array
    gate_R1: jax.Array
    expert_R1: jax.Array


def _leaving(plan: _Plan, arrays: _Arrays, queues: _Queues, number: jax.Array) -> _Round:
    """Collect the rows of a round by peer; a place without a row has expert -1."""
    X = arrays.expert_TX.shape[1]
    sorted_PR, is_row = queues.leaving(number)
    routed_PR = queues.to.order_R[sorted_PR]
    local_PR = arrays.expert_TX.reshape(-1)[routed_PR] % plan.num_local
    return _Round(
        arrays.x_TD[routed_PR // X],
        arrays.gate_TX.reshape(-1)[routed_PR],
        jnp.where(is_row, local_PR, -1),
    )


def _send(plan: _Plan, arrays: _Arrays, queues: _Queues, number: jax.Array) -> _Round:
    """Bring the rows of a round to their experts."""
    x, gate, expert = (_exchange(a, plan.axes) for a in _leaving(plan, arrays, queues, number))
    return _Round(x.reshape(-1, x.shape[2]), gate.reshape(-1, 1), expert.reshape(-1, 1))


def _local(plan: _Plan, arrays: _Arrays, here: _Round, x_RD, gate_R1, *weights) -> jax.Array:
    return expert_mlp(
        x_RD,
        *weights,
        expert_TX=here.expert_R1,
        gate_TX=gate_R1,
        weight_scales=arrays.scales,
        group=arrays.group,
        backend=plan.backend,
    )


def _flat(plan: _Plan, arrays: _Arrays) -> tuple[jax.Array, ...]:
    """Return the matrices of all groups, and the number of this group's first ones."""
    first = jnp.int32(0) if arrays.group is None else arrays.group * plan.num_local
    return *(w.reshape(-1, *w.shape[-2:]) for w in arrays[1:4]), first


def _round_trip(plan: _Plan, arrays: _Arrays, queues: _Queues, number: jax.Array) -> jax.Array:
    """Take the rows of a round to their experts and back; by peer."""
    if plan.transport == "dma":
        rows = _leaving(plan, arrays, queues, number)
        return exchange.exchange_and_apply(
            *rows, *_flat(plan, arrays), num_local=plan.num_local, axes=plan.axes
        )
    here = _send(plan, arrays, queues, number)
    y = _local(plan, arrays, here, here.x_RD, here.gate_R1, *arrays[1:4])
    return _back(plan, queues, y)


def _back(plan: _Plan, queues: _Queues, rows: jax.Array) -> jax.Array:
    """Send results [P * rows, ...] of a round back; by peer."""
    return _exchange(rows.reshape(-1, queues.rows, rows.shape[1]), plan.axes)


def _place(queues: _Queues, number: jax.Array, home: jax.Array, all_rows: jax.Array) -> jax.Array:
    """Put results of a round into their places among the sorted rows."""
    sorted_PR, is_row = queues.leaving(number)
    places = jnp.where(is_row, sorted_PR, all_rows.shape[0])
    return all_rows.at[places].set(home.astype(all_rows.dtype), mode="drop")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(plan: _Plan, arrays: _Arrays) -> jax.Array:
    queues = _Queues.of(plan, arrays.expert_TX)

    def body(number: jax.Array, y_RD: jax.Array) -> jax.Array:
        return _place(queues, number, _round_trip(plan, arrays, queues, number), y_RD)

    nothing = jnp.zeros_like(arrays.x_TD, shape=(arrays.expert_TX.size, arrays.x_TD.shape[1]))
    with expecting(plan.share(arrays.expert_TX.size)):
        y_RD = jax.lax.fori_loop(0, queues.rounds, body, nothing)
    return combine_sorted(y_RD, queues.to, arrays.expert_TX.shape[1])


def _apply_fwd(plan: _Plan, arrays: _Arrays) -> tuple[jax.Array, _Arrays]:
    return _apply(plan, arrays), arrays


def _round_trip_bwd(
    plan: _Plan, arrays: _Arrays, queues: _Queues, number: jax.Array, dy_TD: jax.Array
) -> tuple[jax.Array, jax.Array, Sequence[jax.Array]]:
    """Return the gradients of a round: of rows and gates by peer, and of matrices."""
    weights, X = arrays[1:4], arrays.expert_TX.shape[1]
    dy_PRD = dy_TD[queues.to.order_R[queues.leaving(number)[0]] // X]
    here = _send(plan, arrays, queues, number)
    dy_RD = _exchange(dy_PRD, plan.axes).reshape(-1, dy_TD.shape[1])
    local = functools.partial(_local, plan, arrays, here)
    _, pull = jax.vjp(local, here.x_RD, here.gate_R1, *weights)
    dx, dgate, *d_weights = pull(dy_RD)
    return _back(plan, queues, dx), _back(plan, queues, dgate), d_weights


def _apply_bwd(plan: _Plan, arrays: _Arrays, dy_TD: jax.Array) -> tuple[_Arrays]:
    queues, X = _Queues.of(plan, arrays.expert_TX), arrays.expert_TX.shape[1]
    (R, D), weights = (arrays.expert_TX.size, arrays.x_TD.shape[1]), arrays[1:4]

    def body(number: jax.Array, carry: Any) -> Any:
        dx_RD, dgate_R1, d_weights = carry
        dx, dgate, more = _round_trip_bwd(plan, arrays, queues, number, dy_TD)
        return (
            _place(queues, number, dx, dx_RD),
            _place(queues, number, dgate, dgate_R1),
            [total + part for total, part in zip(d_weights, more, strict=True)],
        )

    nothing = (
        jnp.zeros_like(arrays.x_TD, shape=(R, D)),
        jnp.zeros_like(arrays.gate_TX, shape=(R, 1)),
        [jnp.zeros_like(w, jnp.float32) for w in weights],
    )
    with expecting(plan.share(R)):
        dx_RD, dgate_R1, d_weights = jax.lax.fori_loop(0, queues.rounds, body, nothing)
    d_gate, d_up, d_down = (dw.astype(w.dtype) for dw, w in zip(d_weights, weights, strict=True))
    dx_TD, dgate_TX = (
        combine_sorted(dx_RD, queues.to, X),
        combine_sorted(dgate_R1, queues.to, 1).reshape(-1, X),
    )
    return (_Arrays(dx_TD, d_gate, d_up, d_down, dgate_TX, None, None, None),)  # type: ignore[arg-type]


_apply.defvjp(_apply_fwd, _apply_bwd)
