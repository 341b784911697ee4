"""The whole model: embed, insert image features, decode, score."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from llama4_jax.cache.layers import Cache
from llama4_jax.config.model import ModelConfig
from llama4_jax.layers.attention import Positions
from llama4_jax.layers.embed import Embed, Head, Projector, insert_image_features
from llama4_jax.layers.feed_forward import RouterLoad
from llama4_jax.layers.norm import RMSNorm
from llama4_jax.model.decoder import Decoder
from llama4_jax.model.vision import VisionEncoder
from llama4_jax.parallel.sequence import Order
from llama4_jax.parallel.shard import shard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hidden:
    """What the decoder computes before the output head.

    Attributes:
        x_BTD: normalised hidden states.
        cache: the cache with the new tokens stored, or None.
        router_logits_LBTE: router logits of every mixture layer in order, or None.
        router_load: what those routers did, each array with a leading L; or None.
    """

    x_BTD: jax.Array
    cache: Cache | None
    router_logits_LBTE: jax.Array | None
    router_load: RouterLoad | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """Next-token logits, and the cache with the new tokens stored.

    Attributes:
        logits_BTV: float32.
        cache: a new Cache, or None.
    """

    logits_BTV: jax.Array
    cache: Cache | None


class Llama4(nnx.Module):
    """A Llama 4 model: an immutable pytree of parameters and a pure function of its inputs."""

    def __init__(self, config: ModelConfig, *, key: jax.Array, param_dtype: str | None = None):
        """Initialise parameters in `param_dtype`, by default the dtype it computes in.

        Under `parallel.use_mesh` every parameter is laid out by its logical axes. Wrap it in
        `jax.jit` to initialise straight into shards, in `jax.eval_shape` for shapes alone.
        """
        text, dtype = config.text, param_dtype or config.dtype
        keys = jax.random.split(key, 5)
        self.embed = Embed(text.vocab_size, text.embed_dim, key=keys[0], dtype=dtype)
        self.decoder = Decoder(text, key=keys[1], dtype=dtype)
        self.final_norm = RMSNorm(text.embed_dim, eps=text.norm_eps, dtype=dtype)
        if not text.tie_embeddings:
            self.head = Head(text.vocab_size, text.embed_dim, key=keys[2], dtype=dtype)
        if config.vision is not None:
            self.vision = VisionEncoder(config.vision, key=keys[3], dtype=dtype)
            self.projector = Projector(
                config.vision.adapter_dim, text.embed_dim, key=keys[4], dtype=dtype
            )
        self.config = config

    def __repr__(self) -> str:
        """Say which model it is and how large, not what is in it."""
        size = sum(x.size for x in jax.tree.leaves(self))
        return f"Llama4({self.config.name}: {size:,} parameters)"

    def encode_images(self, tiles_NCHW: jax.Array, *, remat: bool = False) -> jax.Array:
        """Turn tiles in [-1, 1] into features [tiles, tokens_per_tile, D] for the patch tokens.

        Raises:
            ValueError: the model has no vision encoder, or tiles are not of its size.
        """
        vision = self.config.vision
        if vision is None:
            raise ValueError(f"model {self.config.name!r} has no vision encoder; give it text only")
        wanted = (vision.num_channels, vision.image_size, vision.image_size)
        if tiles_NCHW.shape[1:] != wanted:
            raise ValueError(f"tiles_NCHW has shape {tiles_NCHW.shape}; tiles must be {wanted}")
        return self.projector(self.vision(tiles_NCHW, dtype=self.config.dtype, remat=remat))

    def encode(
        self,
        tokens_BT: jax.Array,
        tiles_NCHW: jax.Array | None = None,
        *,
        features_BTD: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: Cache | None = None,
        remat: bool = False,
    ) -> Hidden:
        """Compute hidden states.

        Args:
            tokens_BT: int32 token ids.
            tiles_NCHW: image tiles whose features replace patch tokens, in row-major order over the
                batch; there must be `tokens_per_tile` patch tokens per tile.
            features_BTD: features that replace patch tokens, each in its token's place; those
                of other tokens are unused. Given instead of tiles.
            positions_BT: int32 true positions, -1 for padding, which is invisible and not cached.
                By default 0, 1, 2, ... or, with a cache, what follows it.
            segments_BT: int32 segments of packed rows; tokens see their own segment only. Those of
                a segment stand together, and their positions count up by one.
            cache: what earlier calls stored; this call appends its tokens.
            remat: recompute activations in the backward pass.

        Raises:
            ValueError: shapes disagree, or segments are given with a cache.
        """
        B, T = tokens_BT.shape
        for name, array in (("positions_BT", positions_BT), ("segments_BT", segments_BT)):
            if array is not None and array.shape != (B, T):
                raise ValueError(f"{name} has shape {array.shape} but tokens_BT {tokens_BT.shape}")
        if cache is not None and segments_BT is not None:
            raise ValueError("a cache holds one sequence per row; leave segments_BT out")
        tokens_BT = shard(tokens_BT, ("batch", "seq"))
        order: Order = "any" if segments_BT is None else "segments"
        if positions_BT is None:
            order = "row" if cache is None else "any"
            positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
            if cache is not None:
                positions_BT = shard(cache.lengths_B, (None,))[:, None] + positions_BT
        at = Positions(
            shard(positions_BT.astype(jnp.int32), ("batch", "seq")),
            None if segments_BT is None else shard(segments_BT, ("batch", "seq")),
            order,
        )
        x_BTD = self.embed(tokens_BT, dtype=self.config.dtype)
        if tiles_NCHW is not None:
            features = self.encode_images(tiles_NCHW, remat=remat)
            assert self.config.patch_id is not None
            x_BTD = insert_image_features(x_BTD, features, tokens_BT, self.config.patch_id)
        elif features_BTD is not None:
            is_patch_BT1 = jnp.expand_dims(tokens_BT == self.config.patch_id, -1)
            features_BTD = shard(features_BTD, ("batch", "seq", "embed")).astype(x_BTD.dtype)
            x_BTD = jnp.where(is_patch_BT1, features_BTD, x_BTD)
        x_BTD, cache, routers = self.decoder(x_BTD, at, cache, remat=remat)
        logits, load = (None, None) if routers is None else routers
        return Hidden(self.final_norm(x_BTD), cache, logits, load)

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        """Score the vocabulary: logits_BTV in float32, after a product in the dtype of x."""
        with jax.named_scope("unembed"):
            is_tied = self.config.text.tie_embeddings
            logits_BTV = self.embed.attend(x_BTD) if is_tied else self.head(x_BTD)
            return logits_BTV.astype(jnp.float32)

    def __call__(
        self,
        tokens_BT: jax.Array,
        tiles_NCHW: jax.Array | None = None,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Compute next-token logits at every position; the arguments are those of `encode`."""
        hidden = self.encode(
            tokens_BT,
            tiles_NCHW,
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            cache=cache,
        )
        return Output(self.unembed(hidden.x_BTD), hidden.cache)
