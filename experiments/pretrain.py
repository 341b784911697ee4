"""Train a model from a recipe, and write it in Hugging Face's layout, or Orbax's if that cannot be.

    python -m experiments.pretrain --recipe=nano --workdir=DIR

Run the same command again to go on after an interruption: the result is the same to the last bit.
Once the run is complete, that only says where its model is.
DIR/STAGE holds metrics and checkpoints of each stage of the recipe, DIR/hf the finished model;
DIR/orbax if it has balance biases, for which no other layout has a place. nano takes about 25
minutes on two cores and ends with code/nll 2.8 and digits/accuracy 0.99.
"""

import dataclasses
import pathlib
import sys

from absl import flags

import llama4_jax
from experiments.flags import FlagError, check_given, define_mesh_flag, launch, make_mesh
from experiments.recipes import RECIPES, Recipe, change
from experiments.terminal import ConsoleWriter
from llama4_jax import train
from llama4_jax.config.runs import RunConfig
from llama4_jax.text import Tokenizer, load_tokenizer


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's flags."""
    own = "Default: the recipe's."
    flags.DEFINE_enum("recipe", None, list(RECIPES), "What to train.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Folder for all that the run writes.", flag_values=values)
    for name, least, meaning in (("steps", 1, "Of every stage."), ("seed", 0, "Of weights, data.")):
        flags.DEFINE_integer(name, None, f"{meaning} {own}", lower_bound=least, flag_values=values)
    flags.DEFINE_float(
        "balance_bias_rate", None,
        "By how much a step moves the bias that evens out the load of experts, such as 0.001; 0 is "
        f"no bias. {own}", lower_bound=0.0, flag_values=values,
    )  # fmt: skip
    define_mesh_flag(values)
    flags.DEFINE_string("tokenizer", "nano", "Its folder.", flag_values=values)


def make_stages(values: flags.FlagValues) -> Recipe:
    """Return the recipe's stages, changed as the flags ask.

    Raises:
      FlagError: a flag is missing or contradicts the recipe.
    """
    check_given(values, ("recipe", "workdir"))
    asked = {name: values[name].value for name in ("steps", "seed", "mesh", "balance_bias_rate")}
    try:
        return change(RECIPES[values.recipe](), **asked)
    except ValueError as error:
        raise FlagError(str(error)) from error


def export(model: "llama4_jax.Llama4", workdir: pathlib.Path, tokenizer: pathlib.Path) -> None:
    """Write the model in bfloat16 with its tokenizer's files, and say where."""
    config = dataclasses.replace(model.config, dtype="bfloat16")
    pretrained = llama4_jax.Pretrained(model=model, config=config, directory=tokenizer)
    kind = "orbax" if config.text.balance_bias else "hf"
    llama4_jax.save_pretrained(pretrained, workdir / kind, format=kind, dtype="bfloat16")
    print(f"wrote {kind} checkpoint {workdir / kind}")


def train_stage(
    run: RunConfig, model: "llama4_jax.Llama4 | None", tokenizer: Tokenizer, workdir: pathlib.Path
) -> "llama4_jax.Llama4":
    """Train a stage from where the one before it ended; leave the program if it is stopped."""
    import jax

    from llama4_jax.data import pipelines

    size = f"{run.steps} steps of {run.batch_size} x {run.row_length} tokens"
    print(f"stage {run.name}: {size}; the first one compiles", flush=True)
    result = train.fit(
        run,
        build=lambda: llama4_jax.Llama4(run.model, key=jax.random.key(run.seed)),
        initial_model=model,
        batches=pipelines.train_batches(run, tokenizer),
        held_out=pipelines.held_out_batches(run, tokenizer),
        workdir=workdir / run.name,
        writers=[ConsoleWriter(run.steps)],
    )
    if result.stop_signal is not None:
        print(f"stopped at step {int(result.state.step)}; the same command goes on from there")
        sys.exit(128 + result.stop_signal)
    return result.state.model


def main(values: flags.FlagValues) -> None:
    """Train stage by stage, evaluate on held-out data and export."""
    from llama4_jax.checkpoint.location import find_checkpoint

    stages = make_stages(values)
    make_mesh(values)
    workdir, folder = pathlib.Path(values.workdir), find_checkpoint(values.tokenizer)
    if (tokenizer := load_tokenizer(folder)) is None:
        raise FlagError(f"--tokenizer={folder} has no tokenizer.json or tokenizer.model.")
    with train.lock_workdir(workdir):
        for target in (path for kind in ("hf", "orbax") if (path := workdir / kind).exists()):
            if all(train.is_complete(run, workdir / run.name) for run in stages):
                print(f"the run is complete; its model is in {target}")
                return
            raise FlagError(f"{target} is of a run of other --steps; remove it or name a new one.")
        model: llama4_jax.Llama4 | None = None
        for run, planned in zip(stages, RECIPES[values.recipe](), strict=True):
            if (warmup := run.optimizer.warmup_steps) != planned.optimizer.warmup_steps:
                print(f"the warm-up of stage {run.name} is shortened to {warmup} as --steps is")
            model = train_stage(run, model, tokenizer, workdir)
        assert model is not None  # a recipe has stages
        export(model, workdir, folder)


if __name__ == "__main__":
    launch(define_flags, main)
