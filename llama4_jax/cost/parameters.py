"""Count the parameters of a model, part by part, and those that a token meets."""

import dataclasses

from llama4_jax.config.model import ModelConfig, TextConfig, VisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters of a model by part.

    Attributes:
        embedding: the table of words.
        attention: query, key, value and output matrices of all decoder layers.
        norms: scales of the decoder's norms.
        dense: MLPs of layers without experts.
        router: router matrices.
        buffers: balance biases, which no gradient trains and which are always float32.
        shared: shared experts.
        routed: routed experts, all of them.
        head: the output head; 0 where the embedding table serves as one.
        vision: the image encoder with its adapter.
        projector: image features to the width of the decoder.
        active_routed: of `routed`, those of the experts that one token chooses.
    """

    embedding: int
    attention: int
    norms: int
    dense: int
    router: int
    buffers: int
    shared: int
    routed: int
    head: int
    vision: int
    projector: int
    active_routed: int

    @property
    def total(self) -> int:
        """All parameters, buffers included."""
        return self.text + self.vision + self.projector

    @property
    def text(self) -> int:
        """Those of the decoder, with embedding and head."""
        layers = self.attention + self.norms + self.dense + self.router + self.shared + self.routed
        return self.embedding + layers + self.buffers + self.head

    @property
    def active(self) -> int:
        """Those of `text` that one token meets: without the experts that it does not choose."""
        return self.text - self.routed + self.active_routed

    @property
    def multiplied(self) -> int:
        """Those of `active` in matrices that a token is multiplied with.

        The head, or the table that serves as one, is such a matrix; looking a word up is none.
        """
        layers = self.attention + self.dense + self.router + self.shared + self.active_routed
        return layers + (self.head or self.embedding)


def count_parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of a model.

    With D the width, N, K and H heads, kv heads and their dimension, F a hidden width, E experts
    and V words: attention 2 D N H + 2 D K H, an MLP or expert 3 D F, a router D E, norms 2 D for
    each layer and D after the last, table and head V D each.

    Source: the shapes that `llama4_jax.layers` declares; a test compares them.
    """
    text, vision = config.text, config.vision
    D, num_moe = text.embed_dim, len(text.moe_layers)
    expert, table = 3 * D * text.expert_dim, text.vocab_size * D
    return Parameters(
        embedding=table,
        attention=text.num_layers * _attention(text),
        norms=(2 * text.num_layers + 1) * D,
        dense=(text.num_layers - num_moe) * 3 * D * text.mlp_dim,
        router=num_moe * D * text.num_experts,
        buffers=num_moe * text.num_experts if text.balance_bias else 0,
        shared=num_moe * expert,
        routed=num_moe * text.num_experts * expert,
        head=0 if text.tie_embeddings else table,
        vision=0 if vision is None else _vision(vision),
        projector=0 if vision is None else vision.adapter_dim * D,
        active_routed=num_moe * text.experts_per_token * expert,
    )


def _attention(text: TextConfig) -> int:
    return 2 * text.embed_dim * text.head_dim * (text.num_heads + text.num_kv_heads)


def _vision(vision: VisionConfig) -> int:
    """Count the encoder: patches, class token, positions, layers with biases, adapter."""
    D, F, A = vision.embed_dim, vision.mlp_dim, vision.adapter_dim
    attention, mlp, norm = 4 * D * D + 4 * D, 2 * D * F + F + D, 2 * D
    patches = vision.patch_dim * D + D + (vision.num_patches + 1) * D
    adapter = vision.shuffle**2 * D * A + A * A
    return patches + 2 * norm + vision.num_layers * (attention + mlp + 2 * norm) + adapter
