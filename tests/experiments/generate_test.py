"""The generate command: the library's answers, an effect of every flag, refusal of misuse."""

import io
import json
import os
import subprocess
import sys

import pytest
from absl import flags

from experiments import flags as shared
from experiments import generate as command
from llama4_jax import pretrained, serve
from llama4_jax.pretrained import from_pretrained
from llama4_jax.serve import Answer, EngineConfig, NewToken, Options, Request, generate
from llama4_jax.text import Image
from tests.serve import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two checkpoints, a picture and a file of requests."""
    folder = tmp_path_factory.mktemp("generate")
    tiny.write_checkpoint(folder)
    (folder / "bare").mkdir()
    tiny.write_checkpoint(folder / "bare", with_tokenizer=False)
    tiny.picture(0).save(folder / "digit.png")
    requests = [
        {"tokens": [tiny.BOS, 7, 9]},
        {"prompt": "a", "images": [str(folder / "digit.png")]},
        {"messages": [{"role": "user", "content": "q"}]},
    ]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, requests)))
    return folder


def values_of(folder, *arguments):
    values = flags.FlagValues()
    command.define_flags(values)
    values(["generate", f"--checkpoint={folder / 'checkpoint'}", *arguments])
    return values


def run(folder, *arguments):
    command.main(values_of(folder, *arguments))


def library_answers(folder, *requests):
    return generate(from_pretrained(folder / "checkpoint"), requests, max_new_tokens=5)


# ------------------------------------------------------------------------------------- answers


def test_a_prompt_streams_its_answer(folder, capsys):
    run(folder, "--prompt=ab", "--max_new_tokens=5")
    (answer,) = library_answers(folder, Request(prompt="ab"))
    assert capsys.readouterr().out == f"{answer.text}\n"


def test_pictures_stand_before_the_prompt_in_order(folder, capsys, tmp_path):
    wide = tmp_path / "wide.png"
    tiny.picture(1, wide=True).save(wide)
    images = [str(wide), str(folder / "digit.png")]
    run(folder, "--prompt=ab", "--max_new_tokens=5", *(f"--image={path}" for path in images))
    with_pictures, blind, swapped = (
        library_answers(folder, Request(prompt="ab", images=used))[0].text
        for used in (images, [], images[::-1])
    )
    assert capsys.readouterr().out == f"{with_pictures}\n"
    assert len({with_pictures, blind, swapped}) == 3


def test_a_file_of_requests_becomes_a_file_of_answers_in_its_order(folder, capsys, tmp_path):
    output = tmp_path / "out.jsonl"
    run(folder, f"--input={folder / 'in.jsonl'}", f"--output={output}", "--max_new_tokens=5")
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    answers = library_answers(
        folder,
        Request(tokens=[tiny.BOS, 7, 9]),
        Request(prompt="a", images=[str(folder / "digit.png")]),
        Request(messages=[{"role": "user", "content": "q"}]),
    )
    wanted = [{"tokens": a.tokens, "text": a.text, "finish_reason": "length"} for a in answers]
    assert lines == wanted
    assert capsys.readouterr().out == ""


def test_without_an_output_answers_are_printed_as_lines(folder, capsys):
    run(folder, f"--input={folder / 'in.jsonl'}", "--max_new_tokens=5")
    lines = capsys.readouterr().out.splitlines()
    assert [len(json.loads(line)["tokens"]) for line in lines] == [5, 5, 5]


def test_a_prompt_s_answer_goes_to_the_output_too(folder, capsys, tmp_path):
    output = tmp_path / "out.jsonl"
    run(folder, "--prompt=ab", "--max_new_tokens=5", f"--output={output}")
    assert json.loads(output.read_text("utf-8"))["text"] + "\n" == capsys.readouterr().out


def test_a_checkpoint_without_a_tokenizer_serves_tokens(folder, tmp_path):
    requests, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text('{"tokens": [256, 7, 9]}')
    run(
        folder,
        f"--checkpoint={folder / 'bare' / 'checkpoint'}",
        f"--input={requests}",
        f"--output={output}",
        "--max_new_tokens=5",
    )
    (answer,) = library_answers(folder, Request(tokens=[256, 7, 9]))
    assert json.loads(output.read_text()) == {"tokens": answer.tokens, "finish_reason": "length"}


def test_an_interrupted_run_keeps_its_answers(folder, tmp_path, monkeypatch):
    def interrupted(*_, on_answer, **__):
        on_answer(Answer(tokens=[1], text="a", finish_reason="length"))
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "generate", interrupted)
    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(folder, f"--input={folder / 'in.jsonl'}", f"--output={output}")
    assert json.loads((tmp_path / "out.jsonl.partial").read_text())["tokens"] == [1]
    assert not output.exists()


# --------------------------------------------------------------------------------------- flags


class Called(Exception):
    """Raised in place of generation, with what it was given."""


def settings_of(monkeypatch, folder, *arguments):
    def record(pretrained, requests, **settings):
        raise Called({"pretrained": pretrained, **settings})

    monkeypatch.setattr(serve, "generate", record)
    with pytest.raises(Called) as called:
        run(folder, "--prompt=ab", *arguments)
    return called.value.args[0]


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("--max_new_tokens=3", Options(max_new_tokens=3, stop=[])),
        ("--temperature=0.5", Options(temperature=0.5, stop=[])),
        ("--top_p=0.5", Options(top_p=0.5, stop=[])),
        ("--top_k=5", Options(top_k=5, stop=[])),
        ("--seed=5", Options(seed=5, stop=[])),
        ("--stop=a", Options(stop=["a"])),
        (
            '--options={"n": 2, "min_p": 0.1, "logit_bias": {"7": 1.5}}',
            Options(n=2, min_p=0.1, logit_bias={7: 1.5}, stop=[]),
        ),
    ],
)
def test_every_flag_of_an_answer_reaches_it(monkeypatch, folder, argument, options):
    assert settings_of(monkeypatch, folder, argument)["options"] == options


@pytest.mark.parametrize(
    ("argument", "sizes"),
    [
        ("--kv_cache=int8", {"kv_cache": "int8"}),
        ("--speculate=ngram", {"speculate": "ngram"}),
        ("--max_rows=3", {"max_rows": 3}),
    ],
)
def test_every_flag_of_the_engine_reaches_it(monkeypatch, folder, argument, sizes):
    assert settings_of(monkeypatch, folder, argument)["config"] == EngineConfig(**sizes)


def test_a_line_s_own_options_stand_before_those_of_the_flags(folder, tmp_path):
    lines = [{"prompt": "a", "max_new_tokens": 2, "logprobs": 1, "n": 2}, {"prompt": "a"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    output = tmp_path / "out.jsonl"
    run(folder, f"--input={tmp_path / 'in.jsonl'}", f"--output={output}", "--max_new_tokens=3")
    first, second = map(json.loads, output.read_text().splitlines())
    assert (len(first["tokens"]), len(second["tokens"])) == (2, 3)
    assert [len(each["likeliest"]) for each in first["logprobs"]] == [1, 1]
    assert len(first["others"]) == 1
    assert second.keys() == {"tokens", "text", "finish_reason"}


def test_dtype_and_mesh_reach_the_model(monkeypatch, folder):
    settings = settings_of(monkeypatch, folder)
    assert settings["pretrained"].config.dtype == "float32"
    assert settings["pretrained"].mesh is None
    settings = settings_of(monkeypatch, folder, "--dtype=bfloat16", "--mesh=data:4,tensor:2")
    assert settings["pretrained"].config.dtype == "bfloat16"
    assert settings["pretrained"].model.embed.table_VD[...].dtype == "bfloat16"
    assert settings["pretrained"].mesh is not None
    assert len(settings["pretrained"].model.embed.table_VD[...].sharding.device_set) == 8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give --prompt or --input or --chat"),
        (["--prompt=a", "--chat"], "--prompt and --chat exclude each other"),
        (["--prompt=a", "--input=IN"], "--prompt and --input exclude each other"),
        (["--input=IN", "--image=PICTURE"], "--image and --input exclude each other"),
        (["--chat", "--output=new.jsonl"], "--output and --chat exclude each other"),
        (["--prompt=a", "--image=absent.png"], "no image file 'absent.png'"),
        (["--prompt=a", "--top_p=1.5"], r"--top_p \(1.5\)"),
        (["--prompt=a", "--temperature=-1"], r"--temperature \(-1.0\)"),
        (["--prompt=a", "--top_k=-1"], r"--top_k \(-1\)"),
        (["--prompt=a", "--seed=-1"], r"--seed \(-1\)"),
        (["--prompt=a", "--max_new_tokens=0"], r"--max_new_tokens \(0\)"),
        (["--prompt=a", "--options={"], "--options: "),
        (["--prompt=a", "--options=[1]"], "--options: expected a JSON object, found list"),
        (["--prompt=a", '--options={"m": 1}'], "--options: unknown field 'm'; an answer has"),
        (["--prompt=a", '--options={"n": 0}'], r"--options: n \(0\) must lie in 1..128"),
        (["--prompt=a", "--output=IN"], "in.jsonl exists"),
        (["--prompt=a", "--mesh=expert:3"], "spreads over 3 devices"),
        (["--prompt=a", "--checkpoint=absent"], "--checkpoint=absent does not exist"),
        (["--prompt=a", "--checkpoint=BARE"], "has no tokenizer"),
        (["--chat", "--checkpoint=BARE"], "has no tokenizer"),
        (["--input=absent.jsonl"], "no file absent.jsonl"),
    ],
)
def test_contradictory_flags_are_refused_before_anything_is_loaded(
    folder, monkeypatch, arguments, says
):
    monkeypatch.setattr(pretrained, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    places = {
        "=IN": f"={folder / 'in.jsonl'}",
        "=PICTURE": f"={folder / 'digit.png'}",
        "=BARE": f"={folder / 'bare' / 'checkpoint'}",
    }
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    with pytest.raises(shared.FlagError, match=says):
        run(folder, *arguments)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "a", "warmth": 1}', ":2: unknown field 'warmth'"),
        ('{"prompt": "a", "temperature": -1}', r":2: temperature \(-1\) must lie in"),
        ('{"prompt": "a", "tokens": [1]}', ":2: a request has one of prompt, messages and tokens"),
        ('{"prompt": "a", "images": ["absent.png"]}', ":2: there is no image file 'absent.png'"),
        ('{"prompt": "a", "images": null}', ":2: images must be a list"),
        ('{"messages": 3}', ":2: messages must be a list"),
        ('{"messages": [{"content": "a"}]}', ':2: A message is an object with a "role"'),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image", "path": "no.png"}]}]}',
            ":2: there is no image file 'no.png'",
        ),
        ("{", ":2: "),
    ],
)
def test_a_bad_line_is_named_before_anything_is_loaded(folder, monkeypatch, tmp_path, line, says):
    monkeypatch.setattr(pretrained, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(ValueError, match=says):
        run(folder, f"--input={tmp_path / 'in.jsonl'}")


# ---------------------------------------------------------------------------------------- chat


def test_a_dialogue_remembers_what_was_said_and_ends_at_exit(folder, monkeypatch, capsys):
    seen = []

    def echo(engine, requests, *, on_token, options):
        (request,) = requests
        seen.append((list(request.messages), options.seed, options.max_new_tokens))
        text = f"answer {len(seen)}"
        on_token(NewToken(index=0, token=1, text=text))
        return [Answer(tokens=[1], text=text, finish_reason="stop")]

    monkeypatch.setattr(serve, "generate", echo)
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\n\nsecond\n/exit\nunheard\n"))
    picture = str(folder / "digit.png")
    run(folder, "--chat", f"--image={picture}", "--max_new_tokens=3", "--seed=4")
    assert capsys.readouterr().out == "answer 1\nanswer 2\n"
    (first, first_seed, limit), (second, second_seed, _) = seen
    assert [m.content for m in first] == [[Image(picture), "first"]]
    assert [m.content for m in second] == [[Image(picture), "first"], "answer 1", "second"]
    assert [m.role for m in second] == ["user", "assistant", "user"]
    assert first_seed != second_seed
    assert limit == 3


def test_a_dialogue_through_a_pipe_on_a_mesh_answers_until_the_input_ends(folder):
    """As a person runs it, on a machine whose CPU counts as one device."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.generate", f"--checkpoint={folder / 'checkpoint'}",
         "--chat", "--mesh=expert:2,tensor:2", "--max_new_tokens=5"],
        input="q\n", capture_output=True, encoding="utf-8", timeout=300, check=False,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
    )  # fmt: skip
    assert done.stderr == ""
    (answer,) = library_answers(folder, Request(messages=[{"role": "user", "content": "q"}]))
    assert done.stdout == f"{answer.text}\n"
    assert done.returncode == 0
