"""Experts sharded over devices: every row is dispatched to the device of its expert, and returned.

A device keeps a send buffer of rows for each of its peers. In a round it sends the next rows of
every buffer, as many as fit, applies its own experts to what it received, and returns the results.
There are as many rounds as the fullest buffer of any device needs, which is known at run time only:
one when tokens choose evenly, more when they do not. So nothing is dropped, and no buffer is sized
for the worst case.

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

from kernels_pallas import backend as at_hand
from kernels_pallas.backend import Backend, vary_alike
from kernels_pallas.experts.api import expert_mlp
from kernels_pallas.experts.dispatch import sort_rows
from kernels_pallas.experts.inputs import Arguments, WeightScales, cost_hint
from kernels_pallas.experts.tpu_remote import exchange

Axes = str | tuple[str, ...]
Transport = Literal["xla", "dma"]
_LEAST_ROWS = 16  # of a send buffer: rows of a tile of memory, to which copies are padded anyway
_SPREAD = 5  # square roots of the mean, by which no buffer exceeds it where routing is even


class _Static(NamedTuple):
    """The static arguments of a call."""

    axes: Axes
    num_local: int
    load_factor: float
    backend: Backend | None
    transport: Transport

    def rows(self, num_routed: int) -> int:
        """Return the most rows of a send buffer that leave in one round."""
        return buffer_rows(num_routed, jax.lax.axis_size(self.axes), self.load_factor)

    def occupancy(self, num_routed: int) -> float:
        """Return the share of a round's places that have a row on the mean device."""
        return min(1.0, num_routed / (jax.lax.axis_size(self.axes) * self.rows(num_routed)))


def buffer_rows(num_routed: int, peers: int, load_factor: float) -> int:
    """Return the rows of a send buffer: `load_factor` times the mean, or more if those are few.

    Where rows choose evenly, the numbers that go to a peer spread by the square root of their mean,
    and it is the largest among peers x peers of them that asks for another round.
    """
    mean = num_routed / peers
    rows = max(1, math.ceil(load_factor * mean))
    if load_factor >= 1:
        rows = max(rows, _LEAST_ROWS, math.ceil(mean + _SPREAD * math.sqrt(mean)))
    return min(num_routed, rows)


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
    """Apply experts that are sharded over mesh axes to tokens that are sharded over the same.

    Call it inside `jax.shard_map`, on one device's tokens and experts: device i of the axes has the
    experts i * E to (i + 1) * E - 1. Differentiable as `expert_mlp` is; the gradient repeats the
    dispatch and the products of the forward pass and keeps nothing.

    Args:
        x_TD: this device's tokens.
        w_gate_EDF, w_up_EDF, w_down_EFD: this device's matrices, E of them.
        expert_TX: int32 chosen experts among those of all devices; another id contributes nothing.
        gate_TX: gate of each choice.
        axes: mesh axes that shard both.
        shared_TD: what to add to the result.
        weight_scales: scales of this device's quantised matrices.
        group: int32 scalar; see `expert_mlp`.
        load_factor: rows of a send buffer, of which there is one for each device, relative to T * X
            / devices, the mean. From 1 on a buffer also holds what even routing may bring: 16 rows,
            and the mean and 5 of its square roots. Below 1 buffers are smaller and rounds more.
        backend: of the products; "tpu" or None for "dma".
        transport: "xla" for collectives, "dma" for the TPU kernel, which has products of its own;
            the gradient goes by collectives.

    Returns:
        y_TD in the dtype of x.

    Raises:
        ValueError: shapes or dtypes disagree, the load factor is no positive number, or there is no
            such transport.
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
    plan = _Static(axes, given.w_gate.shape[-3], load_factor, backend, transport)
    routed = vary_alike(given._replace(shared_TD=None))
    if transport == "dma":
        _check_dma(plan, routed)
    with jax.named_scope("expert_mlp_parallel"):
        y_TD = _apply(plan, routed)
    return y_TD if given.shared_TD is None else y_TD + given.shared_TD


def _check_dma(plan: _Static, given: Arguments) -> None:
    """Raise if the kernel cannot take these arrays here."""
    peers, rows = jax.lax.axis_size(plan.axes), plan.rows(given.expert_TX.size)
    reason = exchange.unsupported_reason(
        peers, rows, given.w_gate, plan.num_local, given.x_TD.dtype
    )
    if plan.backend not in (None, "tpu"):
        reason = f"it has products of its own, so that backend {plan.backend!r} cannot be obeyed"
    reason = reason or at_hand.other_device("tpu")
    if reason is not None:
        raise NotImplementedError(
            f"transport 'dma' of experts refuses: {reason}; 'xla' takes whatever `expert_mlp` does"
        )


class _Buffers(NamedTuple):
    """This device's send buffers: rows in the order in which they leave, by device and expert.

    Attributes:
        order_R: routed row of each row in that order.
        begin_P, length_P: where the buffer of each peer begins, and how many rows it is to have.
        peer_R, place_R: to which peer each routed row goes, and its place among all rows that do;
            a place of -1 if it goes to none.
        rows: most rows of a buffer that leave in one round.
        rounds: int32, the same on all devices.
    """

    order_R: jax.Array
    begin_P: jax.Array
    length_P: jax.Array
    peer_R: jax.Array
    place_R: jax.Array
    rows: int
    rounds: jax.Array

    @staticmethod
    def of(plan: _Static, given: Arguments) -> "_Buffers":
        """Sort the rows of this device, and agree with all others on the number of rounds."""
        peers, expert_TX = jax.lax.axis_size(plan.axes), given.expert_TX
        order_R, sizes_E = sort_rows(expert_TX, peers * plan.num_local)
        length_P = sizes_E.reshape(peers, plan.num_local).sum(1)
        begin_P = jnp.cumsum(length_P) - length_P
        peer_R = expert_TX.reshape(-1) // plan.num_local
        goes_R, peer_R = (peer_R >= 0) & (peer_R < peers), jnp.clip(peer_R, 0, peers - 1)
        place_R = jnp.where(goes_R, jnp.argsort(order_R) - begin_P[peer_R], -1)
        rows = plan.rows(expert_TX.size)
        rounds = _largest_anywhere(-(-length_P.max() // rows))
        return _Buffers(order_R, begin_P, length_P, peer_R, place_R, rows, rounds)

    def leaving(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return which routed rows leave in a round, [P, rows], and where there are any.

        A place without one has the last row of its buffer: nothing there is NaN unless that is.
        """
        place = number * self.rows + jnp.arange(self.rows)[None]
        begin_P1, length_P1 = self.begin_P[:, None], self.length_P[:, None]
        last_or_it = begin_P1 + jnp.minimum(place, length_P1 - 1)
        return self.order_R[jnp.maximum(last_or_it, 0)], place < length_P1

    def returned(self, number: jax.Array, results: jax.Array, all_RD: jax.Array) -> jax.Array:
        """Put results of a round, [P, rows, D], where its rows are among all routed ones."""
        place_R = self.place_R - number * self.rows
        is_here_R = (self.place_R >= 0) & (place_R >= 0) & (place_R < self.rows)
        flat = results.reshape(-1, results.shape[2]).astype(all_RD.dtype)
        found_RD = flat[jnp.where(is_here_R, self.peer_R * self.rows + place_R, 0)]
        return jnp.where(is_here_R[:, None], found_RD, all_RD)


