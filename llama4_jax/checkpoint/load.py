"""Models read into their shards, and read back for the writers."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from llama4_jax import parallel
from llama4_jax.checkpoint.file_tensors import check_tensors
from llama4_jax.checkpoint.parameters import Index, Leaf, Source, model_leaves, overlap
from llama4_jax.checkpoint.soundness import check_finite
from llama4_jax.checkpoint.writer import Advance, Progress, no_progress
from llama4_jax.config import ModelConfig
from llama4_jax.layers.param import leaf_name
from llama4_jax.model import Llama4


def load_model(source: Source, config: ModelConfig, *, progress: Progress = no_progress) -> Llama4:
    """Read a model into the shards of the active mesh, or onto one device if there is none.

    Each device's part of each parameter is read from the files on its own, so the host never holds
    more than the largest shard.

    Args:
      source: the parameters.
      config: of the model, with the dtype to hold it in.
      progress: told of the bytes of parameters that lie on their devices.

    Raises:
      ValueError: a file is damaged, or a weight does not divide over the mesh.
    """
    skeleton = parallel.abstract(lambda: Llama4(config, key=jax.random.key(0)))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(skeleton))
    with progress(size) as advance:
        return jax.tree_util.tree_map_with_path(_filler(source, config, advance), skeleton)


def _filler(source: Source, config: ModelConfig, advance: Advance) -> Callable[..., jax.Array]:
    leaves = model_leaves(config)
    default = SingleDeviceSharding(jax.local_devices()[0])

    def fill(path: tuple[Any, ...], array: jax.ShapeDtypeStruct) -> jax.Array:
        sharding = array.sharding if parallel.has_mesh() else default
        placed = _place(source, leaves[leaf_name(path)], array.dtype, sharding)
        advance(placed.nbytes)
        return placed

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


class ModelSource:
    """The parameters of a model in memory, for the writers.

    Raises:
      ValueError: the model is not the one that its config describes, so that a checkpoint would
        lack part of it, part of it lives in other processes, or a weight is not finite.
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
        check_finite(arrays, what="the model")
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
