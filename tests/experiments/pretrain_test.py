"""The training command: what it refuses, and a whole run of a small recipe."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from experiments import pretrain
from experiments.flags import FlagError
from experiments.recipes import RECIPES
from llama4_jax import parallel
from llama4_jax.model import Llama4
from llama4_jax.pretrained import from_pretrained


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
    pretrain.export(model, tmp_path, pretrain.TOKENIZER)
    assert capsys.readouterr().out == f"wrote orbax checkpoint {tmp_path / 'orbax'}\n"
    loaded = from_pretrained(tmp_path / "orbax")
    assert loaded.tokenizer is not None
    assert {str(x.dtype) for x in jax.tree.leaves(loaded.model)} == {"bfloat16", "float32"}


def test_a_run_too_short_for_its_warmup_is_a_mistake_of_the_flags():
    with pytest.raises(FlagError, match=r"warmup_steps \(50\) must be less than steps \(40\)"):
        pretrain.make_stages(values_of("--recipe=nano", "--workdir=x", "--steps=40"))


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
    assert "step 2: loss" in said
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