def _largest_anywhere(number: jax.Array) -> jax.Array:
    """Return the largest of a number on all devices that run this program.

    Devices that exchange no rows must take as many rounds, too: all enter each collective.
    """
    axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    lacking = tuple(sorted(set(axes) - set(jax.typeof(number).manual_axis_type.varying)))
    return jax.lax.pmax(jax.lax.pcast(number, lacking, to="varying") if lacking else number, axes)


def _exchange(x_PR: jax.Array, axes: Axes) -> jax.Array:
    """Send part p to device p; what comes is in the order of the senders."""
    return jax.lax.all_to_all(x_PR, axes, split_axis=0, concat_axis=0, tiled=True)


class _Round(NamedTuple):
    """Rows of one round: by peer, or flat over the peers where they are computed."""

    x_RD: jax.Array
    gate_R1: jax.Array
    expert_R1: jax.Array


def _leaving(plan: _Static, given: Arguments, buffers: _Buffers, number: jax.Array) -> _Round:
    """Collect the rows of a round by peer; a place without a row has expert -1."""
    routed_PR, is_row = buffers.leaving(number)
    local_PR = given.expert_TX.reshape(-1)[routed_PR] % plan.num_local
    return _Round(
        given.x_TD[routed_PR // given.expert_TX.shape[1]],
        given.gate_TX.reshape(-1)[routed_PR],
        jnp.where(is_row, local_PR, -1),
    )


def _dispatched(plan: _Static, given: Arguments, buffers: _Buffers, number: jax.Array) -> _Round:
    """Bring the rows of a round to their experts."""
    x, gate, expert = (_exchange(a, plan.axes) for a in _leaving(plan, given, buffers, number))
    return _Round(x.reshape(-1, x.shape[2]), gate.reshape(-1, 1), expert.reshape(-1, 1))


def _local(plan: _Static, given: Arguments, here: _Round, *floats: jax.Array) -> jax.Array:
    x_RD, gate_R1, *weights = floats
    return expert_mlp(
        x_RD,
        *weights,
        expert_TX=here.expert_R1,
        gate_TX=gate_R1,
        weight_scales=given.scales,
        group=given.group,
        backend=plan.backend,
    )


def _round(plan: _Static, given: Arguments, buffers: _Buffers, number: jax.Array) -> jax.Array:
    """Take the rows of a round to their experts and return the results; by peer."""
    if plan.transport == "dma":
        first = jnp.int32(0) if given.group is None else given.group * plan.num_local
        gate, up, down = (w.reshape(-1, *w.shape[-2:]) for w in given[1:4])
        rows = _leaving(plan, given, buffers, number)
        how = {"num_local": plan.num_local, "axes": plan.axes}
        return exchange.exchange_and_apply(*rows, gate, up, down, first, **how)
    here = _dispatched(plan, given, buffers, number)
    return _back(plan, buffers, _local(plan, given, here, here.x_RD, here.gate_R1, *given[1:4]))


def _back(plan: _Static, buffers: _Buffers, rows: jax.Array) -> jax.Array:
    """Return results [P * rows, ...] of a round to where their rows came from; by peer."""
    return _exchange(rows.reshape(-1, buffers.rows, rows.shape[1]), plan.axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(plan: _Static, given: Arguments) -> jax.Array:
    buffers, (T, X), D = _Buffers.of(plan, given), given.expert_TX.shape, given.x_TD.shape[1]

    def body(number: jax.Array, y_RD: jax.Array) -> jax.Array:
        return buffers.returned(number, _round(plan, given, buffers, number), y_RD)

    with cost_hint(occupancy=plan.occupancy(T * X)):
        zeros_RD = jnp.zeros_like(given.x_TD, shape=(T * X, D))
        y_RD = jax.lax.fori_loop(0, buffers.rounds, body, zeros_RD)
    return y_RD.reshape(T, X, D).sum(1)


def _apply_fwd(plan: _Static, given: Arguments) -> tuple[jax.Array, Arguments]:
    return _apply(plan, given), given


def _round_bwd(
    plan: _Static, given: Arguments, buffers: _Buffers, number: jax.Array, dy_TD: jax.Array
) -> tuple[jax.Array, jax.Array, Sequence[jax.Array]]:
    """Return the gradients of a round: of rows and gates by peer, and of matrices."""
    here = _dispatched(plan, given, buffers, number)
    dy_PRD = dy_TD[buffers.leaving(number)[0] // given.expert_TX.shape[1]]
    dy_RD = _exchange(dy_PRD, plan.axes).reshape(-1, dy_TD.shape[1])
    local = functools.partial(_local, plan, given, here)
    _, pull = jax.vjp(local, here.x_RD, here.gate_R1, *given[1:4])
    dx, dgate, *d_weights = pull(dy_RD)
    return _back(plan, buffers, dx), _back(plan, buffers, dgate), d_weights


def _apply_bwd(plan: _Static, given: Arguments, dy_TD: jax.Array) -> tuple[Arguments]:
    buffers, (T, X), D = _Buffers.of(plan, given), given.expert_TX.shape, given.x_TD.shape[1]
    weights = given[1:4]

    def body(number: jax.Array, carry: Any) -> Any:
        dx_RD, dgate_R1, d_weights = carry
        dx, dgate, more = _round_bwd(plan, given, buffers, number, dy_TD)
        return (
            buffers.returned(number, dx, dx_RD),
            buffers.returned(number, dgate, dgate_R1),
            [total + part for total, part in zip(d_weights, more, strict=True)],
        )

    zeros = (
        jnp.zeros_like(given.x_TD, shape=(T * X, D)),
        jnp.zeros_like(given.gate_TX, shape=(T * X, 1)),
        [jnp.zeros_like(w, jnp.float32) for w in weights],
    )
    with cost_hint(occupancy=plan.occupancy(T * X)):
        dx_RD, dgate_R1, d_weights = jax.lax.fori_loop(0, buffers.rounds, body, zeros)
    dx_TD, dgate_TX = dx_RD.reshape(T, X, D).sum(1), dgate_R1.reshape(T, X)
    d_weights = (dw.astype(w.dtype) for dw, w in zip(d_weights, weights, strict=True))
    gradients: Any = (dx_TD, *d_weights, None, dgate_TX, None, None, None)
    return (Arguments(*gradients),)


_apply.defvjp(_apply_fwd, _apply_bwd)
