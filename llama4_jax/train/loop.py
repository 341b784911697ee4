"""Train: batches in, a model, checkpoints and metrics out."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import optax

from llama4_jax import parallel
from llama4_jax.config.runs import RunConfig
from llama4_jax.train.checkpoints import FOLDER, Checkpoints
from llama4_jax.train.interrupt import StopRequest, catch_stop_signals
from llama4_jax.train.metrics import SpeedMeter, name_metrics
from llama4_jax.train.objective import Batch, Metrics
from llama4_jax.train.optimizer import make_optimizer
from llama4_jax.train.state import TrainState, initial_state, start_state
from llama4_jax.train.step import make_eval_step, pretraining_step
from llama4_jax.train.workdir import lock_workdir
from llama4_jax.train.writers import Writer, WriterGroup, open_writers

_MOST_POSITION = 300  # characters shown of a position in the data

HeldOut = Mapping[str, Iterable[Batch]]
"""Held-out sets by name; each is iterated from its beginning at every evaluation."""


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a call of `fit` left behind.

    Attributes:
        state: The state after the last step taken.
        is_finished: Whether the last step has been taken.
        stop_signal: Number of the signal that asked the run to stop, or None.
        scores: Metrics of the last evaluation, as "code/nll"; empty when there was none.
    """

    state: TrainState
    is_finished: bool
    stop_signal: int | None
    scores: Mapping[str, float]


def activate_mesh(run: RunConfig) -> AbstractContextManager[None]:
    """Activate the run's mesh and sharding rules; one device when it names no mesh.

    Raises:
        ValueError: The preset or the mesh is unknown or needs more devices than there are.
    """
    if run.preset not in parallel.PRESETS:
        raise ValueError(
            f"preset ({run.preset!r}) is unknown; choose one of {', '.join(parallel.PRESETS)}."
        )
    mesh = parallel.make_mesh(run.mesh) if run.mesh else None
    return parallel.use_mesh(mesh, parallel.PRESETS[run.preset])


def place_batch(batch: Batch) -> dict[str, jax.Array]:
    """Lay a host batch out over the active mesh: rows by "batch" and "seq", images by "tiles"."""

    def place(name: str, array: Any) -> jax.Array:
        rest = (None,) * (array.ndim - 1)
        axes = ("tiles", *rest) if name == "tiles_NCHW" else ("batch", "seq")
        return parallel.shard(jnp.asarray(array), axes)

    return {name: place(name, array) for name, array in batch.items()}


def measure(
    model: Any, batches: Iterable[Batch], *, eval_step: Callable[[Any, Batch], Any]
) -> dict[str, float]:
    """Measure a model on batches: "nll" in nats per counted token and "accuracy" of the argmax.

    Args:
        model: The model.
        batches: Host batches.
        eval_step: From `make_eval_step`.
    """
    sums = [eval_step(model, place_batch(batch)) for batch in batches]
    if not sums:
        raise ValueError("there is no batch to measure on; give at least one.")
    total = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *sums)
    return {
        "nll": float(total.mean(total.nll)),
        "accuracy": float(total.mean(total.correct)),
        "tokens": float(total.weight),
    }


def fit(
    run: RunConfig,
    *,
    build: Callable[[], Any],
    batches: grain.IterDataset[Any],
    workdir: Path,
    initial_model: Any | None = None,
    held_out: HeldOut | None = None,
    writers: Sequence[Writer] = (),
) -> FitResult:
    """Train until the run's last step, or until asked to stop by SIGTERM or SIGINT.

    Begins from the newest checkpoint in `workdir`/checkpoints when there is one, and then takes
    exactly the steps that an uninterrupted run would have taken. Saves at the run's interval, at
    the last step and when asked to stop. A step with a loss or gradient that is not finite changes
    nothing and is written among the metrics.

    Args:
        run: The run.
        build: Returns the freshly initialised model; `run.seed` decides its weights.
        batches: Yields `Batch` dicts of NumPy arrays.
        workdir: Folder for checkpoints and metrics.
        initial_model: What an earlier stage of training left, to begin with instead of a fresh
            model; its arrays are given up.
        held_out: Held-out sets to evaluate on.
        writers: Take the metrics in addition to the files in `workdir`.

    Raises:
        ValueError: `workdir` holds another run or is in use by one, `run.max_skipped_in_a_row`
            steps in a row were not finite, or a parameter is not; the newest checkpoint stays.
    """
    workdir = workdir.resolve()
    with (
        lock_workdir(workdir) if jax.process_index() == 0 else nullcontext(),
        activate_mesh(run),
        catch_stop_signals() as stop,
        Checkpoints(workdir / FOLDER, run) as checkpoints,
    ):
        optimizer = make_optimizer(run.optimizer, steps=run.steps)
        iterator, resume_step = iter(batches), checkpoints.latest_step or 0
        state = _first_state(optimizer, build, initial_model, checkpoints, iterator)
        writer = WriterGroup([open_writers(workdir, resume_step=resume_step), *writers])
        try:
            return _Loop(
                run=run,
                train_step=pretraining_step(run, optimizer),
                eval_step=make_eval_step(run.loss),
                iterator=iterator,
                held_out=held_out or {},
                checkpoints=checkpoints,
                meter=_make_meter(run),
                writer=writer,
                stop=stop,
            ).run_from(state)
        finally:
            writer.close()


