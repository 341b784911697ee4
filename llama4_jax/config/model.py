"""What a Llama 4 model is: every size and switch, in dataclasses that refuse the impossible."""

import dataclasses
from typing import Literal

from llama4_jax.config.field_types import require_types
from llama4_jax.untrusted import shown

DType = Literal["float32", "bfloat16"]

MAX_LAYERS = 512
"""Most layers of a decoder or of an encoder, for a file may ask for any number."""

MAX_TILES = 256
"""Most tiles of an image: the grids of so many are all looked at."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{type(config).__name__}.{name} ({value}) must be positive")


def _require_few_layers(num_layers: int) -> None:
    _require(num_layers <= MAX_LAYERS, f"num_layers ({num_layers}) must be at most {MAX_LAYERS}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Piecewise scaling of RoPE frequencies by wavelength.

    Wavelengths above `original_max_positions / low_freq_factor` are divided by `factor`, those
    below `original_max_positions / high_freq_factor` are kept, and those between are blended.
    """

    factor: float = 16.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        require_types(self)
        _require_positive(self, "factor", "low_freq_factor", "original_max_positions")
        _require(
            self.high_freq_factor >= self.low_freq_factor,
            f"high_freq_factor ({self.high_freq_factor}) must be at least low_freq_factor "
            f"({self.low_freq_factor})",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Temperature:
    """Temperature of NoPE layers: s(p) = 1 + coefficient * ln(floor((p + 1) / floor) + 1)."""

    floor: int = 8192
    coefficient: float = 0.1

    def __post_init__(self) -> None:
        require_types(self)
        _require_positive(self, "floor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes of the text decoder.

    Layers are counted from 0. Layers in `nope_layers` attend to every earlier token, without
    positional embedding and with attention temperature; all others use RoPE and see only their
    own chunk of `chunk_size` tokens (all earlier tokens if it is None). Layers in `moe_layers`
    have routed experts and a shared expert of `expert_dim`; the others a dense MLP of `mlp_dim`.

    `rope_positions="chunk"` rotates by `position % chunk_size`, which is the same function and
    exact at any length; `"absolute"` rotates by the float32 absolute position like the reference
    implementations, for bit parity with them beyond the first chunk.

    `balance_bias` gives every router a bias for each expert that counts when experts are chosen and
    not in their gates. Training moves it to even out their load; released models have none.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    expert_dim: int
    num_experts: int
    experts_per_token: int = 1
    moe_layers: tuple[int, ...]
    nope_layers: tuple[int, ...]
    chunk_size: int | None
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None
    use_qk_norm: bool
    temperature: Temperature | None
    norm_eps: float = 1e-5
    max_positions: int
    tie_embeddings: bool = False
    rope_positions: Literal["chunk", "absolute"] = "chunk"
    balance_bias: bool = False

    def __post_init__(self) -> None:
        _require(
            isinstance(self.balance_bias, bool),
            f"balance_bias ({shown(self.balance_bias)}) must be True or False; how fast it moves "
            "is the balance_bias_rate of an OptimizerConfig",
        )
        require_types(self)
        _require_positive(
            self, "vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim"
        )
        _require_positive(self, "mlp_dim", "expert_dim", "rope_theta", "norm_eps", "max_positions")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of "
            f"num_kv_heads ({self.num_kv_heads})",
        )
        _require(self.head_dim % 2 == 0, f"head_dim ({self.head_dim}) must be even for RoPE")
        _require_few_layers(self.num_layers)
        for name in ("moe_layers", "nope_layers"):
            layers = getattr(self, name)
            is_sorted = tuple(sorted(set(layers))) == layers
            _require(
                is_sorted and set(layers) <= set(range(self.num_layers)),
                f"{name} {shown(layers)} must be increasing layer indices from 0 to "
                f"{self.num_layers - 1}",
            )
        if self.moe_layers:
            _require_positive(self, "num_experts")
            _require(
                1 <= self.experts_per_token <= self.num_experts,
                f"experts_per_token ({self.experts_per_token}) must lie in 1..num_experts "
                f"({self.num_experts})",
            )
        if self.chunk_size is not None:
            _require_positive(self, "chunk_size")
        _require(
            bool(self.moe_layers) or not self.balance_bias,
            "balance_bias is for routers, and this model has none: moe_layers is empty",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the vision encoder, its pixel-shuffle adapter and the tile it reads."""

    image_size: int = 336
    patch_size: int = 14
    num_channels: int = 3
    embed_dim: int = 1408
    num_layers: int = 34
    num_heads: int = 16
    mlp_dim: int = 5632
    adapter_dim: int = 4096
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    pixel_shuffle_ratio: float = 0.5

    def __post_init__(self) -> None:
        require_types(self)
        _require_positive(self, "image_size", "patch_size", "num_channels", "embed_dim")
        _require_positive(self, "num_layers", "num_heads", "mlp_dim", "adapter_dim")
        _require_positive(self, "norm_eps", "rope_theta")
        _require_few_layers(self.num_layers)
        _require(
            self.image_size % self.patch_size == 0,
            f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size})",
        )
        _require(
            self.embed_dim % (4 * self.num_heads) == 0,
            f"vision embed_dim ({self.embed_dim}) must be a multiple of 4 * num_heads "
            f"({4 * self.num_heads}), so that 2-D RoPE splits each head",
        )
        _require(
            0 < self.pixel_shuffle_ratio <= 1 and (1 / self.pixel_shuffle_ratio).is_integer(),
            f"pixel_shuffle_ratio ({self.pixel_shuffle_ratio}) must be 1 / a whole number",
        )
        _require(
            self.grid % self.shuffle == 0,
            f"the patch grid ({self.grid}) must be a multiple of the pixel shuffle "
            f"({self.shuffle})",
        )

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def shuffle(self) -> int:
        """Patches along one side of the square that pixel shuffle folds into one token."""
        return round(1 / self.pixel_shuffle_ratio)

    @property
    def tokens_per_tile(self) -> int:
        return (self.grid // self.shuffle) ** 2

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def patch_dim(self) -> int:
        return self.num_channels * self.patch_size**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model: decoder, optional vision encoder, token ids it must know, and its dtype.

    `bos_id` is None for a model whose texts begin with no token of their own.
    """

    name: str
    text: TextConfig
    vision: VisionConfig | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int
    patch_id: int | None
    max_tiles: int = 16
    dtype: DType = "bfloat16"

    def __post_init__(self) -> None:
        require_types(self)
        ids = {"pad_id": self.pad_id}
        ids |= {f"eos_ids[{i}]": eos for i, eos in enumerate(self.eos_ids)}
        if self.vision is not None:
            _require(self.patch_id is not None, "a model with vision needs a patch_id")
        ids |= {
            name: value
            for name, value in (("bos_id", self.bos_id), ("patch_id", self.patch_id))
            if value is not None
        }
        for name, value in ids.items():
            _require(
                0 <= value < self.text.vocab_size,
                f"{name} ({value}) must lie in 0..vocab_size - 1 ({self.text.vocab_size - 1})",
            )
        _require_positive(self, "max_tiles")
        _require(
            self.max_tiles <= MAX_TILES, f"max_tiles ({self.max_tiles}) must be at most {MAX_TILES}"
        )
