"""Whatever is damaged in what others wrote, the answer is one, or one clear line.

Each case damages one kind of file in many seeded ways. A number in an error's message (the seed)
repeats the damage: `mutate_json(value, random.Random(seed))` and its like.
"""

import contextlib
import io
import json
import random
import resource
import signal
import zipfile

import numpy as np
import pytest
from PIL import Image

from experiments.flags import read_requests as read_file
from llama4_jax.checkpoint import hf, open_checkpoint
from llama4_jax.checkpoint.native import config_from_json, config_to_json
from llama4_jax.checkpoint.safetensors_file import read_header
from llama4_jax.checkpoint.torch_file import read_tensors
from llama4_jax.config import VisionConfig, nano, scout
from llama4_jax.config.generation import read_generation
from llama4_jax.config.hf import from_hf, to_hf
from llama4_jax.config.meta import from_meta, to_meta
from llama4_jax.config.preprocessor import read_max_tiles
from llama4_jax.data.images import FORMATS, load_image
from llama4_jax.serve.options import Options
from llama4_jax.serve.requests import read_requests
from llama4_jax.text import (
    CHAT_TEMPLATE,
    ChatTemplate,
    HFTokenizer,
    Message,
    TiktokenTokenizer,
    load_chat_template,
    template_limits,
)
from llama4_jax.untrusted import load_json
from tests.checkpoint.tiny import GOLDEN
from tests.config.preprocessor_test import RELEASED
from tests.fuzz.mutate import mutate_bytes, mutate_json, mutate_template
from tests.serve import tiny
from tests.text.reference import NANO
from tests.text.template_test import TYPICAL

SECONDS = 20  # of processor time, in which one damaged file must be answered
MEMORY = 2 << 30
LINES = 14  # tensors that are wrong are listed, a dozen of them


@pytest.fixture(autouse=True)
def limits():
    """Let what hangs or fills the memory fail here and not end the suite."""

    def hung(*_):
        raise AssertionError(f"no answer within {SECONDS} s")

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGVTALRM, hung)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, handler)


def check(read, mutate, count, *, lines=1):
    """Damage something `count` times; each time `read` answers, or says what is wrong."""
    refused = 0
    for seed in range(count):
        damaged = mutate(random.Random(seed))
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            read(damaged)
        except (ValueError, OSError) as error:
            refused += 1
            message = str(error)
            assert 10 < len(message) < 3000, f"seed {seed}: {message[:300]!r}"
            assert message.count("\n") < lines, f"seed {seed}: {message!r}"
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert count // 20 < refused, "the damage does no harm"


def writing(path, read):
    """Return a reader of bytes that puts them into a file first."""

    def read_bytes(data):
        path.write_bytes(data)
        return read(path)

    return read_bytes


def dumped(value):
    return json.dumps(value).encode()


# --------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("read", "values", "count"),
    [
        (from_hf, to_hf(scout()), 400),
        (from_hf, to_hf(nano()), 200),
        (from_meta, to_meta(scout()), 300),
        (lambda values: config_from_json(values, "llama4_jax.json"), config_to_json(nano()), 200),
    ],
)
def test_configs(read, values, count):
    check(read, lambda rng: mutate_json(values, rng), count)


def test_config_files_as_bytes(tmp_path):
    data = dumped(to_hf(nano()))
    read = writing(tmp_path / "config.json", lambda path: from_hf(load_json(path)))
    check(read, lambda rng: mutate_bytes(data, rng), 100)


