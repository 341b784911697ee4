"""The command that serves: its flags reach the server, wrong ones are refused before loading."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from absl import flags

from experiments import serve
from experiments.launch import FlagError
from tests.house import tree
from tests.serve import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"))


@contextlib.contextmanager
def running(*arguments: str):
    """Start the command; give its first line and the process."""
    command = [sys.executable, "-m", "experiments.serve", "--port=0", *arguments]
    with subprocess.Popen(
        command, cwd=tree.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
    ) as process:  # fmt: skip
        try:
            yield process.stdout.readline(), process
        finally:
            process.kill()


def values_of(*arguments: str) -> flags.FlagValues:
    values = flags.FlagValues()
    serve.define_flags(values)
    values(["serve", *arguments])
    return values


def test_the_flags_reach_the_server(checkpoint, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("sesame\n\n")
    asked = (
        f"--checkpoint={checkpoint}", "--name=little", f"--api_keys={keys}", "--max_context=64",
        "--max_rows=1", "--max_queue=0", "--cache_gb=0.001", "--kv_cache=int8", "--speculate=ngram",
        "--cors_origins=https://a.example", "--allow_image_hosts=images.example",
    )  # fmt: skip
    with running(*asked) as (line, process):
        found = re.fullmatch(r"serving little at (http://127.0.0.1:\d+)\n", line)
        assert found, line + process.stdout.read()
        headers = {"authorization": "Bearer sesame"}
        with httpx.Client(base_url=found[1], headers=headers, timeout=120) as client:
            while client.get("/health").status_code != 200:
                time.sleep(0.2)  # asking without pause, the test and the server take a core
            (card,) = client.get("/v1/models").json()["data"]
            assert (card["id"], card["max_model_len"]) == ("little", 64)
            assert client.get("/v1/models", headers={"authorization": ""}).status_code == 401
            body = {"prompt": "abababab", "max_tokens": 50, "temperature": 0, "ignore_eos": True}
            assert len(client.post("/v1/completions", json=body).json()["choices"]) == 1
            assert client.post("/v1/completions", json={**body, "n": 2}).status_code == 429
            origin = {"origin": "https://a.example"}
            assert "access-control-allow-origin" in client.get("/version", headers=origin).headers
            image = {"type": "image_url", "image_url": {"url": "https://images.example/a.png"}}
            message = {"role": "user", "content": [image]}
            refused = client.post("/v1/chat/completions", json={"messages": [message]}).json()
            assert "--allow_image_hosts" not in json.dumps(refused)  # but it is not found
            metrics = client.get("/metrics").text
            (drafted,) = re.findall(r"^llama4_spec_decode_num_draft_tokens (.*)$", metrics, re.M)
            assert float(drafted) > 0
            (sizes,) = re.findall(r"^llama4_cache_config_info{(.*)} 1.0$", metrics, re.M)
            assert 'kv_cache="int8"' in sizes and 'max_rows="1"' in sizes
            pages = [int(count) for count in re.findall(r'_pages="(\d+)"', sizes)]
            assert 0 < max(pages) < 2000  # of a megabyte, not of a gigabyte
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130)
        assert "Traceback" not in process.stdout.read()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--checkpoint=DIR is needed"),
        (("--checkpoint=nano", "--api_keys=nowhere"), "--api_keys=nowhere cannot be read"),
        (("--checkpoint=nano", "--max_context=0"), "max_context"),
        (("--checkpoint=nano", "--cache_gb=0"), "cache_bytes"),
        (("--checkpoint=nano", "--port=70000"), "--port=70000"),
        (("--checkpoint=nano", "--host=no.such.host.example"), "--host=no.such.host.example"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_loaded(arguments, says, monkeypatch):
    monkeypatch.setattr(serve.shared, "load_model", lambda values: pytest.fail("loaded"))
    with pytest.raises(FlagError, match=says):
        serve.main(values_of(*arguments))


def test_a_port_that_is_taken_is_refused(monkeypatch):
    monkeypatch.setattr(serve.shared, "load_model", lambda values: pytest.fail("loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(FlagError, match=f"--port={port}"):
            serve.main(values_of("--checkpoint=nano", f"--port={port}"))
