"""Decode attention in plain XLA: row by row, block by block, over the slots that are seen.

A row's cache is a list of pages; without a page table it is one page. Small pages make up a block
together, large ones are cut into blocks. The loop over blocks has its bounds from the lengths,
known only at run time, so an empty cache costs nothing however long.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.attention.reference import Partial, dot_f32
from kernels_pallas.attention.visibility import (
    NEGATIVE,
    Settings,
    attention_temperature,
    visible,
)
from kernels_pallas.backend import vary_alike
from kernels_pallas.decode.inputs import Inputs, slots_seen

BLOCK = 512


def unsupported_reason(x: Inputs, how: Settings) -> None:
    """Refuse nothing."""


def forward(x: Inputs, how: Settings, *, out_dtype: jax.typing.DTypeLike):
    """Attend. Returns out_BTNH in out_dtype and lse_BTN in float32."""
    with jax.named_scope("decode_attention"):
        return attend(x, how, out_dtype=out_dtype, slots=BLOCK)


def attend(x: Inputs, how: Settings, *, out_dtype: jax.typing.DTypeLike, slots: int):
    """Attend by so many slots at a time, however many queries a row has; see `forward`."""
    x = x.in_pages()
    (B, T, N, H), (_, page, K, _) = x.q_BTNH.shape, x.k_BSKH.shape
    table_BP = x.page_table_BP
    assert table_BP is not None
    pages = max(min(slots // page, table_BP.shape[1]), 1)  # that are read together, a span
    span = pages * page
    block = min(slots, span)
    blocks = -(-span // block)  # of a span
    table_BP = jnp.pad(table_BP, ((0, 0), (0, -table_BP.shape[1] % pages)))
    # Heads before slots, as a cache is best stored: then these swaps cancel the caller's.
    k_PKSH, v_PKSH = x.k_BSKH.swapaxes(1, 2), x.v_BSKH.swapaxes(1, 2)
    k_scale_PKS = None if x.k_scale_BSK is None else x.k_scale_BSK.swapaxes(1, 2)
    v_scale_PKS = None if x.v_scale_BSK is None else x.v_scale_BSK.swapaxes(1, 2)
    begin_B, end_B = slots_seen(x, how)

    def number(slot: jax.Array) -> jax.Array:
        """Return the block that holds a slot."""
        return slot // span * blocks + slot % span // block

    def of_row(q_TNH, positions_T, table_P, start, begin, end):
        q_KGTH = q_TNH.reshape(T, K, N // K, H).transpose(1, 2, 0, 3)
        scale_T = jnp.full((T,), how.scale, jnp.float32)
        if how.temperature is not None:
            scale_T *= attention_temperature(positions_T, how.temperature)

        def add(i: jax.Array, seen: Partial) -> Partial:
            # The last block of a span starts early enough to be whole.
            wanted = i % blocks * block
            first = jnp.minimum(wanted, span - block)

            def part(x_PKS: jax.Array) -> jax.Array:
                if pages == 1:
                    at = (table_P[i // blocks], 0, first) + (0,) * (x_PKS.ndim - 3)
                    return jax.lax.dynamic_slice(x_PKS, at, (1, K, block, *x_PKS.shape[3:]))[0]
                ids = jax.lax.dynamic_slice(table_P, (i * pages,), (pages,))
                read = x_PKS.at[ids].get(mode="clip").swapaxes(0, 1)
                return read.reshape(K, block, *x_PKS.shape[3:])

            slot_S = first + jnp.arange(block)
            is_new_S = slot_S >= wanted
            slot_S += i // blocks * span
            held_S = is_new_S & (slot_S >= begin) & (slot_S < end)
            mask_TS = held_S & visible(
                positions_T[:, None], start + slot_S[None], None, None, how.chunk_size
            )
            k_KSH, v_KSH = (part(a).astype(q_TNH.dtype) for a in (k_PKSH, v_PKSH))
            logits_KGTS = dot_f32("KGTH,KSH->KGTS", q_KGTH, k_KSH) * scale_T[:, None]
            if k_scale_PKS is not None:
                logits_KGTS *= part(k_scale_PKS)[:, None, None]

            def weigh(weights_KGTS: jax.Array) -> jax.Array:
                if v_scale_PKS is not None:
                    weights_KGTS *= jnp.where(held_S, part(v_scale_PKS), 0)[:, None, None]
                clean_KSH = jnp.where(held_S[:, None], v_KSH, 0)
                return dot_f32("KGTS,KSH->KGTH", weights_KGTS.astype(v_KSH.dtype), clean_KSH)

            return seen.add(jnp.where(mask_TS, logits_KGTS, NEGATIVE), weigh)

        nothing, _ = vary_alike((Partial.nothing(*q_KGTH.shape), q_KGTH))
        stop = jnp.where(end > begin, number(end - 1) + 1, 0)
        out_KGTH, lse_KGT = jax.lax.fori_loop(number(begin), stop, add, nothing).finish()
        out_TKGH = out_KGTH.transpose(2, 0, 1, 3)
        return out_TKGH.reshape(T, N, H).astype(out_dtype), lse_KGT.transpose(2, 0, 1)

    rows = (x.q_BTNH, x.q_positions_BT, table_BP, x.kv_start_B, begin_B, end_B)
    out_BTNH, lse_BTKG = jax.lax.map(lambda row: of_row(*row), rows)
    return out_BTNH, lse_BTKG.reshape(B, T, N)
