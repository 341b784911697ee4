"""A model with what belongs to it: its tokenizer, its defaults and the mesh that it lies on."""

import contextlib
import dataclasses
import pathlib
from contextlib import AbstractContextManager
from typing import cast, get_args

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from llama4_jax import parallel
from llama4_jax.checkpoint.convert import GENERATION, Format, open_checkpoint, write_source
from llama4_jax.checkpoint.load import ModelSource, load_model
from llama4_jax.checkpoint.location import find_checkpoint
from llama4_jax.checkpoint.writer import Progress, no_progress
from llama4_jax.config import DType, ModelConfig
from llama4_jax.config.generation import GenerationDefaults, read_generation
from llama4_jax.model import Llama4
from llama4_jax.text import ChatTemplate, Tokenizer, load_chat_template, load_tokenizer
from llama4_jax.untrusted import shown


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Pretrained:
    """A model with what belongs to it; `generate`, `score` and `save_pretrained` take it whole.

    Attributes:
      model: parameters on their devices; `model.config` is `config`.
      tokenizer: None if the checkpoint has none: the model then takes and gives token ids.
      chat_template: the checkpoint's own, or None.
      generation: how to sample by default.
      directory: where it was loaded from, or None.
      mesh: the devices that the model is sharded over, or None for one.
      rules: how it lies on the mesh.
    """

    model: Llama4
    config: ModelConfig
    tokenizer: Tokenizer | None = None
    chat_template: ChatTemplate | None = None
    generation: GenerationDefaults = dataclasses.field(default_factory=GenerationDefaults)
    directory: pathlib.Path | None = None
    mesh: Mesh | None = None
    rules: parallel.Rules = parallel.PRESETS["single"]

    def on_mesh(self) -> AbstractContextManager[None]:
        """Activate the model's mesh, for whatever calls the model itself."""
        if self.mesh is None:  # then it may lie on one that its owner has activated
            return contextlib.nullcontext()
        return parallel.use_mesh(self.mesh, self.rules)

    def __repr__(self) -> str:
        """Say what it is in a line, without its arrays."""
        arrays = jax.tree.leaves(self.model)
        size, width = (sum(getattr(x, name) for x in arrays) for name in ("size", "nbytes"))
        where = "one device"
        if self.mesh is not None:
            where = "mesh " + ",".join(f"{axis}:{n}" for axis, n in self.mesh.shape.items())
        return (
            f"Pretrained({self.config.name}: {size:,} parameters, {width / 1e9:.3g} GB, computes "
            f"in {self.config.dtype}, on {where}, "
            f"{'no' if self.tokenizer is None else 'with'} tokenizer)"
        )


def from_pretrained(
    directory: str | pathlib.Path,
    *,
    revision: str | None = None,
    mesh: Mesh | str | None = None,
    rules: parallel.Rules | None = None,
    dtype: DTypeLike | None = None,
    progress: Progress = no_progress,
) -> Pretrained:
    """Load a checkpoint of any layout onto one device or a mesh.

    Each device's part of each parameter is read from the files on its own, so the host never holds
    more than the largest shard.

    Args:
      directory: a Hugging Face, Meta or native checkpoint; the layout is recognised. "nano" is the
        model that ships, and an id of huggingface.co, such as
        "meta-llama/Llama-4-Scout-17B-16E-Instruct", is downloaded into the cache of
        huggingface_hub.
      revision: of the hub: a branch, tag or commit.
      mesh: where to lay the model out, such as "expert:4,tensor:2"; None is the default device.
        The result remembers it.
      rules: which mesh axes divide which logical axes; by default `parallel.serving_rules`.
      dtype: of parameters and activations, "bfloat16" or "float32" or jax's name of them; by
        default the checkpoint's own.
      progress: told of the bytes of parameters that lie on their devices.

    Raises:
      ValueError: the checkpoint is damaged or incomplete, the mesh cannot be made, or a weight
        does not divide over it.
    """
    directory = find_checkpoint(directory, revision=revision)
    if isinstance(mesh, str):
        mesh = parallel.make_mesh(mesh)
    source = open_checkpoint(directory)
    config = dataclasses.replace(source.config, dtype=_name_of(dtype) or source.config.dtype)
    tokenizer = load_tokenizer(directory)
    if tokenizer is not None and tokenizer.vocab_size > config.text.vocab_size:
        raise ValueError(
            f"the tokenizer of {directory} has ids up to {tokenizer.vocab_size - 1}, but the "
            f"model's table has {config.text.vocab_size} rows; take the tokenizer that the model "
            "was trained with"
        )
    if rules is None:
        sizes = {} if mesh is None else dict(mesh.shape)
        rules = parallel.serving_rules(sizes, num_kv_heads=config.text.num_kv_heads)
    with parallel.use_mesh(mesh, rules):
        model = load_model(source, config, progress=progress)
    return Pretrained(
        model=model,
        config=config,
        tokenizer=tokenizer,
        chat_template=load_chat_template(directory),
        generation=read_generation(directory / GENERATION, config),
        directory=directory,
        mesh=mesh,
        rules=rules,
    )


def _name_of(dtype: DTypeLike | None) -> DType | None:
    """Return the name of a precision, whichever way it is given.

    Raises:
      ValueError: it is not one that a model computes in.
    """
    if dtype is None:
        return None
    name = getattr(dtype, "__name__", str(dtype))
    if name not in get_args(DType):
        raise ValueError(f"dtype {shown(name)} must be {' or '.join(get_args(DType))}")
    return cast(DType, name)


def save_pretrained(
    model: Pretrained | Llama4,
    directory: str | pathlib.Path,
    *,
    format: Format = "hf",
    dtype: DTypeLike | None = None,
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
        pathlib.Path(directory).expanduser(),
        to=format,
        dtype=_name_of(dtype),
        model_parallel=model_parallel,
        origin=model.directory if is_pretrained else None,
        progress=progress,
    )
