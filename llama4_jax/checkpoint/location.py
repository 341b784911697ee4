"""Find the folder of a checkpoint by its name: a path, "nano", or an id of the hub."""

import os
import pathlib
import re

NANO = pathlib.Path(__file__).parents[1] / "nano"
"""The model that ships, in Hugging Face's layout."""

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_TEXTS = ["*.json", "*.jinja", "tokenizer.model"]
_WEIGHTS = {"Hugging Face's": "*.safetensors", "Meta's": "consolidated.*.pth"}


def find_checkpoint(
    name: str | os.PathLike[str], *, revision: str | None = None, endpoint: str | None = None
) -> pathlib.Path:
    """Return the folder that a name means; an id of the hub is downloaded into its cache first.

    Args:
      name: a folder, in which a leading ~ is the home; "nano", the model that ships, unless a
        folder of that name is there; or an id such as "meta-llama/Llama-4-Scout-17B-16E-Instruct"
        of huggingface.co, with a revision after an @ if need be. The token and the cache are those
        of huggingface_hub.
      revision: branch, tag or commit of the hub; by default the main branch.
      endpoint: of another hub.

    Raises:
      ValueError: the hub has no such checkpoint, or not in a layout that is read; or it cannot be
        reached, and the checkpoint is not in the cache.
    """
    folder = pathlib.Path(name).expanduser()
    if folder.exists():
        return folder
    if folder == pathlib.Path("nano"):
        return NANO
    found = _HUB_ID.fullmatch(os.fspath(name))
    if found is None or not isinstance(name, str):
        return folder
    return _download(found["repo"], revision or found["revision"], endpoint)


def _download(repo: str, revision: str | None, endpoint: str | None) -> pathlib.Path:
    import huggingface_hub as hub  # half a second, for those who ask for it
    from huggingface_hub import errors

    where = f"{repo}{'' if revision is None else f' at {revision}'}"
    command = f"hf download {repo}{'' if revision is None else f' --revision {revision}'}"
    try:
        # Unlike a listing of files, which is tried again for half a minute, with warnings.
        found = hub.HfApi(endpoint=endpoint).model_info(repo, revision=revision).siblings
        weights = _weights_of([file.rfilename for file in found or ()], where)
        return pathlib.Path(
            hub.snapshot_download(
                repo,
                revision=revision,
                endpoint=endpoint,
                allow_patterns=[*_TEXTS, weights],
                ignore_patterns=["*/*"],
            )
        )
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{where} is gated: accept its licence on the hub, then log in with `hf auth login`."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ValueError(
            f"there is neither a folder {repo} nor a {where} on the hub; if it is private, log in "
            "with `hf auth login`."
        ) from error
    except (errors.HfHubHTTPError, errors.HTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        kept = _kept(repo, revision)
        if kept is not None:
            return kept
        raise ValueError(
            f"{repo} is no folder, and the hub cannot be reached ({type(error).__name__}); where "
            f"it can, run `{command}`, or name a folder."
        ) from error


def _kept(repo: str, revision: str | None) -> pathlib.Path | None:
    """Return what the cache has of a checkpoint."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        return pathlib.Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError, OSError):
        return None


def _weights_of(files: list[str], where: str) -> str:
    """Return the pattern of the weights among the files of a repository.

    Raises:
      ValueError: there are none that are read.
    """
    for pattern in _WEIGHTS.values():
        if any(pathlib.PurePath(file).match(pattern) and "/" not in file for file in files):
            return pattern
    layouts = " or ".join(f"{pattern} ({whose} layout)" for whose, pattern in _WEIGHTS.items())
    raise ValueError(f"{where} has no {layouts}; nothing else is read. It has {len(files)} files.")
