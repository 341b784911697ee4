"""Routed rows in their places for the GPU kernels.

Empty places hold zeros, and whatever a kernel writes there, it writes beside its own expert's rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.experts.dispatch import Places, arrange, list_blocks


class PlacedRows(NamedTuple):
    """The places of routed rows.

    Attributes:
        places: where rows lie, each expert's at a multiple of a granule.
        blocks_BF: int32 fields of `dispatch.Block`, but the number of its matrix for an expert's;
            then how many blocks there are; padded to 8. Those past that are arbitrary.
    """

    places: Places
    blocks_BF: jax.Array

    @staticmethod
    def of(
        expert_R: jax.Array, num_experts: int, first: jax.Array, *, size: int, granule: int
    ) -> "PlacedRows":
        """Give routed rows their places and blocks.

        Args:
            expert_R: expert of each row; ids outside 0..E-1 get no place.
            num_experts: E.
            first: matrix of expert 0.
            size: rows of a block.
            granule: of which each expert's rows fill a multiple; it divides the size.
        """
        places = arrange(expert_R, num_experts, granule, spare=size - granule)
        fields, total = list_blocks(places, size, unit=granule)
        fields = [first + fields.expert, *fields[1:], jnp.broadcast_to(total, fields.start.shape)]
        blank = [jnp.zeros_like(fields[0])] * (8 - len(fields))
        return PlacedRows(places, jnp.stack([*fields, *blank], 1))

    def spread(self, x_TD: jax.Array, choices: int) -> jax.Array:
        """Copy each routed row's token to its place; empty places are zero."""
        x_PD = x_TD[self.places.source_P // choices]
        return jnp.where(self.places.is_held_P[:, None], x_PD, jnp.zeros((), x_TD.dtype))

    def spread_gates(self, gate_TX: jax.Array) -> jax.Array:
        """Copy each routed row's gate to its place, in float32; those of empty places are zero."""
        gate_P = gate_TX.reshape(-1)[self.places.source_P].astype(jnp.float32)
        return jnp.where(self.places.is_held_P, gate_P, 0.0)

    def gather(self, y_APD: jax.Array, choices: int) -> jax.Array:
        """Add up parts and each token's choices in float32; one of no expert adds nothing."""
        place_R = self.places.place_R
        y_ARD = y_APD[:, jnp.maximum(place_R, 0)].astype(jnp.float32)
        y_ARD = jnp.where((place_R >= 0)[:, None], y_ARD, 0.0)
        return y_ARD.reshape(y_APD.shape[0], -1, choices, y_APD.shape[2]).sum((0, 2))
