"""Which device a kernel is traced for, and which backend serves it."""

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal, get_args

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import chips

Backend = Literal["reference", "tpu", "gpu"]

_interpreting = jax.make_user_context(default_value=False)
_without_kernels = jax.make_user_context(default_value=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Run the kernels in Pallas' interpreters, which simulate a TPU or a GPU on any device.

    Slow, and only for tests: memories, copies and semaphores are simulated, and a race between them
    is an error (with jax 0.11, which cannot raise, it is printed). The simulators of some kernels
    do not know over which mesh axes a value varies: tests that call them inside `jax.shard_map`
    give it check_vma=False.
    """
    with _interpreting(True):
        yield


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Let backend=None mean the reference everywhere, to compare with what the kernels give."""
    with _without_kernels(True):
        yield


def is_interpreting() -> bool:
    """Whether kernels run in an interpreter."""
    return _interpreting.value


def _watching(params: type, **more: Any) -> Any:
    """Return parameters of an interpreter that looks for races."""
    raises = any(field.name == "on_race" for field in dataclasses.fields(params))
    return params(detect_races=True, **({"on_race": "raise"} if raises else {}), **more)


def tpu_interpreter(cores: int | None = None) -> Any:
    """Return what `pallas_call` takes as `interpret`.

    Args:
        cores: of a device, to simulate side by side; as many as this TPU has.
    """
    if not _interpreting.value:
        return False
    return _watching(pltpu.InterpretParams, num_cores_or_threads=cores or num_cores())


def gpu_interpreter() -> Any:
    """Return what `plgpu.kernel` takes as `interpret`."""
    return _watching(plgpu.InterpretGPUParams) if _interpreting.value else False


def vary_alike(arrays: Any) -> Any:
    """Let all arrays vary over the manual mesh axes over which one of them does.

    Inside `jax.shard_map` the types of arrays say over which axes they vary, and loops and kernels
    want them alike. The gradient of an array that did not vary is summed over the axes, as it must
    be. Elsewhere this is the identity.
    """
    axes = frozenset[str]()
    for array in jax.tree.leaves(arrays):
        axes |= jax.typeof(array).manual_axis_type.varying

    def vary(array: jax.Array) -> jax.Array:
        lacks = tuple(sorted(axes - jax.typeof(array).manual_axis_type.varying))
        return jax.lax.pcast(array, lacks, to="varying") if lacks else array

    return jax.tree.map(vary, arrays)


def like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Describe an output that varies over the same manual mesh axes as an input."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def tpu() -> chips.Chip:
    """Return the TPU that programs are traced for: TPU7x if it is unknown or simulated."""
    known = chips.find(device_kind())
    return known if known is not None and known.platform == "tpu" else chips.TPU7X


def gpu() -> chips.Chip:
    """Return the GPU that programs are traced for: an H100 if it is unknown or simulated."""
    known = chips.find(device_kind())
    return known if known is not None and known.platform == "gpu" else chips.H100


def num_cores() -> int:
    """Return on how many cores a program for this TPU runs; each should have its part of it."""
    return tpu().cores


def multiplier() -> int:
    """Return the rows and columns of the matrix multiplier of this TPU."""
    return tpu().multiplier


def _device() -> Any:
    """Return the device programs are traced for: that of the mesh in force, or the default one.

    A program compiled for a machine that is not there has its devices in the mesh alone.
    """
    in_mesh = jax.sharding.get_abstract_mesh().abstract_device
    return in_mesh if in_mesh is not None else jax.local_devices()[0]


def platform() -> str:
    """Return "cpu", "tpu" or "gpu"."""
    return _device().platform


def device_kind() -> str:
    """Return the kind of device as jax names it; `chips` knows what it stands for."""
    return _device().device_kind


def other_device(backend: Backend) -> str | None:
    """Return why the device at hand is none that a backend is made for, or None if it is one."""
    if backend == "reference" or _interpreting.value:
        return None
    if platform() != backend:
        return f"it needs a {backend.upper()}, and this is {device_kind()}"
    known, made_for = chips.find(device_kind()), chips.TPUS_WITH_KERNELS
    if backend == "tpu" and known not in made_for:
        names = ", ".join(chip.name for chip in made_for)
        return f"it is made for {names}, and this is {device_kind()}"
    return None


def choose(name: Backend | None, operation: str, *arguments: Any) -> ModuleType:
    """Choose the module that computes an operation.

    Args:
        name: a backend, which is obeyed or refused, or None for the best that can.
        operation: the package of the operation. Its modules `tpu` and `gpu` have a function
            `unsupported_reason`, which returns why they cannot take these arguments, None if they
            can.
        *arguments: of `unsupported_reason`.

    Raises:
        ValueError: the name is unknown.
        NotImplementedError: the named backend cannot compute this here.
    """

    def module(name: str) -> ModuleType:
        return importlib.import_module(f"kernels_pallas.{operation}.{name}")

    def reason_against(name: Backend) -> str | None:
        return module(name).unsupported_reason(*arguments) or other_device(name)

    if name is None:
        kernels: dict[str, Backend] = {"tpu": "tpu", "gpu": "gpu"}
        here = None if _without_kernels.value else kernels.get(platform())
        return module(here if here and reason_against(here) is None else "reference")
    if name not in get_args(Backend):
        raise ValueError(f"backend {name!r} is unknown; choose from {', '.join(get_args(Backend))}")
    if name == "reference":
        return module(name)
    reason = reason_against(name)
    if reason is not None:
        raise NotImplementedError(
            f"backend {name!r} of {operation} refuses: {reason}; backend=None takes the best that "
            "does not"
        )
    return module(name)
