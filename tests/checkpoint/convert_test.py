"""Tests of checkpoint/convert.py and writer.py: any layout to any other, whatever happens."""

import dataclasses
import itertools
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from llama4_jax.checkpoint import FORMATS, convert, hf, open_checkpoint, writer
from llama4_jax.checkpoint.convert import make_plan, write_source
from llama4_jax.checkpoint.writer import partial_directory, write_checkpoint
from tests.checkpoint.tiny import (
    DENSE_TIED,
    GOLDEN,
    TINY,
    MemorySource,
    assert_holds,
    assert_same,
    read_all,
    write,
)

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The same model in every layout."""
    folder = tmp_path_factory.mktemp("layouts")
    for layout in FORMATS:
        write(TINY, folder / layout, layout)
    return folder, MemorySource(TINY)


@pytest.mark.parametrize(("start", "end"), list(itertools.product(FORMATS, FORMATS)))
def test_any_layout_becomes_any_other_bit_for_bit(tmp_path, checkpoints, start, end):
    folder, source = checkpoints
    convert(folder / start, tmp_path / "out", to=end)
    assert_holds(tmp_path / "out", source)


def test_a_dense_tied_model_goes_through_every_layout(tmp_path):
    source = write(DENSE_TIED, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", to="meta")
    convert(tmp_path / "meta", tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "again", to="hf")
    assert_holds(tmp_path / "again", source)


def test_there_and_back_gives_the_same_bytes(tmp_path):
    convert(GOLDEN / "hf", tmp_path / "a", to="meta")
    convert(tmp_path / "a", tmp_path / "b", to="orbax")
    convert(tmp_path / "b", tmp_path / "c", to="hf")
    convert(GOLDEN / "hf", tmp_path / "d", to="hf")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()


@pytest.mark.parametrize("kind", ["hf_fp8", "meta_fp8"])
def test_fp8_becomes_plain_weights_and_a_plain_config(tmp_path, kind):
    convert(GOLDEN / kind, tmp_path / "plain", to="hf")
    assert_same(open_checkpoint(tmp_path / "plain"), open_checkpoint(GOLDEN / kind))
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()


def test_dtype_changes_values_and_config(tmp_path):
    convert(GOLDEN / "hf", tmp_path / "wide", to="meta", dtype="float32")
    convert(tmp_path / "wide", tmp_path / "narrow", to="hf", dtype="bfloat16")
    wide, golden = open_checkpoint(tmp_path / "wide"), open_checkpoint(GOLDEN / "hf")
    assert wide.config.dtype == "float32"
    name = "layers.1.ffn.experts.w_up_EDF"
    np.testing.assert_array_equal(read_all(wide, name), read_all(golden, name).astype(np.float32))
    assert_same(open_checkpoint(tmp_path / "narrow"), golden, configs=False)


def test_model_parallel_is_the_number_of_files(tmp_path):
    convert(GOLDEN / "hf", tmp_path / "two", to="meta", model_parallel=2)
    convert(GOLDEN / "hf", tmp_path / "default", to="meta")
    assert len(list((tmp_path / "two").glob("*.pth"))) == 2
    assert len(list((tmp_path / "default").glob("*.pth"))) == 8
    with pytest.raises(ValueError, match=r"model_parallel \(2\) is for the meta layout"):
        convert(GOLDEN / "hf", tmp_path / "x", to="hf", model_parallel=2)


def test_tokenizer_and_licence_files_come_along_and_nothing_else(tmp_path):
    shutil.copytree(GOLDEN / "hf", tmp_path / "hf")
    carried = {"tokenizer.model": b"\x00\xff", "tokenizer.json": b"{}", "LICENSE": b"free"}
    for name, data in {**carried, "optimizer.bin": b"x"}.items():
        (tmp_path / "hf" / name).write_bytes(data)
    convert(tmp_path / "hf", tmp_path / "meta", to="meta")
    for name, data in carried.items():
        assert (tmp_path / "meta" / name).read_bytes() == data
    assert not (tmp_path / "meta" / "optimizer.bin").exists()
    generation = (tmp_path / "meta" / "generation_config.json").read_bytes()
    assert generation == (GOLDEN / "hf" / "generation_config.json").read_bytes()


def test_the_number_of_tiles_of_a_processors_config_goes_along(tmp_path):
    shutil.copytree(GOLDEN / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / "preprocessor_config.json"
    path.write_text(json.dumps({"max_patches": 5, "processor_class": "x"}))
    assert open_checkpoint(tmp_path / "hf").config.max_tiles == 5
    convert(tmp_path / "hf", tmp_path / "meta", to="meta")
    convert(tmp_path / "meta", tmp_path / "again", to="hf")
    assert open_checkpoint(tmp_path / "again").config.max_tiles == 5
    source = open_checkpoint(tmp_path / "hf")
    source.config = dataclasses.replace(source.config, max_tiles=7)
    write_source(
        source, tmp_path / "seven", to="hf", dtype=None, model_parallel=None,
        origin=tmp_path / "hf", progress=writer.no_progress,
    )  # fmt: skip
    assert open_checkpoint(tmp_path / "seven").config.max_tiles == 7
    written = json.loads((tmp_path / "seven" / "preprocessor_config.json").read_text())
    assert written == {"max_patches": 7, "processor_class": "x"}


@pytest.mark.parametrize("extra", [[], ["config.json"]])
def test_an_adapter_is_named_as_such(tmp_path, extra):
    base = {"base_model_name_or_path": "meta-llama/Llama-4-Scout-17B-16E", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(base))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    for name in extra:
        shutil.copy(GOLDEN / "hf" / name, tmp_path)
    with pytest.raises(ValueError, match=r"a PEFT adapter and no model; .*Llama-4-Scout-17B-16E'"):
        open_checkpoint(tmp_path)


def test_a_target_in_use_is_refused_and_an_empty_one_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    convert(GOLDEN / "hf", tmp_path / "empty", to="hf")
    with pytest.raises(ValueError, match="already exists"):
        convert(GOLDEN / "hf", tmp_path / "empty", to="hf")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="already exists"):
        convert(GOLDEN / "hf", tmp_path / "file", to="hf")
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(ValueError, match="lies inside source"):
        convert(tmp_path / "empty", tmp_path / "empty" / "inner", to="hf")


def test_someone_elses_partial_directory_is_not_removed(tmp_path):
    partial = partial_directory(tmp_path / "out")
    partial.mkdir()
    (partial / "precious").write_text("mine")
    with pytest.raises(ValueError, match="was not left by a conversion"):
        convert(GOLDEN / "hf", tmp_path / "out", to="hf")
    assert (partial / "precious").read_text() == "mine"


@pytest.mark.parametrize("journal", ["", "[]", "3", '{"identity": 3}', '{"done": {}}', "\0"])
def test_a_journal_that_a_power_cut_spoilt_starts_the_work_afresh(tmp_path, journal):
    writer.journal_path(tmp_path / "out").write_text(journal)
    partial = partial_directory(tmp_path / "out")
    partial.mkdir()
    (partial / "half").write_text("stale")
    convert(GOLDEN / "hf", tmp_path / "out", to="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "half").exists()


def test_a_target_that_is_a_link_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name, place in (("link", "elsewhere"), ("dangling", "nowhere")):
        (tmp_path / name).symlink_to(tmp_path / place)
        with pytest.raises(ValueError, match="is a symbolic link; name the directory that it"):
            convert(GOLDEN / "hf", tmp_path / name, to="hf")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_leading_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(GOLDEN / "hf", tmp_path / "hf")
    convert("~/hf", "~/out", to="meta")
    assert (tmp_path / "out" / "params.json").is_file()


def test_a_partial_directory_is_not_emptied_while_it_is_the_source(tmp_path):
    shutil.copytree(GOLDEN / "hf", partial_directory(tmp_path / "out"))
    writer.journal_path(tmp_path / "out").write_text("{}")
    with pytest.raises(ValueError, match="lies inside source"):
        convert(partial_directory(tmp_path / "out"), tmp_path / "out", to="hf")


FULL = """
    import resource, signal, sys
    from absl import flags
    from experiments.launch import _status
    from llama4_jax.checkpoint import convert

    flags.FLAGS(["convert"])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for to, most in (("hf", 20_000), ("meta", 20_000), ("orbax", 1_000)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        status = _status(lambda _: convert(sys.argv[1], f"{sys.argv[2]}/{to}", to=to), ["convert"])
        assert status == 1
"""


def test_a_disk_that_fills_up_is_a_line_that_names_what_is_kept(tmp_path):
    """In a process of its own, whose files may not grow beyond some bytes."""
    command = [sys.executable, "-c", textwrap.dedent(FULL), GOLDEN / "meta", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ours = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "what is"))]
    assert ours[1::2] == [
        f"what is done so far is kept in {partial_directory(tmp_path / to)}; run it again to go on"
        for to in FORMATS
    ]
    before_orbax = done.stderr.partition(ours[3])[0]  # whose threads may say too what has failed
    assert "Traceback" not in before_orbax


def test_a_full_disk_is_noticed_before_work_starts(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"0.0 GB free and the checkpoint needs 0.1 GB"):
        convert(GOLDEN / "hf", tmp_path / "out", to="hf")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("to", "value"), [("hf", np.nan), ("meta", -np.inf), ("orbax", 3.4e38)])
def test_a_weight_that_is_not_finite_when_written_is_refused_by_name(tmp_path, to, value):
    """The last one is finite in float32 and not in bfloat16."""
    source = MemorySource(TINY, "float32")
    source.arrays["layers.3.attention.w_q_DNH"][5, 3, 1] = value
    plan = make_plan(source, to, dtype="bfloat16")
    name = {"hf": "self_attn.q_proj.weight", "meta": "attention.wqkv.weight"}.get(
        to, "attention.w_q"
    )
    with pytest.raises(ValueError, match=rf"layers\.3\.{name}\w* holds NaN or infinity"):
        write_checkpoint(plan, tmp_path / "out", files={})
    assert not (tmp_path / "out").exists()


def test_damage_is_found_before_anything_is_written(tmp_path):
    shutil.copytree(GOLDEN / "hf", tmp_path / "hf")
    last = sorted((tmp_path / "hf").glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is truncated"):
        convert(tmp_path / "hf", tmp_path / "out", to="meta")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


class _Stop(Exception):
    pass


def _stop_after(monkeypatch, num_bytes):
    """Make writing fail after so many bytes, and count what later runs write."""
    written = [0]
    plan_hf = hf.plan_hf

    def small_shards(source, dtype):
        return plan_hf(source, dtype, shard_bytes=20_000)

    monkeypatch.setattr(hf, "plan_hf", small_shards)
    monkeypatch.setattr(writer, "_WORTH_KEEPING_BYTES", 1000)

    class Progress:
        def __init__(self, total):
            self.total = total

        def __enter__(self):
            def advance(count):
                written[0] += count
                if written[0] > num_bytes:
                    raise _Stop

            return advance

        def __exit__(self, *_):
            return None

    return Progress


def test_an_interrupted_conversion_goes_on_after_the_last_finished_file(tmp_path, monkeypatch):
    progress = _stop_after(monkeypatch, 100_000)
    with pytest.raises(_Stop):
        convert(GOLDEN / "meta", tmp_path / "out", to="hf", progress=progress)
    partial = partial_directory(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (partial / "config.json").exists()
    done = json.loads(writer.journal_path(tmp_path / "out").read_text())["done"]
    assert len(done) > 2
    times = {name: (partial / name).stat().st_mtime_ns for name in done}
    convert(GOLDEN / "meta", tmp_path / "out", to="hf")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in done} == times
    assert_same(open_checkpoint(tmp_path / "out"), open_checkpoint(GOLDEN / "hf"))
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_another_conversion_to_the_same_place_starts_afresh(tmp_path, monkeypatch):
    progress = _stop_after(monkeypatch, 100_000)
    with pytest.raises(_Stop):
        convert(GOLDEN / "meta", tmp_path / "out", to="hf", progress=progress)
    convert(GOLDEN / "meta", tmp_path / "out", to="hf", dtype="float32")
    assert open_checkpoint(tmp_path / "out").dtype("embed.table_VD") == np.float32


def test_a_save_from_memory_never_resumes(tmp_path, monkeypatch):
    progress = _stop_after(monkeypatch, 50_000)
    with pytest.raises(_Stop):
        source = MemorySource(TINY)
        write_checkpoint(make_plan(source, "hf"), tmp_path / "out", files={}, progress=progress)
    source.arrays["final_norm.scale_D"] += 1
    source.arrays["vision.class_embedding_D"] += 1
    write_checkpoint(make_plan(source, "hf"), tmp_path / "out", files={})
    assert_holds(tmp_path / "out", source)


def test_two_conversions_to_one_target_do_not_mix(tmp_path):
    busy = pytest.raises(ValueError, match="is being written by another process")
    with writer._locked(tmp_path / "out"), busy:
        convert(GOLDEN / "hf", tmp_path / "out", to="hf")
    convert(GOLDEN / "hf", tmp_path / "out", to="hf")


class _Killed(BaseException):
    pass


class _Instants:
    """Stop this process's changes of files below a path at the n-th, and all that follow it.

    Python tells an audit hook of each before it is done. Hooks cannot be removed, so there is one.
    """

    root: str | None = None
    left = 0
    hooked = False
    changes = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.copyfile")

    @classmethod
    def hook(cls, event, arguments):
        if cls.root is None or not str(arguments[:1])[1:].startswith(cls.root):
            return
        is_write = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wxar"
        if event in cls.changes or (is_write and arguments[1] not in ("r", "rb")):
            cls.left -= 1
            if cls.left < 0:
                raise _Killed(event)

    @classmethod
    def stopping_at(cls, number, root):
        if not cls.hooked:
            sys.addaudithook(cls.hook)
            cls.hooked = True
        cls.left, cls.root = number, repr(str(root))[:-1]


@pytest.mark.parametrize("start", ["nothing", "a stale run", "a finished unit"])
def test_whatever_instant_a_conversion_is_stopped_at_the_same_command_finishes(
    tmp_path, monkeypatch, start
):
    progress, target = _stop_after(monkeypatch, 30_000), tmp_path / "out"
    convert(GOLDEN / "hf", target, to="hf")
    expected = {path.name: path.read_bytes() for path in target.iterdir()}
    for number in itertools.count():  # of the change that is not done any more
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if start != "nothing":
            dtype = "float32" if start == "a stale run" else None
            with pytest.raises(_Stop):
                convert(GOLDEN / "hf", target, to="hf", dtype=dtype, progress=progress)
        _Instants.stopping_at(number, target)
        try:
            convert(GOLDEN / "hf", target, to="hf")
            break
        except _Killed:
            pass
        finally:
            _Instants.root = None
        if writer.journal_path(target).exists() or not target.exists():  # else it had finished
            convert(GOLDEN / "hf", target, to="hf")
            assert {path.name for path in tmp_path.iterdir()} == {"out"}
        assert {path.name: path.read_bytes() for path in target.iterdir()} == expected
    assert number > 20


KILLED = """
    import pathlib, sys, time
    from llama4_jax.checkpoint import convert

    class Slow:
        def __init__(self, total): pass
        def __enter__(self):
            def advance(count):
                print("written", flush=True)
                time.sleep(0.05)
            return advance
        def __exit__(self, *_): return None

    convert(sys.argv[1], sys.argv[2], to=sys.argv[3], progress=Slow)
"""


RESUMED = """
    import pathlib, sys, time
    from llama4_jax.checkpoint import convert, hf, writer

    plan_hf = hf.plan_hf
    hf.plan_hf = lambda source, dtype: plan_hf(source, dtype, shard_bytes=20_000)
    writer._WORTH_KEEPING_BYTES = 1000

    class Slow:
        def __init__(self, total): pass
        def __enter__(self):
            return lambda count: time.sleep(0.002)
        def __exit__(self, *_): return None

    print("begin", flush=True)
    convert(*sys.argv[1:3], to=sys.argv[3], progress=Slow)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_conversion_killed_three_times_at_random_instants_gives_the_same_bytes(tmp_path, seed):
    random_ = random.Random(seed)
    to, target = ("hf", "meta")[seed % 2], tmp_path / "out"

    def command(target):
        program = [sys.executable, "-c", textwrap.dedent(RESUMED), GOLDEN / "meta", target, to]
        return subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    with command(tmp_path / "whole") as process:
        process.stdout.readline()
        begin = time.monotonic()
    duration = time.monotonic() - begin
    for _ in range(3):
        with command(target) as process:
            process.stdout.readline()
            time.sleep(random_.uniform(0, duration))
            process.kill()
        assert not target.exists() or open_checkpoint(target)
    if writer.journal_path(target).exists() or not target.exists():  # else it had finished
        with command(target) as process:
            process.wait()
        assert process.returncode == 0
    for path in (tmp_path / "whole").iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("to", FORMATS)
def test_a_killed_conversion_leaves_nothing_that_looks_complete(tmp_path, to):
    target = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), GOLDEN / "meta", target, to]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(4):
            assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not target.exists()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        open_checkpoint(partial_directory(target))
    convert(GOLDEN / "meta", target, to=to)
    assert_same(open_checkpoint(target), open_checkpoint(GOLDEN / "hf"))
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == ["out"]
