"""The score command: its lines equal the library's scores, and misuse is refused."""

import json

import pytest
from absl import flags

from experiments import score as command
from llama4_jax import pretrained, serve
from llama4_jax.pretrained import from_pretrained
from llama4_jax.serve import Request, score
from tests.serve import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two checkpoints, a picture and a file of requests."""
    folder = tmp_path_factory.mktemp("score")
    tiny.write_checkpoint(folder)
    (folder / "bare").mkdir()
    tiny.write_checkpoint(folder / "bare", with_tokenizer=False)
    tiny.picture(0).save(folder / "digit.png")
    return folder


SLOTS = [tiny.BOS, 5, *[tiny.PATCH] * tiny.TOKENS_PER_TILE, 6, 7]


def run(folder, lines, *arguments):
    path = folder / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    values = flags.FlagValues()
    command.define_flags(values)
    values(["score", f"--checkpoint={folder / 'checkpoint'}", f"--input={path}", *arguments])
    command.main(values)


def test_lines_equal_the_library_s_scores_in_their_order(folder, tmp_path):
    picture = str(folder / "digit.png")
    lines = [
        {"text": "a longer text than the others"},
        {"tokens": [7]},
        {"tokens": SLOTS, "images": [picture]},
        {"text": "a", "images": [picture]},
    ]
    run(folder, lines, f"--output={tmp_path / 'out.jsonl'}")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    requests = [
        Request(prompt="a longer text than the others"),
        Request(tokens=[7]),
        Request(tokens=SLOTS, images=[picture]),
        Request(prompt="a", images=[picture]),
    ]
    for line, wanted in zip(
        found, score(from_pretrained(folder / "checkpoint"), requests), strict=True
    ):
        assert line == {"tokens": wanted.tokens, "logprobs": wanted.logprobs, "nll": wanted.nll}
        assert len(line["logprobs"]) == len(line["tokens"]) - 1
    assert found[1] == {"tokens": [7], "logprobs": [], "nll": 0.0}


def test_without_an_output_scores_are_printed(folder, capsys):
    run(folder, [{"tokens": [7]}])
    assert json.loads(capsys.readouterr().out)["tokens"] == [7]


def test_dtype_mesh_and_kv_cache_reach_the_model(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        serve,
        "score",
        lambda p, *_, config, **__: seen.append(
            (p.config.dtype, p.mesh is not None, config.kv_cache)
        ),
    )
    run(folder, [{"tokens": [7]}])
    how = "--dtype=bfloat16", "--mesh=expert:4,tensor:2", "--kv_cache=fp8"
    run(folder, [{"tokens": [7]}], *how)
    assert seen == [("float32", False, "auto"), ("bfloat16", True, "fp8")]


@pytest.mark.parametrize(
    ("lines", "arguments", "says"),
    [
        ([{"text": "a"}], ["--output=PICTURE"], "digit.png exists"),
        ([{"text": "a"}], ["--checkpoint=BARE"], "has no tokenizer; give lines of"),
        ([{"text": "a"}], ["--mesh=expert:3"], "spreads over 3 devices"),
        ([{"text": "a"}], ["--input="], "there is no file"),
        ([{"prompt": "a"}], [], "in.jsonl:1: unknown field 'prompt'; a request has text, tokens"),
        ([{"tokens": [1]}, {"images": []}], [], "in.jsonl:2: a request has one of"),
        ([], [], "holds no requests"),
    ],
)
def test_misuse_is_refused_before_anything_is_loaded(folder, monkeypatch, lines, arguments, says):
    monkeypatch.setattr(pretrained, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    places = {"PICTURE": folder / "digit.png", "BARE": folder / "bare" / "checkpoint"}
    for name, place in places.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    with pytest.raises(ValueError, match=says):
        run(folder, lines, *arguments)