def _first_state(
    optimizer: optax.GradientTransformationExtraArgs,
    build: Callable[[], Any],
    initial_model: Any | None,
    checkpoints: Checkpoints,
    iterator: Any,
) -> TrainState:
    """Return the newest checkpoint, or else the state that a run begins with."""
    create = initial_state(build, optimizer)
    if checkpoints.latest_step is not None:
        return checkpoints.restore(parallel.abstract(create), iterator)
    if initial_model is not None:
        return jax.jit(partial(start_state, optimizer=optimizer))(initial_model)
    return jax.jit(create)()


def _nothing() -> None:
    """Settle no step."""


def _size(batch: Batch) -> dict[str, int]:
    rows, row_length = batch["tokens_BT"].shape
    tiles = batch["tiles_NCHW"].shape[0] if "tiles_NCHW" in batch else 0
    return {"rows": rows, "row_length": row_length, "tiles": tiles}


def _make_meter(run: RunConfig) -> SpeedMeter:
    num_devices = math.prod(parallel.parse_mesh(run.mesh).values())
    kind = jax.devices()[0].device_kind
    return SpeedMeter(run.model, num_devices=num_devices, device_kind=kind)


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """The parts of a run in progress."""

    run: RunConfig
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    iterator: grain.DatasetIterator
    held_out: HeldOut
    checkpoints: Checkpoints
    meter: SpeedMeter
    writer: Writer
    stop: StopRequest

    def run_from(self, state: TrainState) -> FitResult:
        """Take steps until the end or a request to stop, then save."""
        run, step = self.run, int(state.step)
        scores: dict[str, float] = {}
        settle = _nothing
        while step < run.steps and not self.stop.is_due(step):
            batch = place_batch(next(self.iterator))
            state, metrics = self.train_step(state, batch)
            step += 1
            settle()  # the step before this one, while the devices are at work
            settle = partial(self._settle, step, metrics, **_size(batch))
            is_eval_due = self._is_due(step, run.eval_interval)
            is_save_due = self._is_due(step, run.checkpoint_interval)
            if is_eval_due or is_save_due or not self.meter.is_running:
                settle()
                settle = _nothing
                self.meter.pause()
                if is_eval_due:
                    scores = self._evaluate(step, state)
                if is_save_due:
                    self.checkpoints.save(state, self.iterator)
                self.meter.start()  # from the second step on: the first one compiles
        settle()
        self.checkpoints.save(state, self.iterator)
        return FitResult(
            state=state,
            is_finished=step >= run.steps,
            stop_signal=self.stop.signal_number,
            scores=scores,
        )

    def _is_due(self, step: int, interval: int) -> bool:
        return step == self.run.steps or (interval > 0 and step % interval == 0)

    def _settle(self, step: int, metrics: Metrics, **size: int) -> None:
        """Wait for a step, count it, write its metrics if they are due or bad, or give up."""
        in_a_row = int(metrics["skipped_in_a_row"])
        self.meter.count(**size)
        if in_a_row or self._is_due(step, self.run.log_interval):
            named = name_metrics(metrics, moe_layers=self.run.model.text.moe_layers)
            self.writer.write(step, named | self.meter.take())
        if in_a_row >= self.run.max_skipped_in_a_row:
            first, latest = step - in_a_row + 1, self.checkpoints.latest_step
            where = json.dumps(self.iterator.get_state(), default=str)
            raise ValueError(
                f"{in_a_row} steps in a row, {first} to {step}, had a loss or gradient that is "
                f"not finite (the last: loss {metrics['loss']:.4g}, gradient norm "
                f"{metrics['gradient_norm']:.4g}) and changed nothing. Look at batches {first} to "
                f"{step} of the data, whose position is now {where[:_MOST_POSITION]}; lower the "
                f"learning rate in a new workdir; or raise max_skipped_in_a_row "
                f"({self.run.max_skipped_in_a_row}). The newest checkpoint is "
                f"{'not there yet' if latest is None else f'of step {latest}'}."
            )

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        scores = {}
        for name, batches in self.held_out.items():
            some = islice(batches, self.run.eval_batches)
            found = measure(state.model, some, eval_step=self.eval_step)
            scores |= {f"{name}/{key}": value for key, value in found.items()}
        if scores:
            self.writer.write(step, {f"eval/{key}": value for key, value in scores.items()})
        return scores
