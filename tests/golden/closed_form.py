"""The tiny models behind the golden files, made from a closed form that needs numpy alone.

A golden file holds outputs only. Its weights, tokens and pixels are re-made here, bit for bit, both
by the programs that ran the references (`make_hf.py`, `make_meta.py`) and by the tests that read
the files. Weights carry the names and shapes that Hugging Face transformers gives them.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

Weights = dict[str, np.ndarray]

VOCAB_SIZE = 256
IMAGE_START, IMAGE_END, PATCH = 250, 251, 252
BOS, EOS, PAD = 0, 1, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What tells one tiny model from another; the defaults are a Scout in miniature.

    Attributes:
      num_layers: Decoder layers; every `nope_interval`-th has no rotation and attends globally.
      moe_step: 1 routes in every layer (Scout), 2 in every second (Maverick).
      scaled_rope: Whether frequencies are divided by 16 beyond 8192 positions of wavelength.
      floor: Query temperature rises at positions floor-1, 2*floor-1, ...; None switches it off.
    """

    num_layers: int = 5
    moe_step: int = 1
    use_qk_norm: bool = True
    scaled_rope: bool = True
    experts_per_token: int = 1
    num_experts: int = 4
    chunk_size: int = 8
    floor: int | None = 4
    temperature_coefficient: float = 0.1
    nope_interval: int = 4
    norm_eps: float = 1e-5
    embed_dim: int = 64
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    expert_dim: int = 96
    mlp_dim: int = 128
    max_positions: int = 16384

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """0-based layers with routed experts."""
        return tuple(range(self.moe_step - 1, self.num_layers, self.moe_step))

    @property
    def nope_layers(self) -> tuple[int, ...]:
        """0-based layers without rotation, which attend globally."""
        return tuple(range(self.nope_interval - 1, self.num_layers, self.nope_interval))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionShape:
    """The one tiny vision tower: 16 patches and 4 tokens a tile."""

    image_size: int = 28
    patch_size: int = 7
    embed_dim: int = 48
    num_layers: int = 2
    num_heads: int = 4
    mlp_dim: int = 192
    adapter_dim: int = 80

    @property
    def tokens_per_tile(self) -> int:
        """Tokens that one tile takes in the text."""
        return (self.image_size // self.patch_size // 2) ** 2


VISION = VisionShape()


def hash_values(count: int, seed: int) -> np.ndarray:
    """Return `count` float64 values, frac(43758.5453 sin(12.9898 i + 78.233 seed)) - 0.5."""
    index = np.arange(count, dtype=np.float64)
    wave = np.sin(12.9898 * index + 78.233 * seed) * 43758.5453
    return wave - np.floor(wave) - 0.5


def _text_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    D, H = shape.embed_dim, shape.head_dim
    E, F = shape.num_experts, shape.expert_dim
    shapes = {
        "model.embed_tokens.weight": (VOCAB_SIZE, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (VOCAB_SIZE, D),
    }
    for n in range(shape.num_layers):
        layer = f"model.layers.{n}."
        shapes |= {
            layer + "input_layernorm.weight": (D,),
            layer + "post_attention_layernorm.weight": (D,),
            layer + "self_attn.q_proj.weight": (shape.num_heads * H, D),
            layer + "self_attn.k_proj.weight": (shape.num_kv_heads * H, D),
            layer + "self_attn.v_proj.weight": (shape.num_kv_heads * H, D),
            layer + "self_attn.o_proj.weight": (D, shape.num_heads * H),
        }
        ffn, hidden = layer + "feed_forward.", shape.mlp_dim
        if n in shape.moe_layers:
            shapes |= {
                ffn + "router.weight": (E, D),
                ffn + "experts.gate_up_proj": (E, D, 2 * F),
                ffn + "experts.down_proj": (E, F, D),
            }
            ffn, hidden = ffn + "shared_expert.", F
        shapes |= {
            ffn + "gate_proj.weight": (hidden, D),
            ffn + "up_proj.weight": (hidden, D),
            ffn + "down_proj.weight": (D, hidden),
        }
    return {"language_model." + name: value for name, value in shapes.items()}


def _vision_shapes(text_dim: int) -> dict[str, tuple[int, ...]]:
    D, F, A = VISION.embed_dim, VISION.mlp_dim, VISION.adapter_dim
    patch_dim = 3 * VISION.patch_size**2
    num_patches = (VISION.image_size // VISION.patch_size) ** 2
    shapes = {
        "class_embedding": (D,),
        "positional_embedding_vlm": (num_patches + 1, D),
        "patch_embedding.linear.weight": (D, patch_dim),
        "vision_adapter.mlp.fc1.weight": (A, 4 * D),
        "vision_adapter.mlp.fc2.weight": (A, A),
    }
    linears = {"layernorm_pre": (D,), "layernorm_post": (D,)}
    for m in range(VISION.num_layers):
        layer = f"model.layers.{m}."
        linears |= {layer + f"self_attn.{x}_proj": (D, D) for x in "qkvo"}
        linears |= {layer + "mlp.fc1": (F, D), layer + "mlp.fc2": (D, F)}
        linears |= {layer + f"{x}_layernorm": (D,) for x in ("input", "post_attention")}
    for name, value in linears.items():
        shapes |= {name + ".weight": value, name + ".bias": value[:1]}
    named = {"vision_model." + name: value for name, value in shapes.items()}
    return named | {"multi_modal_projector.linear_1.weight": (text_dim, A)}


def weight_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return every weight's transformers name and shape (linear weights are [out, in])."""
    return _text_shapes(shape) | _vision_shapes(shape.embed_dim)


def weights(shape: Shape) -> Weights:
    """Fill every weight from the hash, float32.

    The seed is the weight's 1-based place among the sorted names. Norm scales become 1 + 0.2 x and
    all other weights 0.6 x: logits of about unit scale, and norms that are visibly not one.
    """
    filled = {}
    for seed, (name, dims) in enumerate(sorted(weight_shapes(shape).items()), start=1):
        values = hash_values(int(np.prod(dims)), seed)
        is_norm_scale = "norm" in name and name.endswith("weight")
        values = 1 + 0.2 * values if is_norm_scale else 0.6 * values
        filled[name] = values.astype(np.float32).reshape(dims)
    return filled


def with_tiny_queries(original: Weights) -> Weights:
    """Scale query weights by 1e-3, so that the epsilon of the query norm decides the outcome."""
    return {
        k: v * np.float32(1e-3) if "q_proj.weight" in k and "vision" not in k else v
        for k, v in original.items()
    }


def with_tied_routers(original: Weights) -> Weights:
    """Make experts 1 and 3 of every router score alike, so that a tie rule decides between them."""
    changed = dict(original)
    for name, value in original.items():
        if name.endswith("router.weight"):
            changed[name] = value.copy()
            changed[name][3] = value[1]
    return changed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One text run: a shape, a change to its weights, and how many tokens go through.

    Attributes:
      stride: The golden file keeps every stride-th logit of the vocabulary.
    """

    shape: Shape = Shape()
    edit: Callable[[Weights], Weights] | None = None
    length: int = 37
    stride: int = 4

    def weights(self) -> Weights:
        """Return the weights of this run by transformers name."""
        filled = weights(self.shape)
        return self.edit(filled) if self.edit else filled


SCOUT = Shape()
MAVERICK = Shape(moe_step=2, use_qk_norm=False, scaled_rope=False)
# A Maverick with scaled frequencies, which no released model has; separate sums exist for it.
MAVERICK_SCALED = Shape(moe_step=2, use_qk_norm=False)


def _text_cases() -> dict[str, Case]:
    cases = {
        "scout": Case(shape=SCOUT, stride=1),
        "maverick": Case(shape=MAVERICK, stride=1),
        "maverick_scaled": Case(shape=MAVERICK_SCALED),
        "scout_unscaled": Case(shape=dataclasses.replace(SCOUT, scaled_rope=False)),
        "scout_no_qk_norm": Case(shape=dataclasses.replace(SCOUT, use_qk_norm=False)),
        "scout_no_qk_norm_unscaled": Case(
            shape=dataclasses.replace(SCOUT, use_qk_norm=False, scaled_rope=False)
        ),
        "maverick_qk_norm": Case(shape=dataclasses.replace(MAVERICK, use_qk_norm=True)),
        "maverick_qk_norm_scaled": Case(
            shape=dataclasses.replace(MAVERICK_SCALED, use_qk_norm=True)
        ),
        "scout_eight_layers": Case(shape=dataclasses.replace(SCOUT, num_layers=8)),
        "maverick_eight_layers": Case(shape=dataclasses.replace(MAVERICK, num_layers=8)),
        "scout_no_temperature": Case(shape=dataclasses.replace(SCOUT, floor=None)),
        "maverick_no_temperature": Case(shape=dataclasses.replace(MAVERICK, floor=None)),
        "scout_two_experts": Case(shape=dataclasses.replace(SCOUT, experts_per_token=2)),
        "maverick_two_experts": Case(shape=dataclasses.replace(MAVERICK, experts_per_token=2)),
        "scout_tied_routers": Case(shape=SCOUT, edit=with_tied_routers),
        "scout_tiny_queries": Case(shape=SCOUT, edit=with_tiny_queries),
        "scout_long": Case(
            shape=dataclasses.replace(SCOUT, chunk_size=16, floor=24), length=233, stride=16
        ),
    }
    return cases


TEXT_CASES = _text_cases()


def tokens(length: int, row: int = 0) -> np.ndarray:
    """Return ordinary token ids [length] int32; row 0 is (7 t mod 200) + 3."""
    t = np.arange(length)
    return ((7 + 2 * row) * t + 11 * row) % 200 + 3


def tiles(count: int, seed: int = 999) -> np.ndarray:
    """Return tile pixels [count, 3, size, size] float32 in [-1, 1)."""
    size = VISION.image_size
    values = 2 * hash_values(count * 3 * size * size, seed)
    return values.astype(np.float32).reshape(count, 3, size, size)


def image_tokens(*tiles_per_image: int, length: int | None = None) -> np.ndarray:
    """Return a row of ids: BOS, then each image as start, its patches, end, then 7 8 9 and text.

    Args:
      tiles_per_image: How many tiles each image has.
      length: Total length, filled up with ordinary tokens; None stops after 7 8 9.
    """
    ids = [BOS]
    for count in tiles_per_image:
        ids += [IMAGE_START, *[PATCH] * (count * VISION.tokens_per_tile), IMAGE_END]
    ids += [7, 8, 9]
    if length is not None:
        ids += tokens(length - len(ids), row=1).tolist()
    return np.array(ids)


# Token ids and the number of tiles they need, for the runs of one row with images.
IMAGE_CASES = {
    "one_image": (image_tokens(1), 1),
    "two_images": (image_tokens(1, 2, length=37), 3),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Rows of equal length whose tiles follow each other in row-major order."""

    ids_BT: np.ndarray
    tiles_NCHW: np.ndarray


def image_batch() -> ImageBatch:
    """Return three rows with two tiles, none, and one."""
    rows = [image_tokens(2, length=21), tokens(21), image_tokens(1, length=21)]
    return ImageBatch(ids_BT=np.stack(rows), tiles_NCHW=tiles(3, seed=555))


# Rows of `tokens` for runs in bfloat16, chosen to keep routers far from a tie, where a rounding
# would send a token to another expert and move all that follows.
BFLOAT16_ROWS = {
    "scout": 190,
    "maverick": 79,
    "scout_no_temperature": 190,
    "maverick_no_temperature": 79,
    "scout_two_experts": 9,
}
# Head width and whether frequencies are scaled, by golden name.
ROPE_TABLES = {"scout": (128, True), "maverick": (128, False), "tiny": (16, True)}
TEMPERATURE_POSITIONS = np.array(
    [0, 1, 8189, 8190, 8191, 8192, 16382, 16383, 16384, 131071, 262143, 1048575, 10485759]
)
# First, second, last of the first row, first of the second row, last patch, class token.
VISION_ROTATION_PATCHES = np.array([0, 1, 23, 24, 575, 576])
