"""Save a run so that it resumes as if it had never stopped, and refuse to resume another run."""

import contextlib
import dataclasses
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from llama4_jax.checkpoint.soundness import bit_sums, check_finite
from llama4_jax.config.runs import RunConfig
from llama4_jax.train.state import TrainState, name_leaves, replace_leaves

FOLDER = "checkpoints"  # in the folder of a run
_MOST_REASON = 300  # characters shown of what Orbax says of a damaged checkpoint

# Fields that a resumed run may change without becoming another run.
_FREE_FIELDS = frozenset(
    {
        "steps",
        "mesh",
        "preset",
        "remat",
        "log_interval",
        "eval_interval",
        "eval_batches",
        "checkpoint_interval",
        "keep_checkpoints",
        "max_skipped_in_a_row",
    }
)

# Leaves that are noted beside the arrays; an older checkpoint lacks them.
_COUNTERS = frozenset({"skipped", "skipped_in_a_row"})


class Checkpoints:
    """The checkpoints of one run: training state, position in the data and the run's description.

    Saving copies the arrays off the devices and writes them while training goes on; a checkpoint
    appears under its step number only when it is complete.

    Args:
        directory: Absolute folder, made when missing.
        run: The run; a folder that holds another run is refused.
    """

    def __init__(self, directory: Path, run: RunConfig) -> None:
        self._run = run
        options = ocp.CheckpointManagerOptions(max_to_keep=run.keep_checkpoints)
        self._manager = ocp.CheckpointManager(directory, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, iterator: grain.DatasetIterator) -> None:
        """Save the state and the iterator's position, unless this step is already saved.

        Raises:
            ValueError: A leaf of the state is not finite; what is saved stays as it is.
        """
        step = int(state.step)
        if step == self.latest_step:
            return
        leaves = name_leaves(state)
        check_finite(leaves, what=f"the state at step {step}")
        counters = {name: int(leaves.pop(name)) for name in _COUNTERS}
        notes = {"counters": counters, "sums": _sums(leaves, iterator)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(leaves),
                data=grain.checkpoint.CheckpointSave(iterator),
                run=ocp.args.JsonSave(_describe(self._run)),
                notes=ocp.args.JsonSave(notes),
            ),
        )

    def restore(self, shapes: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        """Return the newest state and move the iterator to where it stood.

        Args:
            shapes: The state's shapes, dtypes and shardings, from `parallel.abstract`.
            iterator: Is set to the saved position.

        Raises:
            ValueError: The checkpoint belongs to another run or is damaged, or nothing is saved.
        """
        step = self.latest_step
        if step is None:
            raise ValueError("nothing is saved here; start from the initial state.")
        self._check_run(step)
        wanted = name_leaves(_with_devices(shapes))
        for name in _COUNTERS:
            del wanted[name]
        with self._naming_damage(step):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(wanted),
                    data=grain.checkpoint.CheckpointRestore(iterator),
                    **({"notes": ocp.args.JsonRestore()} if self._has_notes(step) else {}),
                ),
            )
            leaves = restored["state"]
            if (notes := restored.get("notes")) is not None:
                _check_sums(saved=notes["sums"], found=_sums(leaves, iterator))
            counters = dict.fromkeys(_COUNTERS, 0) if notes is None else notes["counters"]
            leaves |= {name: jnp.asarray(n, jnp.int32) for name, n in counters.items()}
        return replace_leaves(shapes, leaves)

    def _has_notes(self, step: int) -> bool:
        """Return whether a checkpoint is young enough to have notes."""
        return (self._manager.directory / str(step) / "notes").exists()

    @contextlib.contextmanager
    def _naming_damage(self, step: int) -> Iterator[None]:
        """Say of whatever is wrong inside that the checkpoint is damaged, and what to do."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            reason = " ".join(str(error).split())[:_MOST_REASON]
            raise ValueError(
                f"{self._manager.directory / str(step)} is damaged ({reason}); remove it to go on "
                "from the checkpoint before it."
            ) from error

    def is_complete(self) -> bool:
        """Return whether the run has taken all its steps, and no more.

        Raises:
            ValueError: The checkpoint belongs to another run.
        """
        step = self.latest_step
        if step is not None:
            self._check_run(step)
        return step == self._run.steps

    def _check_run(self, step: int) -> None:
        """Raise ValueError if a checkpoint belongs to another run."""
        wanted = ocp.args.Composite(run=ocp.args.JsonRestore())
        with self._naming_damage(step):
            saved = self._manager.restore(step, args=wanted)
        asked = _describe(self._run)
        _refuse_other_run(saved=_complete(saved["run"], asked, self._run), asked=asked)

    def close(self) -> None:
        """Wait for what is being written and release the folder."""
        self._manager.wait_until_finished()
        self._manager.close()


def is_complete(run: RunConfig, workdir: Path) -> bool:
    """Return whether `fit` has taken all steps of a run in a folder, and no more.

    Raises:
        ValueError: The folder holds another run.
    """
    directory = workdir.resolve() / FOLDER
    if not directory.is_dir():
        return False
    with Checkpoints(directory, run) as checkpoints:
        return checkpoints.is_complete()


def _sums(leaves: dict[str, jax.Array], iterator: grain.DatasetIterator) -> dict[str, int]:
    """Add up the bits of all that is saved, by name; "data" is the position in the data."""
    position = json.dumps(iterator.get_state(), sort_keys=True, default=str)
    return {**bit_sums(leaves), "data": zlib.crc32(position.encode())}


def _check_sums(*, saved: dict[str, int], found: dict[str, int]) -> None:
    for name in found.keys() | saved.keys():
        if found.get(name) != saved.get(name):
            raise ValueError(f"{name} is not what was saved")


def _with_devices(shapes: Any) -> Any:
    """Put what has no sharding, because there is no mesh, on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or device)

    return jax.tree.map(place, shapes)


def _describe(run: RunConfig) -> dict[str, Any]:
    """List the fields that make the run what it is, in JSON's types."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    fields = dataclasses.asdict(run)
    return {name: plain(value) for name, value in fields.items() if name not in _FREE_FIELDS}


def _complete(saved: dict[str, Any], asked: dict[str, Any], config: Any) -> dict[str, Any]:
    """Give the fields that are younger than a saved description their defaults.

    Args:
        saved: The description of a run, or of a part of it.
        asked: The same of the run that wants to go on.
        config: The dataclass that `asked` describes.
    """
    completed = dict(saved)
    for field in dataclasses.fields(config):
        name, part = field.name, getattr(config, field.name)
        if name in saved and dataclasses.is_dataclass(part) and isinstance(saved[name], dict):
            completed[name] = _complete(saved[name], asked[name], part)
        elif name in asked and name not in saved and field.default is not dataclasses.MISSING:
            completed[name] = field.default
    return completed


def _differences(saved: Any, asked: Any, name: str = "") -> list[str]:
    """Say of each leaf of two descriptions that differs what it is in either."""
    if isinstance(saved, dict) and isinstance(asked, dict):
        nothing = "not there"
        return [
            difference
            for key in sorted(saved.keys() | asked.keys())
            for difference in _differences(
                saved.get(key, nothing), asked.get(key, nothing), f"{name}.{key}" if name else key
            )
        ]
    return [] if saved == asked else [f"{name} is {saved} in the run and {asked} here"]


def _refuse_other_run(*, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    if differences := _differences(saved, asked):
        raise ValueError(
            f"the checkpoint is of another run: {'; '.join(differences)}. Train in a new workdir "
            f"or ask for the saved run."
        )
