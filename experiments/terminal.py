"""What a person sees: text as it comes, answers as JSON lines, dialogues, a training's course."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from llama4_jax.pretrained import Pretrained
from llama4_jax.serve import Engine, EngineConfig, NewToken, Options, Request, generate
from llama4_jax.text import Image, Message
from llama4_jax.train.writers import Metrics

EXIT = "/exit"


def show(new: NewToken) -> None:
    """Print what a token adds, at once."""
    print(new.text, end="", flush=True)


def print_line(line: dict[str, Any]) -> None:
    """Print one answer as JSON."""
    print(json.dumps(line, ensure_ascii=False, allow_nan=False), flush=True)


class ConsoleWriter:
    """Print the main metrics of a training step on one line."""

    SHOWN = (
        "train/loss",
        "train/accuracy",
        "train/largest_expert_share",
        "train/router_entropy",
        "speed/tokens_per_second",
        "speed/mfu",
    )

    def write(self, step: int, metrics: Metrics) -> None:
        shown = [name for name in metrics if name.startswith("eval/")] or self.SHOWN
        parts = [f"{n.split('/', 1)[1]} {metrics[n]:.4g}" for n in shown if n in metrics]
        print(f"step {step}: {', '.join(parts)}", flush=True)

    def close(self) -> None:
        """Nothing is left to finish."""


def talk(
    pretrained: Pretrained, images: Sequence[str], options: Options, config: EngineConfig
) -> None:
    """Read lines until the input ends or one says /exit; answer each in view of all before it.

    Args:
      pretrained: answers.
      images: paths of pictures that stand before the first line.
      options: how it is answered.
      config: sizes of the engine, which keeps what was said before.

    Raises:
      ValueError: the dialogue no longer fits the model's positions.
    """
    history: list[Message] = []
    tokens = 2 * config.context(pretrained.config) * options.n
    engine = Engine(pretrained, dataclasses.replace(config, max_rows=options.n), tokens=tokens)
    while (line := _read_line()) is not None:
        if not line.strip():
            continue
        pictures = [] if history else [Image(path) for path in images]
        history.append(Message("user", [*pictures, line] if pictures else line))
        # Another draw for every turn, and the same ones when the dialogue is repeated.
        turn = dataclasses.replace(options, seed=(options.seed + len(history)) % 2**32)
        request = Request(messages=history)
        (answer,) = generate(engine, [request], options=turn, on_token=show)
        print()
        history.append(Message("assistant", answer.text or ""))


def _read_line() -> str | None:
    try:
        line = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    return None if line.strip() == EXIT else line
