"""Look inside a forward pass: the hidden states after every layer."""

from operator import itemgetter

import jax
import jax.numpy as jnp

from llama4_jax.layers.attention import Positions
from llama4_jax.layers.embed import insert_image_features
from llama4_jax.model.llama4 import Llama4


def hidden_states(
    model: Llama4, tokens_BT: jax.Array, tiles_NCHW: jax.Array | None = None
) -> list[jax.Array]:
    """Compute the residual stream before the first layer and after each.

    `model.unembed(model.final_norm(x_BTD))` turns any of them into logits; of the last they are
    those of the model.

    Args:
        model: the model; inside `Pretrained.on_mesh` if it lies on one.
        tokens_BT: int32 token ids, every row from its beginning.
        tiles_NCHW: image tiles whose features replace patch tokens, as for `Llama4.encode`.

    Returns:
        num_layers + 1 arrays x_BTD in the dtype that the model computes in.
    """
    B, T = tokens_BT.shape
    at = Positions(jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)), None, "row")
    x_BTD = model.embed(tokens_BT, dtype=model.config.dtype)
    if tiles_NCHW is not None:
        features = model.encode_images(tiles_NCHW)
        assert model.config.patch_id is not None
        x_BTD = insert_image_features(x_BTD, features, tokens_BT, model.config.patch_id)
    places = [itemgetter(g) for g in range(model.decoder.num_groups)]
    groups = [jax.tree.map(place, model.decoder.groups) for place in places]
    states = [x_BTD]
    for block in [*(block for group in groups for block in group.slots), *model.decoder.tail]:
        states.append(block(states[-1], at, None)[0])
    return states
