import dataclasses
import json
import os
import shutil
import signal
from itertools import islice

import grain
import jax
import numpy as np
import pytest

from llama4_jax.config.runs import OptimizerConfig
from llama4_jax.model import Llama4
from llama4_jax.train import fit
from llama4_jax.train.checkpoints import _complete, _describe, _refuse_other_run
from llama4_jax.train.state import name_leaves
from tests.tiny import scout_like
from tests.train.toy import build, make_dataset, make_run


class StopAt:
    """Ask this process to stop when a step's metrics are written."""

    def __init__(self, step):
        self.step = step

    def write(self, step, scalars):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def close(self):
        pass


def train(workdir, run=None, **options):
    parts = {"build": build, "batches": make_dataset()} | options
    return fit(run or make_run(), workdir=workdir, **parts)


def assert_same_bits(state, other):
    for name, leaf in name_leaves(state).items():
        np.testing.assert_array_equal(leaf, name_leaves(other)[name], err_msg=name)


def read(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return {r["step"]: r["train/loss"] for r in read(workdir) if "train/loss" in r}


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    whole = train(tmp_path / "whole")
    half = train(tmp_path / "cut", writers=[StopAt(3)])
    assert not half.is_finished and half.stop_signal == signal.SIGTERM
    assert half.state.step == 3
    resumed = train(tmp_path / "cut")
    assert resumed.is_finished and resumed.stop_signal is None
    assert_same_bits(resumed.state, whole.state)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    again = train(tmp_path / "cut")  # finished: takes no more steps
    assert_same_bits(again.state, whole.state)


def test_a_killed_run_resumes_from_its_newest_checkpoint(tmp_path):
    run = make_run(checkpoint_interval=2)

    class Die(StopAt):
        def write(self, step, scalars):
            if step == self.step:
                raise RuntimeError("out of power")

    with pytest.raises(RuntimeError, match="out of power"):
        train(tmp_path / "cut", run, writers=[Die(5)])
    resumed = train(tmp_path / "cut", run)
    assert_same_bits(resumed.state, train(tmp_path / "whole", run).state)
    assert sorted(losses(tmp_path / "cut")) == [1, 2, 3, 4, 5, 6]
    kept = {path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()}
    assert kept == {"4", "6"}


def test_training_learns_and_scores_held_out_data(tmp_path):
    run = make_run(steps=60, eval_interval=30, eval_batches=2, log_interval=20)
    held_out = {"cycle": list(islice(make_dataset(), 2))}
    result = train(tmp_path, run, held_out=held_out)
    assert result.scores["cycle/accuracy"] > 0.95
    assert result.scores["cycle/tokens"] == 2 * 4 * 8
    found = losses(tmp_path)
    assert sorted(found) == [20, 40, 60]
    assert found[60] < 0.5 * found[20]
    assert [r["step"] for r in read(tmp_path) if "eval/cycle/nll" in r] == [30, 60]
    assert any("speed/tokens_per_second" in r for r in read(tmp_path))


def test_a_second_stage_begins_with_the_model_of_the_first(tmp_path):
    first = train(tmp_path / "first")
    expected = np.asarray(first.state.model.w_DV[...])
    run = make_run(steps=2, optimizer=OptimizerConfig(peak_learning_rate=1e-9, warmup_steps=1))
    second = train(tmp_path / "second", run, initial_model=first.state.model)
    assert second.state.step == 2
    np.testing.assert_allclose(second.state.model.w_DV[...], expected, atol=1e-7)


def test_another_run_in_the_same_folder_is_refused_by_name(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match=r"run: seed is 0 in the run and 1 here\. Train in a new"):
        train(tmp_path, make_run(seed=1))
    optimizer = OptimizerConfig(peak_learning_rate=0.01, warmup_steps=1)
    with pytest.raises(ValueError, match="optimizer") as refused:
        train(tmp_path, make_run(optimizer=optimizer))
    assert str(refused.value) == (
        "the checkpoint is of another run: optimizer.peak_learning_rate is 0.05 in the run and "
        "0.01 here. Train in a new workdir or ask for the saved run."
    )


def test_a_run_that_is_older_than_a_field_goes_on_if_it_asks_for_its_default():
    run = make_run()
    asked = _describe(run)
    older = json.loads(json.dumps(asked))
    del older["model"]["text"]["balance_bias"], older["optimizer"]["balance_bias_rate"]
    _refuse_other_run(saved=_complete(older, asked, run), asked=asked)
    faster = dataclasses.replace(run.optimizer, beta2=0.9)
    asked = _describe(make_run(optimizer=faster))
    with pytest.raises(ValueError, match="optimizer"):
        _refuse_other_run(saved=_complete(older, asked, run), asked=asked)


def test_biases_go_on_where_a_stopped_run_left_them_bit_for_bit(tmp_path):
    config = scout_like(num_layers=1, moe_layers=(0,), nope_layers=(), balance_bias=True)
    optimizer = OptimizerConfig(peak_learning_rate=0.01, warmup_steps=1, balance_bias_rate=0.01)
    model = dataclasses.replace(config, vision=None)
    run = make_run(model=model, optimizer=optimizer, steps=4, eval_interval=0)

    def go_on(workdir, **options):
        build = lambda: Llama4(model, key=jax.random.key(0))  # noqa: E731
        return fit(run, build=build, batches=make_dataset(), workdir=workdir, **options)

    go_on(tmp_path / "cut", writers=[StopAt(2)])
    resumed, whole = go_on(tmp_path / "cut"), go_on(tmp_path / "whole")
    assert_same_bits(resumed.state, whole.state)
    assert np.any(whole.state.model.decoder.groups.slots[0].ffn.bias_E[...])


def test_a_run_on_a_mesh_trains_like_one_device_and_resumes_on_it(tmp_path):
    single = train(tmp_path / "single")
    run = make_run(mesh="data:2,fsdp:2,tensor:2")
    train(tmp_path / "mesh", run, writers=[StopAt(3)])
    resumed = train(tmp_path / "mesh", run)
    head = resumed.state.model.w_DV[...]
    assert len({s.data.shape for s in head.addressable_shards}) == 1
    assert head.addressable_shards[0].data.shape == (4, 8)
    moment = name_leaves(resumed.state.opt_state)["1.0.mu.w_DV.value"]
    assert moment.sharding == head.sharding
    # Sums over devices are taken in another order.
    for a, b in zip(jax.tree.leaves(single.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def with_bad(batches, *places):
    """Return batches of which those at `places`, counted from 1, make the loss NaN."""

    class Numbered(grain.DatasetIterator):
        def __init__(self):
            super().__init__()
            self.source, self.place = iter(batches), 0

        def __next__(self):
            self.place += 1
            batch = next(self.source)
            weight = np.nan if self.place in places else 1.0
            return batch | {"loss_mask_BT": batch["loss_mask_BT"] * np.float32(weight)}

        def get_state(self):
            return {"source": self.source.get_state(), "place": self.place}

        def set_state(self, state):
            self.source.set_state(state["source"])
            self.place = state["place"]

    class Dataset(grain.IterDataset):
        def __iter__(self):
            return Numbered()

    return Dataset()


def read_strictly(workdir):
    def refuse(constant):
        pytest.fail(f"{constant} is no JSON")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_a_batch_that_is_not_finite_is_skipped_counted_and_logged(tmp_path):
    run = make_run(steps=8, log_interval=8, checkpoint_interval=3)
    result = train(tmp_path, run, batches=with_bad(make_dataset(), 2, 3, 5))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.state))
    assert (result.state.step, result.state.skipped) == (8, 3)
    records = [record for record in read_strictly(tmp_path) if "train/loss" in record]
    assert [record["step"] for record in records] == [2, 3, 5, 8]
    assert [record["train/loss"] is None for record in records] == [True, True, True, False]
    assert [record["train/skipped_in_a_row"] for record in records] == [1, 2, 1, 0]


def test_counts_of_skipped_steps_go_on_after_a_stop(tmp_path):
    run, bad = make_run(steps=5), with_bad(make_dataset(), 2, 3, 4)
    whole = train(tmp_path / "whole", run, batches=bad)
    half = train(tmp_path / "cut", run, batches=bad, writers=[StopAt(2)])
    assert half.state.skipped_in_a_row == half.state.step - 1
    resumed = train(tmp_path / "cut", run, batches=bad)
    assert_same_bits(resumed.state, whole.state)
    assert read_strictly(tmp_path / "cut")[-1]["train/skipped"] == 3


def test_too_many_bad_steps_in_a_row_end_the_run_by_name_and_keep_its_checkpoint(tmp_path):
    run = make_run(checkpoint_interval=2, max_skipped_in_a_row=2, steps=9)
    with pytest.raises(ValueError, match=r"2 steps in a row, 4 to 5, had a loss") as gave_up:
        train(tmp_path, run, batches=with_bad(make_dataset(), 2, 4, 5, 6))
    assert "(the last: loss nan, gradient norm nan)" in str(gave_up.value)
    assert 'batches 4 to 5 of the data, whose position is now {"source": {"' in str(gave_up.value)
    assert "The newest checkpoint is of step 4." in str(gave_up.value)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "4"}
    more = dataclasses.replace(run, max_skipped_in_a_row=4)
    assert train(tmp_path, more, batches=with_bad(make_dataset(), 2, 4, 5, 6)).is_finished


