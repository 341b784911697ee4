"""Small models in memory, and comparisons of everything that two checkpoints hold."""

import dataclasses
import pathlib
import zlib

import numpy as np

from llama4_jax.checkpoint.convert import make_plan, open_checkpoint
from llama4_jax.checkpoint.parameters import Parameter, np_dtype, parameters
from llama4_jax.checkpoint.writer import write_checkpoint
from llama4_jax.config import ModelConfig, RopeScaling, Temperature, TextConfig, VisionConfig

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "checkpoints"

TINY = ModelConfig(
    name="tiny",
    text=TextConfig(
        vocab_size=64,
        embed_dim=32,
        num_layers=5,
        num_heads=16,
        num_kv_heads=8,
        head_dim=2,
        mlp_dim=48,
        expert_dim=24,
        num_experts=4,
        moe_layers=(1, 3),
        nope_layers=(3,),
        chunk_size=8,
        rope_scaling=RopeScaling(),
        use_qk_norm=True,
        temperature=Temperature(floor=4),
        max_positions=4096,
    ),
    vision=VisionConfig(
        image_size=8,
        patch_size=2,
        embed_dim=32,
        num_layers=2,
        num_heads=8,
        mlp_dim=128,
        adapter_dim=16,
    ),
    bos_id=0,
    eos_ids=(1, 3),
    pad_id=2,
    patch_id=60,
)

BALANCED = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, balance_bias=True))

DENSE_TIED = dataclasses.replace(
    TINY,
    text=dataclasses.replace(
        TINY.text,
        moe_layers=(),
        nope_layers=(),
        chunk_size=None,
        temperature=None,
        tie_embeddings=True,
    ),
    vision=None,
    patch_id=None,
)


class MemorySource:
    """A model of numbers that depend on the parameter's name alone."""

    def __init__(self, config: ModelConfig, dtype: str | None = None) -> None:
        self.config = config
        self._dtype = np_dtype(dtype or config.dtype)
        self.arrays = {
            name: self._draw(parameter) for name, parameter in parameters(config).items()
        }

    def _draw(self, parameter: Parameter) -> np.ndarray:
        random = np.random.default_rng(zlib.crc32(parameter.name.encode()))
        dtype = np.float32 if parameter.keeps_dtype else self._dtype
        return random.standard_normal(parameter.shape, np.float32).astype(dtype)

    def dtype(self, name: str) -> np.dtype:
        return self.arrays[name].dtype

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.arrays[name][index]


def write(config: ModelConfig, directory: pathlib.Path, to: str = "hf", **options) -> MemorySource:
    """Write a model's checkpoint and return what it holds."""
    source = MemorySource(config)
    write_checkpoint(make_plan(source, to, **options), directory, files={})
    return source


def read_all(source, name: str) -> np.ndarray:
    shape = parameters(source.config)[name].shape
    return np.ascontiguousarray(source.read(name, tuple(slice(0, n) for n in shape)))


def assert_same(ours, theirs, *, configs: bool = True) -> None:
    """Compare two sources bit for bit, and slices with the whole."""
    if configs:
        assert ours.config == theirs.config
    for name, parameter in parameters(ours.config).items():
        one, other = read_all(ours, name), read_all(theirs, name)
        assert one.dtype == other.dtype == ours.dtype(name) == theirs.dtype(name), name
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8), err_msg=name)
        index = tuple(slice(n // 3, n // 3 + max(1, n // 2)) for n in parameter.shape)
        assert ours.read(name, index).tobytes() == one[index].tobytes(), name


def assert_holds(directory: pathlib.Path, source) -> None:
    """Check that a checkpoint on disk is this model, bit for bit."""
    assert_same(open_checkpoint(directory), source)
