"""Others' attention that computes the same from the same arrays, to be timed in the same run."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from experiments.benchmark.schedule import BACKWARD, FORWARD, Work, attention_work
from kernels_pallas.attention.visibility import attention_temperature, visible
from kernels_pallas.shapes import Attention, Decode

MAX_SCORES = 1 << 31  # bytes of logits that a peer may hold which holds them all
SPLASH_BLOCKS = {"q": 512, "kv": 1024}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """Another's implementation.

    Attributes:
      name: for the table.
      platforms: where it runs.
      function: of the arrays of the case, by name.
      work: of a pass, what its blocks multiply and copy; None if nobody can tell.
      arrays: makes those that it takes from those of the case; None if they are the same.
      computes_the_same: or else only does as many FLOPs.
    """

    name: str
    platforms: tuple[str, ...]
    function: Callable[..., jax.Array]
    work: Callable[[str], Work | None] | None = None
    arrays: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    computes_the_same: bool = True


def warmed(q_BTNH: jax.Array, positions_BT: jax.Array, temperature) -> jax.Array:
    """Multiply queries with the factor of their position; peers know no temperature."""
    if temperature is None:
        return q_BTNH
    factor_BT = attention_temperature(positions_BT, temperature)
    return (q_BTNH * factor_BT[:, :, None, None]).astype(q_BTNH.dtype)


def of_attention(shape: Attention) -> tuple[Peer, ...]:
    """List who else computes chunked attention on a shape."""
    found: list[Peer] = []
    if shape.return_lse:
        return ()
    if not (shape.segments or shape.padding) and shape.T % (shape.chunk_size or 1) == 0:
        found.append(Peer(name="cudnn", platforms=("gpu",), function=_cudnn(shape)))
    if not shape.padding:
        splash = functools.partial(_splash_work, shape)
        found.append(Peer(name="splash", platforms=("tpu",), function=_splash(shape), work=splash))
        if 4 * shape.B * shape.N * shape.T**2 <= MAX_SCORES:
            found.append(Peer(name="xla", platforms=("cpu", "gpu"), function=_xla(shape)))
    return tuple(found)


def of_decode(shape: Decode) -> tuple[Peer, ...]:
    """List who else computes decode attention on a shape."""
    is_plain = shape.page_size is None and shape.dtype in ("bfloat16", "float32")
    if (
        is_plain
        and not shape.return_lse
        and not shape.lengths
        and not shape.chunk_size
        and shape.S <= 1 << 20
    ):
        return (Peer(name="xla", platforms=("cpu", "gpu", "tpu"), function=_xla_decode(shape)),)
    return ()


def _cudnn(shape: Attention) -> Callable[..., jax.Array]:
    """cuDNN's flash attention. Chunks are rows of a batch, so that its work is the same."""
    chunk = shape.chunk_size or shape.T

    def attend(q_BTNH, k_BSKH, v_BSKH, q_positions_BT, **_):
        q_BTNH = warmed(q_BTNH, q_positions_BT, shape.temperature)
        rows = (x.reshape(-1, chunk, *x.shape[2:]) for x in (q_BTNH, k_BSKH, v_BSKH))
        out = jax.nn.dot_product_attention(*rows, is_causal=shape.is_causal, implementation="cudnn")
        return out.reshape(q_BTNH.shape)

    return attend


def _xla(shape: Attention) -> Callable[..., jax.Array]:
    """XLA's attention with the mask of all pairs."""

    def attend(q_BTNH, k_BSKH, v_BSKH, q_positions_BT, kv_positions_BS, **segments):
        columns = {name: x[:, None, :] for name, x in segments.items() if name.startswith("kv")}
        rows = {name: x[:, :, None] for name, x in segments.items() if name.startswith("q")}
        mask_BTS = visible(
            q_positions_BT[:, :, None],
            kv_positions_BS[:, None, :],
            rows.get("q_segments_BT"),
            columns.get("kv_segments_BS"),
            shape.chunk_size,
        )
        return jax.nn.dot_product_attention(
            warmed(q_BTNH, q_positions_BT, shape.temperature),
            k_BSKH,
            v_BSKH,
            mask=mask_BTS[:, None],
            implementation="xla",
        )

    return attend


def _splash(shape: Attention) -> Callable[..., jax.Array]:
    """jax's splash attention. It skips by a mask that the host makes, O(T^2) there."""
    q_block, kv_block = SPLASH_BLOCKS["q"], SPLASH_BLOCKS["kv"]
    if shape.T < kv_block:
        q_block = kv_block = math.ceil(shape.T / 128) * 128
    missing = -shape.T % kv_block
    T = shape.T + missing

    def mask() -> splash_mask.Mask:
        if not shape.is_causal:
            return splash_mask.FullMask((T, T))
        if shape.chunk_size is None or shape.chunk_size >= T:
            return splash_mask.CausalMask((T, T))
        return splash_mask.ChunkedCausalMask((T, T), shape.chunk_size)

    def attend(q_BTNH, k_BSKH, v_BSKH, q_positions_BT, q_segments_BT=None, **_):
        compute = 512 if kv_block % 512 == 0 else kv_block
        kernel = splash_kernel.make_splash_mha(
            splash_mask.MultiHeadMask([mask()] * shape.N),
            block_sizes=splash_kernel.BlockSizes(
                block_q=q_block, block_kv=kv_block, block_kv_compute=compute,
                block_q_dkv=q_block, block_kv_dkv=kv_block,
                block_kv_dkv_compute=compute,
                block_q_dq=q_block, block_kv_dq=kv_block,
            ),
            head_shards=1,
            q_seq_shards=1,
        )  # fmt: skip
        q = warmed(q_BTNH, q_positions_BT, shape.temperature) / math.sqrt(shape.H)
        q, k, v = (
            jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))).swapaxes(1, 2)
            for x in (q.astype(q_BTNH.dtype), k_BSKH, v_BSKH)
        )
        out: Any
        if q_segments_BT is None and not missing:
            out = jax.vmap(kernel)(q, k, v)
        else:
            ids_BT = jnp.zeros_like(q_positions_BT) if q_segments_BT is None else q_segments_BT
            ids_BT = jnp.pad(ids_BT, ((0, 0), (0, missing)), constant_values=-1)
            out = jax.vmap(kernel)(q, k, v, splash_kernel.SegmentIds(ids_BT, ids_BT))
        return jnp.asarray(out).swapaxes(1, 2)[:, : shape.T]

    return attend


def _splash_work(shape: Attention, direction: str) -> Work | None:
    """Count splash, whose every query head copies its keys for itself."""
    walks = FORWARD if direction == "forward" else BACKWARD
    blocks = {walk.operations[0]: {"blocks": SPLASH_BLOCKS} for walk in walks}
    return attention_work(dataclasses.replace(shape, K=shape.N), direction, "tpu", blocks)


def _xla_decode(shape: Decode) -> Callable[..., jax.Array]:
    """XLA's attention over the whole cache."""

    def attend(q_BTNH, k_BKSH, v_BKSH, q_positions_BT, **_):
        k_BSKH, v_BSKH = k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2)
        mask_BTS = jnp.arange(shape.S) <= q_positions_BT[:, :, None]
        return jax.nn.dot_product_attention(
            warmed(q_BTNH, q_positions_BT, shape.temperature),
            k_BSKH,
            v_BSKH,
            mask=mask_BTS[:, None],
            implementation="xla",
        )

    return attend
