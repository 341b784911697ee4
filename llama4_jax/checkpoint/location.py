"""Find the folder of a checkpoint by what a person calls it."""

import os
import pathlib

NANO = pathlib.Path(__file__).parents[1] / "nano"
"""The model that ships, in Hugging Face's layout."""


def find_checkpoint(name: str | os.PathLike[str]) -> pathlib.Path:
    """Return the folder that a name means.

    Args:
      name: a folder, in which a leading ~ is the home; or "nano", the model that ships, unless a
        folder of that name is there.
    """
    folder = pathlib.Path(name).expanduser()
    return NANO if folder == pathlib.Path("nano") and not folder.exists() else folder
