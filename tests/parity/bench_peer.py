"""E4 of `make bench-serve`: the same greedy answers by vLLM and by the engine, in turns."""

import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors.flax

from llama4_jax.pretrained import GenerationDefaults, Pretrained, save_pretrained
from llama4_jax.serve import Engine, EngineConfig, Options, Request, generate
from tests.parity.serve_figures import seconds

ROWS = (1, 8, 32)
LONGEST, NEW = 200, 64  # tokens of a prompt and of an answer: three of nano's chunks
PREFIX, VISION = "language_model.", ("vision_model.", "multi_modal_projector.")


def text_only(pretrained: Pretrained, folder: pathlib.Path) -> pathlib.Path:
    """Write the text model alone, as transformers' and vLLM's Llama4ForCausalLM reads it."""
    save_pretrained(pretrained.model, folder)
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    text = settings.get("text_config", settings)
    text |= {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"}
    (folder / "config.json").write_text(json.dumps(text), "utf-8")
    for path in folder.glob("*.safetensors"):
        arrays = {
            name.removeprefix(PREFIX): array
            for name, array in safetensors.flax.load_file(path).items()
            if not name.startswith(VISION)
        }
        safetensors.flax.save_file(arrays, path, metadata={"format": "pt"})
    for index in folder.glob("*.index.json"):  # one file, or names that are no longer right
        index.unlink()
    return folder


@contextlib.contextmanager
def vllm(
    python: pathlib.Path, checkpoint: pathlib.Path
) -> Generator[Callable[[Mapping[str, Any]], dict[str, Any]]]:
    """Start vLLM on a checkpoint; give what sends it a request and returns its answer."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    script = pathlib.Path(__file__).with_name("bench_vllm.py")
    command = [python, script, checkpoint, str(LONGEST + NEW), str(max(ROWS))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def answer() -> dict[str, Any]:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("vLLM ended; see its message above")
            return json.loads(line)

        def ask(request: Mapping[str, Any]) -> dict[str, Any]:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return answer()

        try:
            answer()  # it is ready
            yield ask
        finally:
            process.kill()


def beside(engine: Engine, ask: Callable, prompts: list[list[int]], rounds: int) -> dict[str, Any]:
    """Answer prompts by both, in turns after one that warms up."""
    options = Options(temperature=0, ignore_eos=True, max_new_tokens=NEW)
    requests = [Request(tokens=prompt) for prompt in prompts]
    mine, theirs, own, other = [], [], [], []
    for _ in range(1 + rounds):
        own.append(seconds(lambda: mine.append(generate(engine, requests, options=options))))
        theirs.append(ask({"prompts": prompts, "new": NEW}))
        other.append(theirs[-1]["seconds"])
    pairs = zip(mine[-1], theirs[-1]["tokens"], strict=True)
    count = len(prompts) * NEW
    return {
        "tokens_per_s": count / statistics.median(own[1:]),
        "vllm": count / statistics.median(other[1:]),
        "times_as_fast": statistics.median(b / a for a, b in zip(own, other, strict=True)),
        "tokens_equal": sum(equal_tokens(a.tokens, b) for a, b in pairs) / count,
    }


def equal_tokens(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Count the tokens before the first that differs."""
    pairs = zip(ours, theirs, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(ours))


def beside_vllm(
    python: pathlib.Path, models: Mapping[str, Pretrained], folder: pathlib.Path, rounds: int
) -> dict[str, Any]:
    """E4: prompts of mixed lengths, so many at a time, on each model."""
    found: dict[str, Any] = {}
    config = EngineConfig(
        max_rows=max(ROWS), step_tokens=512, max_context=LONGEST + NEW, keep_prefixes=False
    )
    for name, model in models.items():
        text = dataclasses.replace(model, generation=GenerationDefaults())
        checkpoint = text_only(text, folder / f"vllm-{name}")
        jax.clear_caches()
        rng = np.random.default_rng(5)
        engine = Engine(text, config)
        with vllm(python, checkpoint) as ask:
            for rows in ROWS:
                lengths = rng.integers(16, LONGEST, rows)
                prompts = [rng.integers(3, 1900, length).tolist() for length in lengths]
                found[f"{name}_{rows}"] = beside(engine, ask, prompts, rounds)
                print(f"     {name}, {rows} rows: {found[f'{name}_{rows}']}", flush=True)
    return found
