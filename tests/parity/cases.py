"""The models and inputs of `make parity`, read by both sides of the comparison; numpy alone."""

import dataclasses

import numpy as np

IMAGE_START, IMAGE_END, PATCH = 250, 251, 252
TOKENS_PER_TILE = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One randomly filled model and one batch that goes through it.

    Attributes:
      text: Changes to `TEXT`, by transformers' field names.
      length: Tokens a row.
      rows: Rows of the batch, ordinary tokens unless there are images.
      tiles_per_row: Tiles of each row's images, by row and image; empty for a model without vision.
      splits: Ways to cut the run into calls with a cache.
      dtype: What weights are stored in and both sides compute in.
      keep: How many last positions are compared; 0 is all.
      rotates_absolutely: Whether we rotate by the absolute position, as transformers does, and not
        by the position in the chunk, which is more exact beyond the first chunk.
    """

    name: str
    text: dict = dataclasses.field(default_factory=dict)
    length: int = 275
    rows: int = 2
    tiles_per_row: tuple[tuple[int, ...], ...] = ()
    splits: tuple[tuple[int, ...], ...] = ()
    dtype: str = "float32"
    keep: int = 0
    rotates_absolutely: bool = False

    @property
    def has_vision(self) -> bool:
        """Whether the checkpoint is the text-and-image class."""
        return bool(self.tiles_per_row)


ROPE = {"rope_type": "default", "rope_theta": 500000.0}
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
# A Scout in miniature: chunks of 32, so that the default length crosses eight chunk edges.
TEXT = {
    "vocab_size": 256,
    "hidden_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "intermediate_size_mlp": 160,
    "num_local_experts": 8,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "attention_chunk_size": 32,
    "floor_scale": 16,
    "rope_parameters": SCALED_ROPE,
    "max_position_embeddings": 16384,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MAVERICK = {
    "interleave_moe_layer_step": 2,
    "use_qk_norm": False,
    "num_local_experts": 16,
    "rope_parameters": ROPE,
    "attention_chunk_size": 24,
}
# Everything that the released models have by default, in a model of one thousandth the width.
RELEASED = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
}
PLAIN = {
    "moe_layers": [],
    "no_rope_layers": [1] * 8,
    "tie_word_embeddings": True,
    "use_qk_norm": False,
    "rope_parameters": ROPE,
}
# For bfloat16: where a rounding turns a router, all that follows is another computation.
DENSE = {"moe_layers": []}
VISION = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "image_size": 42,
    "patch_size": 7,
    "projector_input_dim": 72,
    "projector_output_dim": 72,
    "vision_output_dim": 72,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
ODD_SPLITS = ((31, 2, 95, 33, 1, 113), (1, 160, 64, 50))
# The middle row is text alone.
IMAGES = ((2, 1), (), (3,))

CASES = (
    Case(name="scout", splits=ODD_SPLITS),
    Case(name="maverick", text=MAVERICK, splits=ODD_SPLITS[:1]),
    Case(name="two experts a token", text={"num_experts_per_tok": 2}),
    Case(name="no temperature", text={"attn_temperature_tuning": False}),
    Case(name="six layers", text={"num_hidden_layers": 6}, splits=ODD_SPLITS[1:2]),
    Case(name="chunk and floor of 8192", text=RELEASED, length=8320, rows=1, keep=256,
         rotates_absolutely=True),
    Case(name="chunk of 1000, floor of 8192", text=RELEASED | {"attention_chunk_size": 1000},
         length=8320, rows=1, keep=256, rotates_absolutely=True),
    Case(name="dense, tied, all rotated", text=PLAIN),
    Case(name="images", tiles_per_row=IMAGES, rows=3, length=90, splits=((41, 1, 48),)),
    Case(name="images, maverick", text=MAVERICK, tiles_per_row=IMAGES, rows=3, length=90),
    Case(name="dense in bfloat16", text=DENSE, dtype="bfloat16"),
    Case(name="images, dense in bfloat16", text=DENSE, tiles_per_row=IMAGES, rows=3, length=90,
         dtype="bfloat16"),
)  # fmt: skip


def folder_name(case: Case) -> str:
    """Return the case's name as a folder."""
    return case.name.replace(",", "").replace(" ", "_")


def seed(case: Case) -> int:
    """Return the case's own seed."""
    return 1000 + CASES.index(case)


def token_ids(case: Case) -> np.ndarray:
    """Return ids [rows, length] int32; images come first in their row."""
    rng = np.random.default_rng(seed(case))
    ids = rng.integers(3, 250, size=(case.rows, case.length), dtype=np.int32)
    for row, images in enumerate(case.tiles_per_row):
        run = [0]
        for count in images:
            run += [IMAGE_START, *[PATCH] * (count * TOKENS_PER_TILE), IMAGE_END]
        ids[row, : len(run)] = run
    return ids


def tiles(case: Case) -> np.ndarray | None:
    """Return the batch's tiles [N, 3, size, size] float32 in [-1, 1), or None without vision."""
    if not case.has_vision:
        return None
    count = sum(sum(images) for images in case.tiles_per_row)
    size = VISION["image_size"]
    rng = np.random.default_rng(seed(case) + 1)
    return rng.uniform(-1, 1, size=(count, 3, size, size)).astype(np.float32)


def kept(case: Case, logits_BTV: np.ndarray) -> np.ndarray:
    """Return the positions that are compared."""
    return logits_BTV[:, -case.keep :] if case.keep else logits_BTV
