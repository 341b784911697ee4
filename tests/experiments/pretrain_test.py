"""The training command: what it refuses, and a whole run of a small recipe."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from experiments import pretrain, terminal
from experiments.flags import FlagError
from experiments.recipes import RECIPES
from llama4_jax import parallel
from llama4_jax.checkpoint.location import find_checkpoint
from llama4_jax.model import Llama4
from llama4_jax.pretrained import from_pretrained
from llama4_jax.train import lock_workdir


def values_of(*arguments):
    values = flags.FlagValues()
    pretrain.define_flags(values)
    values(["command", *arguments])
    return values


def test_recipe_and_workdir_must_be_named():
    with pytest.raises(FlagError, match="--recipe is needed"):
        pretrain.make_stages(values_of("--workdir=x"))
    with pytest.raises(FlagError, match="--workdir is needed"):
        pretrain.make_stages(values_of("--recipe=smoke"))
    with pytest.raises(flags.IllegalFlagValueError, match=r"should be one of <nano\|smoke>"):
        values_of("--recipe=huge")


def test_steps_seed_and_mesh_change_every_stage():
    stages = pretrain.make_stages(
        values_of("--recipe=smoke", "--workdir=x", "--steps=7", "--seed=3", "--mesh=fsdp:2")
    )
    assert [(s.steps, s.seed, s.mesh) for s in stages] == [(7, 3, "fsdp:2")] * 2
    back = tuple(dataclasses.replace(s, steps=2, seed=0, mesh="") for s in stages)
    assert back == RECIPES["smoke"]()


def test_a_rate_of_balance_biases_gives_every_stage_biases_and_zero_takes_them():
    flag = "--balance_bias_rate"
    stages = pretrain.make_stages(values_of("--recipe=smoke", "--workdir=x", f"{flag}=0.01"))
    assert [s.model.text.balance_bias for s in stages] == [True, True]
    assert [s.optimizer.balance_bias_rate for s in stages] == [0.01, 0.01]
    off = pretrain.make_stages(values_of("--recipe=smoke", "--workdir=x", f"{flag}=0"))
    assert off == RECIPES["smoke"]()
    with pytest.raises(FlagError, match=r"balance_bias_rate \(2.0\) must be in \[0, 1\)"):
        pretrain.make_stages(values_of("--recipe=smoke", "--workdir=x", f"{flag}=2"))


def test_a_model_with_balance_biases_is_written_where_they_have_a_place(tmp_path, capsys):
    text = dataclasses.replace(RECIPES["smoke"]()[0].model.text, balance_bias=True)
    config = dataclasses.replace(RECIPES["smoke"]()[0].model, text=text)
    model = Llama4(config, key=jax.random.key(0))
    pretrain.export(model, tmp_path, find_checkpoint("nano"))
    assert capsys.readouterr().out == f"wrote orbax checkpoint {tmp_path / 'orbax'}\n"
    loaded = from_pretrained(tmp_path / "orbax")
    assert loaded.tokenizer is not None
    assert {str(x.dtype) for x in jax.tree.leaves(loaded.model)} == {"bfloat16", "float32"}


@pytest.mark.parametrize(("steps", "warmups"), [(200, [50, 100]), (60, [50, 4]), (6, [1, 1])])
def test_a_warmup_that_does_not_fit_the_steps_shrinks_with_them(steps, warmups):
    stages = pretrain.make_stages(values_of("--recipe=nano", "--workdir=x", f"--steps={steps}"))
    assert [stage.optimizer.warmup_steps for stage in stages] == warmups


def test_a_shortened_warmup_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "train_stage", lambda *_: "a model")
    monkeypatch.setattr(pretrain, "export", lambda *_: None)
    pretrain.main(values_of("--recipe=nano", f"--workdir={tmp_path}", "--steps=60"))
    said = "the warm-up of stage code is shortened to 4 as --steps is\n"
    assert capsys.readouterr().out == said


def test_a_stopped_training_ends_in_the_signal_s_status(tmp_path, capsys, monkeypatch):
    def stop(self, step, metrics):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(pretrain.ConsoleWriter, "write", stop)
    with pytest.raises(SystemExit) as stopped:
        pretrain.main(
            values_of(
                "--recipe=smoke",
                f"--workdir={tmp_path}",
            )
        )
    assert stopped.value.code == 128 + signal.SIGTERM
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "stopped at step 1; the same command goes on from there"
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "pictures"}


def test_a_second_run_in_the_same_workdir_is_refused(tmp_path):
    values = values_of("--recipe=smoke", f"--workdir={tmp_path}")
    with lock_workdir(tmp_path), pytest.raises(ValueError, match="in use by another run"):
        pretrain.main(values)


def test_the_console_tells_how_long_the_rest_will_take(capsys, monkeypatch):
    now = iter([0.0, 30.0, 60.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(now))
    writer = terminal.ConsoleWriter(400)
    writer.write(10, {"train/loss": 2.0})
    writer.write(20, {"train/loss": 1.5, "train/skipped_in_a_row": 1.0})
    writer.write(20, {"eval/code/nll": 3.0})
    writer.write(400, {"train/loss": 1.0})
    assert capsys.readouterr().out.splitlines() == [
        "step 10/400: loss 2",
        "step 20/400: loss 1.5, not finite, skipped, 0:19:00 left",
        "step 20/400: code/nll 3",
        "step 400/400: loss 1",
    ]


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(FlagError, match="has no tokenizer"):
        pretrain.main(
            values_of("--recipe=smoke", f"--workdir={tmp_path}", f"--tokenizer={tmp_path}")
        )


def test_nano_has_at_most_eight_megabytes_in_bfloat16():
    config = RECIPES["nano"]()[-1].model
    model = parallel.abstract(lambda: Llama4(config, key=jax.random.key(0)))
    assert 2 * sum(leaf.size for leaf in jax.tree.leaves(model)) < 7.9e6


def test_the_smoke_recipe_trains_scores_and_exports_a_model_that_loads(tmp_path, capsys):
    pretrain.main(values_of("--recipe=smoke", f"--workdir={tmp_path}"))
    said = capsys.readouterr().out
    for stage in ("pictures", "code"):
        lines = (tmp_path / stage / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert sorted({record["step"] for record in records}) == [1, 2]
        last = {name: value for record in records for name, value in record.items()}
        assert np.isfinite(last["train/loss"])
        assert last["train/balance"] >= 0.99
        assert {"eval/code/nll", "eval/digits/accuracy"} <= last.keys()
        assert f"stage {stage}: 2 steps of 4 x 256 tokens" in said
    assert "step 2/2: loss" in said
    assert "largest_expert_share" in said
    assert len(last["router/tokens/layer_01"]) == 2
    assert 0.5 <= last["router/largest_share/layer_00"] <= 1
    loaded = from_pretrained(tmp_path / "hf")
    assert loaded.tokenizer is not None
    assert loaded.model.config.dtype == "bfloat16"
    tokens_BT = jnp.asarray([loaded.tokenizer.encode("import os\n", bos=True)])
    assert jnp.all(jnp.isfinite(loaded.model(tokens_BT).logits_BTV))
    pretrain.main(values_of("--recipe=smoke", f"--workdir={tmp_path}"))
    assert capsys.readouterr().out == f"the run is complete; its model is in {tmp_path / 'hf'}\n"
    with pytest.raises(FlagError, match="hf is of a run of other --steps; remove it or name"):
        pretrain.main(values_of("--recipe=smoke", f"--workdir={tmp_path}", "--steps=3"))
    with pytest.raises(ValueError, match="another run: seed is 0 in the run and 1 here"):
        pretrain.main(values_of("--recipe=smoke", f"--workdir={tmp_path}", "--seed=1"))
