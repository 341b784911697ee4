"""Models from checkpoints and back: every parameter goes straight into its shards."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from llama4_jax import parallel
from llama4_jax.checkpoint.convert import GENERATION, Format, open_checkpoint, write_source
from llama4_jax.checkpoint.file_tensors import check_tensors
from llama4_jax.checkpoint.parameters import Index, Leaf, Source, model_leaves, overlap
from llama4_jax.checkpoint.writer import Progress, no_progress
from llama4_jax.config import DType, ModelConfig
from llama4_jax.config.json_section import Section, load_json
from llama4_jax.layers.param import leaf_name
from llama4_jax.model import Llama4
from llama4_jax.text import ChatTemplate, Tokenizer, load_chat_template, load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """How a checkpoint wants to be sampled, when the caller does not say.

    Attributes:
      temperature: 0 is greedy.
      top_p: 1 keeps every token.
      top_k: None keeps every token.
      stop_ids: tokens that end an answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    stop_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model with what belongs to it.

    Attributes:
      model: parameters on their devices; `model.config` is `config`.
      tokenizer: None if the checkpoint has none: the model then takes and gives token ids.
      chat_template: the checkpoint's own, or None.
      generation: how to sample by default.
      directory: where it was loaded from, or None.
      rules: how the model lies on its mesh, if it lies on one.
    """

    model: Llama4
    config: ModelConfig
    tokenizer: Tokenizer | None = None
    chat_template: ChatTemplate | None = None
    generation: GenerationDefaults = GenerationDefaults()
    directory: pathlib.Path | None = None
    rules: parallel.Rules = parallel.PRESETS["single"]


def from_pretrained(
    directory: str | pathlib.Path,
    *,
    mesh: Mesh | None = None,
    rules: parallel.Rules | None = None,
    dtype: DType | None = None,
) -> Pretrained:
    """Load a checkpoint of any layout onto one device or a mesh.

    Each device's part of each parameter is read from the files on its own, so the host never holds
    more than the largest shard.

    Args:
      directory: a Hugging Face, Meta or native checkpoint; the layout is recognised.
      mesh: where to lay the model out; None is the default device. Run the model inside
        `parallel.use_mesh(mesh, pretrained.rules)`.
      rules: which mesh axes divide which logical axes; by default `parallel.serving_rules`.
      dtype: of parameters and activations; by default the checkpoint's own.

    Raises:
      ValueError: the checkpoint is damaged or incomplete, or a weight does not divide over the
        mesh.
    """
    directory = pathlib.Path(directory)
    source = open_checkpoint(directory)
    config = dataclasses.replace(source.config, dtype=dtype or source.config.dtype)
    if rules is None:
        sizes = {} if mesh is None else dict(mesh.shape)
        rules = parallel.serving_rules(sizes, num_kv_heads=config.text.num_kv_heads)
    with parallel.use_mesh(mesh, rules):
        skeleton = parallel.abstract(lambda: Llama4(config, key=jax.random.key(0)))
        fill = _filler(source, config)
        model = jax.tree_util.tree_map_with_path(fill, skeleton)
    return Pretrained(
        model=model,
        config=config,
        tokenizer=load_tokenizer(directory),
        chat_template=load_chat_template(directory),
        generation=_read_generation(directory, config),
        directory=directory,
        rules=rules,
    )


def _filler(source: Source, config: ModelConfig) -> Callable[..., jax.Array]:
    leaves = model_leaves(config)
    default = SingleDeviceSharding(jax.local_devices()[0])

    def fill(path: tuple[Any, ...], array: jax.ShapeDtypeStruct) -> jax.Array:
        sharding = array.sharding if parallel.has_mesh() else default
        return _place(source, leaves[leaf_name(path)], array.dtype, sharding)

    return fill


def _place(source: Source, leaf: Leaf, dtype: np.dtype, sharding: Sharding) -> jax.Array:
    """Read each different shard once and put it on the devices that hold it."""
    devices_of: dict[tuple, list[jax.Device]] = {}
    indices: dict[tuple, Index] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        assert index is not None
        full = tuple(slice(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True))
        key = tuple((s.start, s.stop) for s in full)
        devices_of.setdefault(key, []).append(device)
        indices[key] = full
    shards: dict[jax.Device, jax.Array] = {}
    for key, devices in devices_of.items():
        value = _read(source, leaf, indices[key]).astype(dtype, copy=False)
        for device in devices:
            shards[device] = jax.device_put(value, device)
        # Wait, so that the host's copy is gone before the next shard is read.
        jax.block_until_ready([shards[device] for device in devices])
    ordered = [shards[d] for d in sharding.addressable_devices_indices_map(leaf.shape)]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, ordered)


def _read(source: Source, leaf: Leaf, index: Index) -> np.ndarray:
    if not leaf.is_stacked:
        return np.ascontiguousarray(source.read(leaf.names[0], index))
    layers, inner = leaf.names[index[0]], index[1:]
    shape = [part.stop - part.start for part in inner]
    out = np.empty([len(layers), *shape], source.dtype(layers[0]))
    for row, name in zip(out, layers, strict=True):
        row[...] = source.read(name, inner)
    return out


def _read_generation(directory: pathlib.Path, config: ModelConfig) -> GenerationDefaults:
    """Read generation_config.json; without `do_sample` its temperature does not apply."""
    path = directory / GENERATION
    if not path.is_file():
        return GenerationDefaults(stop_ids=config.eos_ids)
    values = Section(load_json(path), str(path))
    stop = values.get("eos_token_id", list(config.eos_ids))
    stop_ids = tuple(stop) if isinstance(stop, list) else (stop,)
    if not values.flag("do_sample", default=False):
        return GenerationDefaults(stop_ids=stop_ids)
    return GenerationDefaults(
        temperature=values.number("temperature", 1.0),
        top_p=values.number("top_p", 1.0),
        top_k=values.integer("top_k", None) or None,
        stop_ids=stop_ids,
    )


class ModelSource:
    """The parameters of a model in memory, for the writers.

    Raises:
      ValueError: the model is not the one that its config describes, so that a checkpoint would
        lack part of it, or part of it lives in other processes.
    """

    def __init__(self, model: Llama4) -> None:
        self.config = model.config
        found = jax.tree_util.tree_flatten_with_path(model)[0]
        arrays = {leaf_name(path): leaf for path, leaf in found}
        if not all(array.is_fully_addressable for array in arrays.values()):
            raise ValueError(
                "part of the model lives in other processes; gather it before it is saved"
            )
        leaves = model_leaves(model.config)
        for name in arrays.keys() - leaves.keys():
            raise ValueError(
                f"{name} {arrays[name].shape} is an array of the model for which no layout has a "
                "place, since a model of this config has none by that name; merge it into the "
                "weight that it adds to, or remove it from the model and save it on its own"
            )
        shapes = {name: array.shape for name, array in arrays.items()}
        check_tensors("the model", {name: leaf.shape for name, leaf in leaves.items()}, shapes)
        self._places: dict[str, tuple[jax.Array, int | None]] = {}
        for leaf_key, leaf in leaves.items():
            for row, name in enumerate(leaf.names):
                self._places[name] = (arrays[leaf_key], row if leaf.is_stacked else None)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._places[name][0].dtype)

    def read(self, name: str, index: Index) -> np.ndarray:
        """Return one slice, put together from the shards that hold parts of it."""
        array, row = self._places[name]
        wanted = index if row is None else (slice(row, row + 1), *index)
        out = np.empty([part.stop - part.start for part in wanted], array.dtype)
        for shard in array.addressable_shards:
            starts = [part.start or 0 for part in shard.index]
            common = overlap(wanted, starts, shard.data.shape)
            if common is not None and not shard.replica_id:
                inside, target = common
                out[target] = np.asarray(shard.data)[inside]
        return out if row is None else out[0]


def save_pretrained(
    model: Pretrained | Llama4,
    directory: str | pathlib.Path,
    *,
    format: Format = "hf",
    dtype: DType | None = None,
    model_parallel: int | None = None,
    progress: Progress = no_progress,
) -> None:
    """Write a model as a checkpoint that `from_pretrained` and the layout's own readers load.

    Args:
      model: a model, or what `from_pretrained` returned, whose tokenizer files are then copied.
      directory: does not exist yet or is empty; it appears only when it is complete.
      format: "hf", "meta" or "orbax".
      dtype: precision to write; None keeps the model's.
      model_parallel: number of files of a Meta checkpoint.
      progress: told of the bytes written.

    Raises:
      ValueError: the layout cannot express the model or has no place for one of its arrays, the
        directory is in use or the disk full.
    """
    is_pretrained = isinstance(model, Pretrained)
    write_source(
        ModelSource(model.model if is_pretrained else model),
        pathlib.Path(directory),
        to=format,
        dtype=dtype,
        model_parallel=model_parallel,
        origin=model.directory if is_pretrained else None,
        progress=progress,
    )
