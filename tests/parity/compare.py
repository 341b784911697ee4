"""Compare live with Hugging Face transformers: `make parity` prints a table of errors.

transformers makes random checkpoints in its own environment and computes with them. We load them,
compute the same, write them out again, and transformers computes with what we wrote. Every line of
the table is one quantity, its error and the bound that it must keep; the exit status is 1 if any
line fails. Takes about three minutes on two cores.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cases
import jax
import jax.numpy as jnp
import numpy as np
from cases import Case

from llama4_jax import from_pretrained, save_pretrained
from llama4_jax.model import Cache, Llama4

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]

# Logits have unit scale; two float32 programs differ by 1e-5 over eight layers.
FLOAT32_LIMIT = 1e-4
# Roundings of eight layers add up to this.
BFLOAT16_RMS_LIMIT = 0.05
BFLOAT16_NOISE = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table; it passes while `error` is at most `limit`."""

    case: str
    quantity: str
    error: float
    limit: float

    @property
    def passes(self) -> bool:
        """Whether the bound is kept; not-a-number never is."""
        return self.error <= self.limit


def run_hf(python: pathlib.Path, step: str, folder: pathlib.Path) -> None:
    """Run one step of hf.py in the environment of the references."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    subprocess.run([python, HERE / "hf.py", step, folder], check=True, env=environment)


@jax.jit
def forward(model: Llama4, ids_BT: jax.Array, tiles_NCHW: jax.Array | None) -> jax.Array:
    """Return logits of one pass."""
    return model(ids_BT, tiles_NCHW=tiles_NCHW).logits_BTV


# Every length of a piece is a program of its own, so these are compiled in half the time.
@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def step(model: Llama4, ids_BT: jax.Array, tiles_NCHW: jax.Array | None, cache: Cache):
    """Return the logits of one piece, and the cache that holds it."""
    out = model(ids_BT, tiles_NCHW=tiles_NCHW, cache=cache)
    return out.logits_BTV, out.cache


def rotate_absolutely(model: Llama4) -> Llama4:
    """Return the same parameters under a config that rotates by the absolute position."""
    text = dataclasses.replace(model.config.text, rope_positions="absolute")
    config = dataclasses.replace(model.config, text=text)
    shell = jax.eval_shape(lambda: Llama4(config, key=jax.random.key(0)))
    return jax.tree.unflatten(jax.tree.structure(shell), jax.tree.leaves(model))


def in_pieces(model: Llama4, case: Case, split: tuple[int, ...]) -> np.ndarray:
    """Run the batch in pieces with our cache; images go in with the first piece."""
    tiles_NCHW, logits, start = cases.tiles(case), [], 0
    cache = Cache.create(
        model.config.text, batch_size=case.rows, max_length=case.length, dtype=case.dtype
    )
    for size in split:
        piece_BT = jnp.asarray(cases.token_ids(case)[:, start : start + size])
        logits_BTV, cache = step(model, piece_BT, tiles_NCHW, cache)
        logits.append(np.asarray(logits_BTV))
        start, tiles_NCHW = start + size, None
    return np.concatenate(logits, axis=1)


def wrong_choices(ours: np.ndarray, theirs: np.ndarray, noise: float) -> float:
    """Count tokens whose best next token differs although the reference's two best are apart."""
    top = np.sort(theirs, axis=-1)
    clear = top[..., -1] - top[..., -2] > noise
    return float(np.sum((ours.argmax(-1) != theirs.argmax(-1)) & clear))


def compare_logits(case: Case, quantity: str, ours: np.ndarray, theirs: np.ndarray) -> list[Line]:
    """Compare two runs by the rule of the case's dtype."""
    error = np.abs(ours - theirs)
    if case.dtype == "float32":
        limit = FLOAT32_LIMIT
        return [Line(case=case.name, quantity=quantity, error=float(error.max()), limit=limit)]
    rms = float(np.sqrt((error**2).mean()))
    return [
        Line(case=case.name, quantity=quantity + ", rms", error=rms, limit=BFLOAT16_RMS_LIMIT),
        Line(
            case=case.name,
            quantity=quantity + ", other argmax",
            error=wrong_choices(ours, theirs, BFLOAT16_NOISE),
            limit=0,
        ),
    ]


def compare_ours(case: Case, folder: pathlib.Path) -> list[Line]:
    """Load transformers' checkpoint, compare our logits, and write our copy of it."""
    stored = np.load(folder / "hf.npz")
    pretrained = from_pretrained(folder / "hf", dtype=case.dtype)
    model = pretrained.model
    if case.rotates_absolutely:
        model = rotate_absolutely(model)
    ids_BT = jnp.asarray(cases.token_ids(case))
    ours = cases.kept(case, np.asarray(forward(model, ids_BT, cases.tiles(case))))
    lines = compare_logits(case, "logits", ours, stored["logits"])
    for i, split in enumerate(case.splits):
        theirs = stored[f"split_{i}"]
        quantity = "decode in pieces of " + " ".join(map(str, split))
        lines += compare_logits(case, quantity, in_pieces(model, case, split), theirs)
    save_pretrained(pretrained, folder / "ours")
    return lines


def compare_reloaded(case: Case, folder: pathlib.Path) -> list[Line]:
    """Compare transformers' logits with our copy of the checkpoint and with the original: equal."""
    first, second = (np.load(folder / name)["logits"] for name in ("hf.npz", "ours.npz"))
    error = float(np.abs(first - second).max())
    return [Line(case=case.name, quantity="transformers on our copy", error=error, limit=0)]


def main() -> int:
    """Make, compare, reload, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--oracle", type=pathlib.Path, default=ROOT / ".oracle/bin/python",
                        help="the Python that has torch and transformers")  # fmt: skip
    parser.add_argument("--only", default="", help="run only cases whose name contains this")
    arguments = parser.parse_args()
    chosen = [case for case in cases.CASES if arguments.only in case.name]
    if not chosen or not arguments.oracle.is_file():
        parser.error(f"no case is named {arguments.only!r}" if not chosen else
                     f"{arguments.oracle} is not there; `make parity` makes it")  # fmt: skip
    lines = []
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        folders = [root / cases.folder_name(case) for case in chosen]
        for folder in folders:
            folder.mkdir()
        run_hf(arguments.oracle, "make", root)
        for case, folder in zip(chosen, folders, strict=True):
            lines += compare_ours(case, folder)
        run_hf(arguments.oracle, "reload", root)
        for case, folder in zip(chosen, folders, strict=True):
            lines += compare_reloaded(case, folder)
    width = max(len(f"{line.case}: {line.quantity}") for line in lines)
    print(f"{'':{width}}      error    at most")
    for line in sorted(lines, key=lambda line: [case.name for case in chosen].index(line.case)):
        what = f"{line.case}: {line.quantity}"
        verdict = "ok" if line.passes else "FAILS"
        print(f"{what:{width}}  {line.error:9.2e}  {line.limit:9.2e}  {verdict}")
    failures = sum(not line.passes for line in lines)
    print(f"{len(lines) - failures} of {len(lines)} agree with transformers")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
