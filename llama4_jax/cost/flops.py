"""Count the FLOPs of a model: those that it needs, whatever computes it."""

from llama4_jax.config.model import ModelConfig, TextConfig, VisionConfig
from llama4_jax.config.pattern import layer_pattern
from llama4_jax.cost.parameters import count_parameters


def forward_flops(config: ModelConfig, *, rows: int, row_length: int, tiles: int = 0) -> int:
    """Count a forward pass over a batch: all logits of its rows, and the features of its images.

    Text: 2 for each token and parameter that it is multiplied with (`Parameters.multiplied`), and
    4 N H for each pair of a token and a token it sees, N heads of H. Tokens see all earlier ones of
    their chunk, in NoPE layers of the row, as if the row were one document.

    Args:
        config: The model.
        rows: Rows of the batch, over all devices.
        row_length: Tokens of a row.
        tiles: Image tiles of the batch; 0 for text only.

    Source: arXiv 2204.02311, appendix B, with causal instead of full attention.
    """
    text = config.text
    tokens = rows * row_length
    pairs = rows * visible_pairs(text, row_length)
    flops = 2 * count_parameters(config).multiplied * tokens
    flops += 4 * text.num_heads * text.head_dim * pairs
    if config.vision is not None:
        flops += tiles * tile_flops(config.vision, text_embed_dim=text.embed_dim)
    return flops


def train_flops(config: ModelConfig, *, rows: int, row_length: int, tiles: int = 0) -> int:
    """Count a training step: forward, and twice as much backward; recomputation is not counted."""
    return 3 * forward_flops(config, rows=rows, row_length=row_length, tiles=tiles)


def tile_flops(config: VisionConfig, *, text_embed_dim: int) -> int:
    """Count a forward pass over one image tile, with its projection to the decoder's width."""
    D = config.embed_dim
    patches = config.num_patches + 1
    layer = 2 * patches * (4 * D * D + 2 * D * config.mlp_dim) + 4 * D * patches**2
    shuffled = D * config.shuffle**2 + config.adapter_dim
    adapter = config.adapter_dim * (shuffled + text_embed_dim)
    return (
        2 * config.num_patches * config.patch_dim * D
        + config.num_layers * layer
        + 2 * config.tokens_per_tile * adapter
    )


def visible_pairs(config: TextConfig, row_length: int) -> int:
    """Count the pairs of a token and a token it sees, over all layers."""
    kinds = layer_pattern(config).kinds
    return sum(causal_pairs(row_length, kind.visibility.chunk_size or row_length) for kind in kinds)


def causal_pairs(length: int, chunk_size: int) -> int:
    """Count the pairs that a causal mask leaves of a row cut into chunks: n (n + 1) / 2 of each."""
    whole, rest = divmod(length, chunk_size)
    return whole * (chunk_size * (chunk_size + 1) // 2) + rest * (rest + 1) // 2
