"""Check and time the kernels on this machine's accelerator, each shape in a process of its own.

    benchmarks/hopper.sh [--part=check|repeat|time|nano|tune|SHAPE] [--out=FOLDER]
    benchmarks/tpu.sh    [the same]

A kernel that hangs is killed after its time, one that crashes takes nothing with it, and every
record is on disk when it is known: FOLDER/hopper.jsonl, a line for each pass. Without --part the
parts check, repeat, time and nano run in this order. Checking may go on several times at once; what
is timed is alone. The table at the end says for every shape whether it is right, whether 30 runs
agreed bit for bit, and how fast it is; the status is 1 if anything is wrong.

Needs jax for the device, flax, optax and absl-py; neither grain nor tensorboardX.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from experiments.benchmark import report
from experiments.launch import FlagError, launch

LIMIT = 60  # seconds of a process that checks; it compiles for 10 to 30 of them
TIMED_LIMIT = 100  # where peers are compiled and timed too
PARTS = ("check", "repeat", "time", "nano", "tune")
SECONDS = {"check": 240, "time": 240, "nano": 120, "tune": 240}  # that a part may begin jobs in


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A process.

    Attributes:
      part: that it belongs to; "check" where it repeats too.
      name: of its shape, or of what it does.
      flags: of `experiments.benchmark`.
      limit: seconds after which it is killed.
      environment: variables besides.
    """

    part: str
    name: str
    flags: tuple[str, ...]
    limit: int = LIMIT
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


CHECKED = (  # shapes that are checked and repeated, in this order
    "odd_experts_nobody", "odd_experts_1", "odd_experts_int8", "odd_experts_fp8",
    "odd_experts_int4", "odd_experts", "odd_experts_empty", "odd_experts_hot",
    "odd_decode_1", "odd_1", "odd_128", "odd_2048", "odd_88", "odd_packed", "odd_blind", "odd_256",
    "odd_decode", "odd_decode_int8", "odd_decode_fp8", "odd_decode_32",
    "odd_prefill_9", "odd_prefill", "odd_prefill_256", "odd_prefill_int8", "odd_prefill_fp8",
)  # fmt: skip
TIMED = (  # shapes that are checked, repeated and timed
    "scout_experts_1", "scout_experts_64", "scout_experts_64_int4", "scout_experts_8k",
    "scout_chunk_8k", "scout_chunk_32k", "scout_decode_128k", "scout_decode_1m",
    "scout_decode_1m_int8", "scout_nope_32k", "scout_decode_8k_b16", "scout_decode_1m_fp8",
    "scout_decode_1m_paged", "scout_prefill_128k", "scout_prefill_128k_int8", "packed_8k",
    "vision", "scout_experts_8k_int4", "maverick_experts_64", "scout_decode_10m",
)  # fmt: skip

ALONE = ("scout_decode_10m",)  # of these, what needs nearly all memory
MODELS = ("scout_4_layers_1", "scout_4_layers_16", "nano")
AT_ONCE = {"hopper": 6, "tpu": 1}  # processes that may check at a time; a TPU admits one


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's flags."""
    flags.DEFINE_enum("chip", None, list(AT_ONCE), "What is here.", flag_values=values)
    flags.DEFINE_string(
        "part", None, f"One of {', '.join(PARTS)}, or a shape. Default: the first four.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("out", "benchmarks/results", "Folder for the records.", flag_values=values)
    flags.DEFINE_integer(
        "seconds", None, "In which each part may begin jobs. Default: 240, nano 120.",
        lower_bound=1, flag_values=values,
    )  # fmt: skip


def jobs(part: str | None) -> list[Job]:
    """List the processes of a part, or of a shape; of the first four parts if it is None.

    Raises:
      FlagError: there is no such part or shape.
    """
    if part in ("check", "repeat"):
        return [_shape_job("check", name, part) for name in CHECKED]
    if part == "time":
        return [_shape_job("time", name, "check,repeat,time") for name in TIMED]
    if part == "nano":
        named = [(name, ("--suite=nano", f"--shapes={name}")) for name in MODELS]
        return [Job(part="nano", name=name, flags=flags, limit=100) for name, flags in named]
    if part == "tune":
        return [
            Job(part="tune", name=name, limit=200, flags=_flags(name, "time", "--tune"))
            for name in TIMED
            if name not in ALONE
        ]
    if part is None:
        checks = [_shape_job("check", name, "check,repeat") for name in CHECKED]
        return [*checks, *jobs("time"), *jobs("nano")]
    if part in CHECKED + TIMED:
        return [_shape_job("time", part, "check,repeat,time")]
    known = ", ".join((*PARTS, *CHECKED, *TIMED))
    raise FlagError(f"--part={part} is neither a part nor a shape; choose from {known}.")


def _flags(name: str, do: str, *more: str) -> tuple[str, ...]:
    return ("--suite=kernels", f"--shapes={name}", f"--do={do}", *more)


def _shape_job(part: str, name: str, do: str) -> Job:
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".95"}
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return Job(
        part=part,
        name=name,
        flags=_flags(name, do),
        limit=TIMED_LIMIT if part == "time" else LIMIT,
        environment=memory if name in ALONE else shared,
    )