def test_a_state_that_is_not_finite_is_not_saved_and_the_leaf_is_named(tmp_path):
    def build_bad():
        model = build()
        model.scale_D[...] = model.scale_D[...].at[3].set(np.inf)
        return model

    with pytest.raises(ValueError, match=r"step 1 is not saved: model.scale_D.value holds NaN"):
        train(tmp_path, make_run(checkpoint_interval=1), build=build_bad)
    assert not any(path.name == "1" for path in (tmp_path / "checkpoints").iterdir())


def test_a_checkpoint_of_an_older_version_without_notes_goes_on(tmp_path):
    train(tmp_path, writers=[StopAt(3)])
    (older,) = (tmp_path / "checkpoints").iterdir()
    shutil.rmtree(older / "notes")
    resumed = train(tmp_path)
    assert_same_bits(resumed.state, train(tmp_path / "whole").state)


# Orbax leaves the other reads to a closed event loop when one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_byte_of_a_checkpoint_is_noticed(tmp_path):
    train(tmp_path, make_run(steps=2))
    for name in ("state/manifest.ocdbt", "state/d/*", "data/process*", "notes/m*"):
        (file,) = tmp_path.glob(f"checkpoints/2/{name}")
        content = file.read_bytes()
        place = len(content) // 2
        file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"checkpoints/2 is damaged \(.*; remove it to go on"):
            train(tmp_path, make_run(steps=4))
        file.write_bytes(content)
    assert train(tmp_path, make_run(steps=4)).is_finished


def test_a_second_run_in_the_same_folder_is_refused_and_disturbs_nothing(tmp_path):
    class SecondRun(StopAt):
        def write(self, step, scalars):
            with pytest.raises(ValueError, match="is in use by another run"):
                train(tmp_path)

    assert train(tmp_path, make_run(log_interval=6), writers=[SecondRun(6)]).is_finished
    assert losses(tmp_path).keys() == {6}


def test_an_unknown_preset_is_refused_before_anything_is_built(tmp_path):
    run = dataclasses.replace(make_run(), preset="magic")
    with pytest.raises(ValueError, match=r"preset \('magic'\) is unknown; choose one of single"):
        fit(run, build=lambda: 1 / 0, batches=make_dataset(), workdir=tmp_path)
