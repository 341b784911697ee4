"""Which device a kernel is traced for, and which backend serves it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

Backend = Literal["reference", "tpu", "gpu"]

_interpreting = jax.make_user_context(default_value=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Run the kernels in Pallas' interpreters, which simulate a TPU or a GPU on any device.

    Slow, and only for tests: memories, copies and semaphores are simulated, and races between them
    reported.
    """
    with _interpreting(True):
        yield


def tpu_interpreter() -> Any:
    """Return what `pallas_call` takes as `interpret`."""
    return pltpu.InterpretParams(detect_races=True) if _interpreting.value else False


def gpu_interpreter() -> Any:
    """Return what `plgpu.kernel` takes as `interpret`."""
    return plgpu.InterpretGPUParams(detect_races=True) if _interpreting.value else False


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
    """Return the kind of device as jax names it: "TPU v5", "NVIDIA H100 80GB HBM3", "cpu"."""
    return _device().device_kind


def choose(
    backend: Backend | None, operation: str, refusals: Mapping[Backend, Callable[[], str | None]]
) -> Backend:
    """Choose who computes an operation.

    Args:
        backend: a name, which is obeyed or refused, or None for the best that can.
        operation: the name of the operation, for the error.
        refusals: for "tpu" and "gpu", a function that returns why the backend cannot take these
            shapes and dtypes, or None if it can.

    Raises:
        ValueError: the name is unknown.
        NotImplementedError: the named backend cannot compute this here.
    """
    if backend == "reference":
        return backend
    if backend is None:
        here = platform()
        is_able = here in refusals and refusals[here]() is None  # type: ignore[index]
        return here if is_able else "reference"  # type: ignore[return-value]
    if backend not in refusals:
        names = ", ".join(["reference", *refusals])
        raise ValueError(f"backend {backend!r} of {operation} is unknown; choose from {names}")
    reason = refusals[backend]()
    if reason is None and not _interpreting.value and platform() != backend:
        reason = f"it needs a {backend.upper()}, and this is {device_kind()}"
    if reason is not None:
        raise NotImplementedError(
            f"backend {backend!r} cannot compute this {operation}: {reason}; backend=None takes "
            "the best one that can"
        )
    return backend
