"""See the whole system work on the small model that ships, in under two minutes on a CPU.

    python -m experiments.demo

Continues code as it streams, reads handwritten digits that the model has never seen, does both
again on a mesh of eight virtual devices, and converts the model to Meta's layout and back. Each
step is checked; the last line reads `6 checks passed in .. s`, or the exit status is not zero.
"""

import pathlib
import tempfile
import time

from absl import flags

import llama4_jax
from experiments import flags as shared
from experiments.terminal import show
from llama4_jax.text import Image, Message

MESH = "expert:4,tensor:2"
QUESTION = "Which digit is this?"
CODE = '''class Point:
    """A point in the plane."""

    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __eq__(self, other):
        if not isinstance(other, Point):
            return NotImplemented
        return self.x == other.x and self.y == other.y

    def __repr__(self):
'''


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's one flag."""
    flags.DEFINE_string("checkpoint", "nano", "Folder of the model.", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Run the four steps.

    Raises:
      ValueError: a check failed; the message says how many.
    """
    import jax

    greedy, generate = llama4_jax.Options(temperature=0), llama4_jax.generate
    began, folder, checks = time.monotonic(), shared.check_checkpoint(values), []
    jax.config.update("jax_platforms", "cpu")
    shared.split_cpu(8)
    # In bfloat16 the sums of a mesh round differently enough to change an answer now and then.
    model = llama4_jax.from_pretrained(folder, dtype="float32")
    size = sum(x.size for x in jax.tree.leaves(model.model))
    print(f"{model.config.name}, {size / 1e6:.1f} million parameters, on the CPU")

    print(f"\n1. Code, continued as it comes\n\n{CODE}", end="")
    pictures = sorted(folder.glob("examples/digit_*.png"))
    code, digits = [llama4_jax.Request(prompt=CODE)], [ask(picture) for picture in pictures]
    written = generate(model, code, options=greedy, max_new_tokens=64, on_token=show)
    print("\n\n2. Pictures of digits that it has never seen, in a dialogue")
    read = generate(model, digits, options=greedy, max_new_tokens=8)
    for picture, found in zip(pictures, read, strict=True):
        said, name = (found.text or "").strip(), picture.stem.removeprefix("digit_")
        checks.append(check(f'{picture.name}: "{QUESTION}" "{said}"', said == name))

    print(f"\n3. The same on a mesh of 8 virtual devices, {MESH}")
    spread = llama4_jax.from_pretrained(folder, mesh=MESH, dtype="float32")
    again = generate(spread, [*code, *digits], options=greedy, max_new_tokens=64)
    alone = [found.tokens for found in [*written, *read]]
    same = [found.tokens[: len(old)] for found, old in zip(again, alone, strict=True)] == alone
    checks.append(check(f"all {sum(map(len, alone))} tokens are the same", same))

    print("\n4. Converted to Meta's layout and back")
    checks.append(check("every parameter has kept every bit", survives_conversion(folder)))
    if not all(checks):
        raise ValueError(f"{checks.count(False)} of {len(checks)} checks failed.")
    print(f"\n{len(checks)} checks passed in {time.monotonic() - began:.0f} s")


def check(claim: str, holds: bool) -> bool:
    """Print a claim and whether it holds."""
    print(f"   {'ok    ' if holds else 'FAILED'} {claim}", flush=True)
    return holds


def ask(picture: pathlib.Path) -> "llama4_jax.Request":
    """Ask about a picture as a user does in a dialogue."""
    return llama4_jax.Request(messages=[Message("user", [Image(picture), QUESTION])])


def survives_conversion(folder: pathlib.Path) -> bool:
    """Convert to Meta's layout and back; is every parameter the same to the last bit?"""
    import jax
    import numpy as np

    from llama4_jax.checkpoint import convert

    with tempfile.TemporaryDirectory() as temporary:
        there, back = pathlib.Path(temporary, "meta"), pathlib.Path(temporary, "hf")
        convert(folder, there, to="meta")
        print(f"   {folder.name} -> {', '.join(sorted(p.name for p in there.glob('*.pth')))}")
        convert(there, back, to="hf")
        print(f"   meta -> {', '.join(sorted(p.name for p in back.glob('*.safetensors')))}")
        pairs = (
            jax.tree.leaves(llama4_jax.from_pretrained(place).model) for place in (folder, back)
        )
        return all(
            a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
            for a, b in zip(*pairs, strict=True)
        )


if __name__ == "__main__":
    shared.launch(define_flags, main)