def own_command(job: Job, records: str) -> list[str]:
    """Return the command of a job, which appends its records to a file."""
    module = [sys.executable, "-m", "experiments.benchmark"]
    return [*module, *job.flags, f"--records={records}"]


def run_job(job: Job, command: Callable[[Job, str], list[str]] = own_command) -> dict[str, Any]:
    """Run a process to its end or its limit.

    Returns:
      part, name, outcome ("ok", "FAULT", "HUNG", "CRASHED"), its records, the seconds it took, and
      the end of what it printed if it did not end well.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path, log = pathlib.Path(folder, "records"), pathlib.Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command(job, str(path)),
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **job.environment},
                start_new_session=True,
            )
            try:
                status = process.wait(job.limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:  # a kernel that hangs sits where no other signal arrives
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        records = list(_lines_of(path))
        said = log.read_text("utf-8", "replace")
    if status is None:
        outcome = "HUNG"
    elif any(record["faults"] for record in records):
        outcome = "FAULT"
    else:
        outcome = "ok" if status == 0 else "CRASHED"
    result = {
        "part": job.part, "name": job.name, "outcome": outcome, "records": records,
        "took": round(time.monotonic() - start, 1),
    }  # fmt: skip
    return result if outcome == "ok" else {**result, "status": status, "said": said[-3000:]}


def _lines_of(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Read records; the last line of a process that was killed may be cut short."""
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def run_jobs(
    todo: Sequence[Job],
    at_once: int,
    seconds: int | None,
    keep: Callable[[dict[str, Any]], None],
    run: Callable[[Job], dict[str, Any]] = run_job,
) -> list[dict[str, Any]]:
    """Run the jobs part by part; those that a part's time leaves no room for are not begun.

    Args:
      todo: jobs, part after part.
      at_once: jobs of checking that may run at a time.
      seconds: in which each part may begin jobs; None for `SECONDS`.
      keep: takes every result as soon as it is known.
      run: runs one.

    Returns:
      The results in the order of the jobs.
    """
    results: list[dict[str, Any]] = []
    for part in dict.fromkeys(job.part for job in todo):
        ends = time.monotonic() + (seconds or SECONDS[part])

        def attempt(job: Job, ends: float = ends) -> dict[str, Any]:
            if time.monotonic() > ends:
                result = {"part": job.part, "name": job.name, "outcome": "not run", "records": []}
            else:
                result = run(job)
            keep(result)
            return result

        with concurrent.futures.ThreadPoolExecutor(at_once if part == "check" else 1) as pool:
            results += pool.map(attempt, [job for job in todo if job.part == part])
    return results


def _repeats(record: report.Record) -> str:
    return f"{record['differing']}/{record['repetitions']}" if "differing" in record else "n/a"


TABLE = report.Table(
    names=report.texts("part:6 name:24"),
    values=(
        *report.texts("pass:8 backend:9 verdict:7"),
        report.Column("repeats", "", ">7", _repeats),
        *report.TIMES.values,
    ),
    notes="",
)


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """Lay the verdicts out: a line for each pass, and for each job that has none."""
    lines = [TABLE.header()]
    for result in results:
        for record in result["records"]:
            verdict = "WRONG" if record["faults"] else "ok"
            lines.append(TABLE.line({**result, **record, "verdict": verdict}))
            lines += [f"       {fault}" for fault in record["faults"]]
        if result["outcome"] in ("HUNG", "CRASHED", "not run") or not result["records"]:
            lines.append(TABLE.line({**result, "skipped": result["outcome"]}))
            lines += [f"       {line}" for line in result.get("said", "").splitlines()[-3:]]
    return "\n".join(lines)


def main(values: flags.FlagValues) -> None:
    """Run what is asked for, keep records, print verdicts.

    Raises:
      FlagError: a flag is missing or unknown.
      ValueError: something is wrong with a kernel.
    """
    if values.chip is None:
        raise FlagError(f"give --chip={' or --chip='.join(AT_ONCE)}.")
    todo = jobs(values.part)
    path = pathlib.Path(values.out, f"{values.chip}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:

        def keep(result: dict[str, Any]) -> None:
            rest = {name: value for name, value in result.items() if name != "records"}
            for record in result["records"] or [{}]:
                file.write(json.dumps({**rest, **record}) + "\n")
            file.flush()
            took = f" in {result['took']} s" if "took" in result else ""
            print(f"{result['part']} {result['name']}: {result['outcome']}{took}", flush=True)

        at_once = min(AT_ONCE[values.chip], os.cpu_count() or 1)
        results = run_jobs(todo, at_once, values.seconds, keep)
    print(table(results), flush=True)
    wrong = sum(result["outcome"] != "ok" for result in results)
    if wrong:
        raise ValueError(f"{wrong} of {len(results)} did not pass; see above.")


if __name__ == "__main__":
    launch(define_flags, main)
