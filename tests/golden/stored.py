"""Read the golden files."""

import functools
import pathlib

import numpy as np


@functools.cache
def golden(kind: str) -> dict[str, np.ndarray]:
    """Read `<kind>.npz`, for example hf_text."""
    with np.load(pathlib.Path(__file__).parent / f"{kind}.npz") as file:
        return dict(file)


def from_bits(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of stored bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