def test_generation_configs(tmp_path):
    values = {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    values |= {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1}
    path = tmp_path / "generation_config.json"
    read = writing(path, lambda path: read_generation(path, nano()))
    check(read, lambda rng: dumped(mutate_json(values, rng)), 80)


def test_preprocessor_configs(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    read = writing(path, lambda path: read_max_tiles(path.parent, VisionConfig()))
    check(read, lambda rng: dumped(mutate_json(RELEASED, rng)), 80)


def test_tokenizer_configs(tmp_path):
    values = json.loads((NANO / "tokenizer_config.json").read_text())
    path = tmp_path / "tokenizer_config.json"
    read = writing(path, lambda path: load_chat_template(path.parent))
    check(read, lambda rng: mutate_bytes(dumped(mutate_json(values, rng)), rng), 50)


# ----------------------------------------------------------------------------------- checkpoints


def test_safetensors_headers(tmp_path):
    data = (GOLDEN / "hf" / "model-00002-of-00005.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]

    def damaged(rng):
        text = mutate_bytes(header, rng)
        if rng.random() < 0.5:
            text = dumped(mutate_json(json.loads(header), rng))
        size = len(text) if rng.random() < 0.9 else rng.getrandbits(rng.choice((16, 40, 64)))
        return size.to_bytes(8, "little") + text + rest

    check(writing(tmp_path / "model.safetensors", read_header), damaged, 250)


def test_indexes(tmp_path):
    index = json.loads((GOLDEN / "hf" / "model.safetensors.index.json").read_text())
    for path in (GOLDEN / "hf").glob("*.safetensors"):
        (tmp_path / path.name).symlink_to(path)
    path = tmp_path / "model.safetensors.index.json"
    read = writing(path, lambda path: hf._read_headers(path.parent))
    check(read, lambda rng: dumped(mutate_json(index, rng)), 60)


def test_whole_checkpoints(tmp_path):
    """The config changes: what it asks for is compared with what the files hold."""
    for folder, name in (("hf", "config.json"), ("meta", "params.json")):
        (tmp_path / folder).mkdir()
        for path in (GOLDEN / folder).iterdir():
            if path.name != name:
                (tmp_path / folder / path.name).symlink_to(path)
        values = json.loads((GOLDEN / folder / name).read_text())
        read = writing(tmp_path / folder / name, lambda path: open_checkpoint(path.parent))
        check(read, lambda rng, v=values: dumped(mutate_json(v, rng)), 15, lines=LINES)


def test_pickles(tmp_path):
    with zipfile.ZipFile(GOLDEN / "meta" / "consolidated.01.pth") as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in contents if name.endswith("data.pkl"))

    def damaged(rng):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for key, data in contents.items():
                archive.writestr(key, mutate_bytes(data, rng) if key == name else data)
        return file.getvalue()

    check(writing(tmp_path / "consolidated.00.pth", read_tensors), damaged, 150)


def test_archives(tmp_path):
    data = (GOLDEN / "meta" / "consolidated.01.pth").read_bytes()

    def damaged(rng):  # the end, where an archive lists its members, above all
        cut = len(data) - rng.choice((30, 500, 5000, len(data)))
        return data[:cut] + mutate_bytes(data[cut:], rng)

    check(writing(tmp_path / "consolidated.00.pth", read_tensors), damaged, 150)


# ------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, TYPICAL])
def test_templates(source, monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_STEPS", 20_000)
    messages = [Message("system", "s"), Message("user", "<|eot|>" * 3), Message("assistant", "a")]
    variables = {"bos_token": "<|begin_of_text|>"}

    def read(source):
        return ChatTemplate(source, variables).text(messages)

    check(read, lambda rng: mutate_template(source, rng), 150)


def test_tokenizer_files(tmp_path):
    tiny.write_tokenizer(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    read = writing(tmp_path / "tokenizer.json", lambda path: HFTokenizer(path).encode("a b"))
    check(read, lambda rng: mutate_bytes(dumped(mutate_json(values, rng)), rng), 60)
    ranks = b"".join(b"%s %d\n" % (word, i) for i, word in enumerate((b"YQ==", b"Yg==") * 200))
    read = writing(tmp_path / "tokenizer.model", TiktokenTokenizer)
    check(read, lambda rng: mutate_bytes(ranks, rng), 20)


# -------------------------------------------------------------------------------------- requests


def test_requests(tmp_path):
    model = tiny.pretrained(tmp_path, model=None)
    tiny.picture(0).save(tmp_path / "a.png")
    image = {"type": "image", "path": str(tmp_path / "a.png")}
    call = {"function": {"name": "f", "arguments": '{"a": [1, {"b": null}]}'}, "id": "1"}
    lines = [
        {"prompt": "a", "images": [str(tmp_path / "a.png")], "temperature": 0.5, "stop": ["x"]},
        {"tokens": [tiny.BOS, 5, 7], "logit_bias": {"3": 1.0}, "json_schema": {"type": "object"}},
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "x"}, image]},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": {"a": 1}},
            ],
            "max_new_tokens": 3,
        },
    ]
    known = {name: name for name in ("prompt", "messages", "tokens", "images")}

    def read(path):
        read_requests(model, read_file(str(path), known, Options()))

    def damaged(rng):
        place = rng.randrange(len(lines))
        line = dumped(mutate_json(lines[place], rng))
        if rng.random() < 0.3:
            line = mutate_bytes(line, rng)
        return b"\n".join([*(dumped(line) for line in lines[:place]), line])

    check(writing(tmp_path / "in.jsonl", read), damaged, 250)


@pytest.mark.parametrize("kind", FORMATS)
def test_images(kind):
    waves = np.add.outer(np.arange(40), np.arange(30))[..., None] * [3, 5, 7] % 256
    file = io.BytesIO()
    Image.fromarray(waves.astype(np.uint8)).save(file, kind)
    data = file.getvalue()
    with contextlib.redirect_stderr(io.StringIO()):
        check(load_image, lambda rng: mutate_bytes(data, rng), 60)
