"""What a person sees: text as it comes, answers as JSON lines, dialogues, a training's course."""

import contextlib
import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from llama4_jax.text import Image, Message

if TYPE_CHECKING:
    from llama4_jax.pretrained import Pretrained
    from llama4_jax.serve import EngineConfig, NewToken, Options
    from llama4_jax.train.writers import Metrics

EXIT = "/exit"


def show(new: "NewToken") -> None:
    """Print what a token adds, at once."""
    print(new.text, end="", flush=True)


def show_after(waiting: "Waiting") -> Callable[["NewToken"], None]:
    """Return what prints tokens, the first of which ends the waiting."""

    def show_next(new: "NewToken") -> None:
        waiting.end()
        show(new)

    return show_next


def print_line(line: dict[str, Any]) -> None:
    """Print one answer as JSON; a terminal that is not UTF-8 gets its escapes."""
    is_plain = "utf" not in (sys.stdout.encoding or "").lower()
    print(json.dumps(line, ensure_ascii=is_plain, allow_nan=False), flush=True)


@contextlib.contextmanager
def bytes_on_terminal(num_bytes: int) -> Iterator[Callable[[int], object]]:
    """Draw a bar of bytes on a terminal; stay silent anywhere else."""
    with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=None, file=sys.stderr) as bar:
        yield bar.update


class Waiting:
    """Say on a terminal that the first token takes its time; take that back when it comes."""

    TEXT = "reading the prompt (steps are compiled the first time) ..."

    def __init__(self) -> None:
        self._is_shown = sys.stderr.isatty()
        if self._is_shown:
            print(self.TEXT, end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Take it back, once."""
        if self._is_shown:
            print("\r" + " " * len(self.TEXT) + "\r", end="", file=sys.stderr, flush=True)
            self._is_shown = False


class ConsoleWriter:
    """Print the main metrics of a training step on one line, and how long the rest will take.

    Args:
      steps: of the whole run.
    """

    SHOWN = (
        "train/loss",
        "train/accuracy",
        "train/largest_expert_share",
        "train/router_entropy",
        "speed/tokens_per_second",
        "speed/mfu",
    )

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._began: tuple[int, float] | None = None

    def write(self, step: int, metrics: "Metrics") -> None:
        measured = [name for name in metrics if name.startswith("eval/")]
        shown, left = (measured, "") if measured else (self.SHOWN, self._left(step))
        parts = [f"{n.split('/', 1)[1]} {metrics[n]:.4g}" for n in shown if n in metrics]
        if metrics.get("train/skipped_in_a_row"):
            parts.append("not finite, skipped")
        print(f"step {step}/{self._steps}: {', '.join(parts)}{left}", flush=True)

    def _left(self, step: int) -> str:
        """Return the time to the end at the pace since the first call, evaluations included."""
        now = time.monotonic()
        began, started = self._began = self._began or (step, now)
        if step in (began, self._steps):
            return ""
        seconds = (now - started) / (step - began) * (self._steps - step)
        return f", {datetime.timedelta(seconds=round(seconds))} left"

    def close(self) -> None:
        """Nothing is left to finish."""


def talk(
    pretrained: "Pretrained", images: Sequence[str], options: "Options", config: "EngineConfig"
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
    from llama4_jax.serve import Engine, Request, generate
    from llama4_jax.serve.sizes import Work

    history: list[Message] = []
    tokens = 2 * config.context(pretrained.config) * options.n
    config = dataclasses.replace(config, max_rows=options.n)
    engine = Engine(pretrained, config, work=Work(choices=options.n, tokens=tokens))
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
