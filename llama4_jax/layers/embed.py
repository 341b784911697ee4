"""Token embedding, the output head, and the early fusion of image features."""

import jax
import jax.numpy as jnp
from flax import nnx

from llama4_jax.layers.linear import look_up_rows, project
from llama4_jax.layers.param import normal
from llama4_jax.parallel.shard import shard, take


class Embed(nnx.Module):
    """The embedding table; it also serves as output head where the two are tied."""

    def __init__(self, vocab_size: int, embed_dim: int, *, key: jax.Array, dtype: str):
        axes, std = ("vocab", "weight_embed"), embed_dim**-0.5
        self.table_VD = normal(
            key, (vocab_size, embed_dim), axes,
            std=std, dtype=dtype, role="embedding", contracted=(-1,),
        )  # fmt: skip

    def __call__(self, tokens_BT: jax.Array, *, dtype: str) -> jax.Array:
        """Look tokens up. Returns x_BTD."""
        return look_up_rows(self.table_VD, tokens_BT, jnp.dtype(dtype))

    def attend(self, x_BTD: jax.Array) -> jax.Array:
        """Score every word by its embedding. Returns logits_BTV in the dtype of x."""
        return project("BTD,VD->BTV", x_BTD, self.table_VD, out=("batch", "seq", "vocab"))


class Head(nnx.Module):
    """The output head: a linear map to the vocabulary, without bias."""

    def __init__(self, vocab_size: int, embed_dim: int, *, key: jax.Array, dtype: str):
        axes, std = ("weight_embed", "vocab"), embed_dim**-0.5
        self.w_DV = normal(key, (embed_dim, vocab_size), axes, std=std, dtype=dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns logits_BTV in the dtype of x."""
        return project("BTD,DV->BTV", x_BTD, self.w_DV, out=("batch", "seq", "vocab"))


class Projector(nnx.Module):
    """Image features to the width of the text decoder, without bias."""

    def __init__(self, feature_dim: int, embed_dim: int, *, key: jax.Array, dtype: str):
        axes, std = (None, "weight_embed"), feature_dim**-0.5
        self.w_DE = normal(key, (feature_dim, embed_dim), axes, std=std, dtype=dtype)

    def __call__(self, features_BPD: jax.Array) -> jax.Array:
        """Returns [tiles, tokens, embed]."""
        return project("BPD,DE->BPE", features_BPD, self.w_DE, out=("tiles", None, "embed"))


def insert_image_features(
    x_BTD: jax.Array, features_BPD: jax.Array, tokens_BT: jax.Array, patch_id: int
) -> jax.Array:
    """Put image features, in order, where the tokens are image patches; elsewhere keep the text.

    Args:
        x_BTD: token embeddings.
        features_BPD: [tiles, tokens_per_tile, D], tiles in row-major order of their patch tokens
            over the batch. Features beyond the last patch token are unused.
        tokens_BT: token ids.
        patch_id: id of the patch token.

    Returns:
        x_BTD with patch rows replaced.
    """
    with jax.named_scope("insert_image_features"):
        is_patch_BT = shard(tokens_BT == patch_id, (None, None))
        rank_BT = (jnp.cumsum(is_patch_BT.reshape(-1)) - 1).reshape(tokens_BT.shape)
        features_RD = shard(features_BPD, (None, None, None)).reshape(-1, x_BTD.shape[-1])
        rank_BT = shard(jnp.clip(rank_BT, 0, features_RD.shape[0] - 1), ("batch", "seq"))
        image_BTD = take(features_RD, rank_BT, out=("batch", "seq", "embed"))
        is_patch_BT1 = shard(is_patch_BT, ("batch", "seq"))[..., None]
        return jnp.where(is_patch_BT1, image_BTD, x_BTD)
