"""Read the real data the smallest member learns from: Python's own sources, handwritten digits.

Every source has a held-out part that is decided by a hash of the item itself, so it stays the same
when other items come or go, on every machine and in every order.
"""

import dataclasses
import hashlib
import pathlib
import sysconfig
from typing import Literal

import numpy as np

Split = Literal["train", "held_out"]

# One item in so many is held out.
HELD_OUT_CODE = 25
HELD_OUT_DIGITS = 8

# Installed packages, tests, generated tables and files that differ between machines.
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "__phello__",
        "dist-packages",
        "encodings",
        "idle_test",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
_DIGITS = pathlib.Path(__file__).parent / "digits.npz"


@dataclasses.dataclass(frozen=True)
class CodeDocument:
    """One source file: its path below the root with forward slashes, and its text."""

    path: str
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class DigitScans:
    """Handwritten digits as grey pictures, ink bright on black.

    Attributes:
        pixels_NHW: [N, 8, 8] uint8, 0 is paper and 255 is full ink.
        labels_N: [N] int64, the digit 0..9.
    """

    pixels_NHW: np.ndarray
    labels_N: np.ndarray

    def __len__(self) -> int:
        return len(self.labels_N)


def split_of(key: bytes, one_in: int) -> Split:
    """Say which part an item belongs to: one in `one_in` is held out, by SHA-256 of its key."""
    number = int.from_bytes(hashlib.sha256(key).digest()[:8])
    return "held_out" if number % one_in == 0 else "train"


def read_code(split: Split, root: pathlib.Path | None = None) -> list[CodeDocument]:
    """Read the .py files below a folder in the order of their paths.

    Tests, generated tables, installed packages, empty files and files that are not UTF-8 are left
    out. A file's relative path decides its part.

    Args:
        split: "train" or "held_out".
        root: the folder; None is the standard library of the running Python.

    Raises:
        ValueError: the folder has no source file in this part.
    """
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    documents = []
    for file in folder.rglob("*.py"):
        path = file.relative_to(folder)
        if any(p in _SKIPPED_FOLDERS or p.startswith(_SKIPPED_PREFIXES) for p in path.parts):
            continue
        if split_of(path.as_posix().encode(), HELD_OUT_CODE) != split:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            documents.append(CodeDocument(path.as_posix(), text))
    if not documents:
        raise ValueError(f"{folder} has no UTF-8 .py file in the {split!r} part; give another one")
    return sorted(documents, key=lambda document: document.path)


def read_digits(split: Split) -> DigitScans:
    """Read 1797 scans of handwritten digits; a scan's pixels decide its part.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine
    Learning Repository, CC BY 4.0, doi:10.24432/C50P49; the test part, as scikit-learn has it.
    """
    with np.load(_DIGITS) as scans:
        ink_NHW, labels_N = scans["ink_NHW"], scans["labels_N"].astype(np.int64)
    # Ink is whole numbers from 0 to 16.
    pixels_NHW = np.round(ink_NHW * (255 / 16)).astype(np.uint8)
    is_chosen = [split_of(pixels.tobytes(), HELD_OUT_DIGITS) == split for pixels in pixels_NHW]
    return DigitScans(pixels_NHW[is_chosen], labels_N[is_chosen])
