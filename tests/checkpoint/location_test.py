"""A checkpoint is found by its folder, as "nano", or by its id on a hub, here one of our own."""

import hashlib
import http.server
import json
import pathlib
import threading

import huggingface_hub
import jax
import numpy as np
import pytest

from llama4_jax import from_pretrained
from llama4_jax.checkpoint.location import NANO, find_checkpoint
from tests.serve import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The part of a hub that a download asks for."""

    repos: dict[str, pathlib.Path] = {}  # noqa: RUF012  set by each test

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if "/org/gated" in path and self.headers["Authorization"] != "Bearer hf_ours":
            return self.refuse(403, "GatedRepo")
        for name, folder in self.repos.items():
            if path.startswith(f"/api/models/{name}"):
                siblings = [{"rfilename": file.name} for file in folder.iterdir() if file.is_file()]
                tree = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
                    for f in folder.iterdir() if f.is_file()
                ]  # fmt: skip
                info = {"id": name, "sha": COMMIT, "siblings": siblings}
                return self.answer(json.dumps(tree if "/tree/" in path else info).encode())
            if path.startswith(f"/{name}/resolve/"):
                file = folder / path.rsplit("/", 1)[1]
                if file.is_file():
                    return self.answer(file.read_bytes())
        return self.refuse(404, "RepoNotFound")

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, data):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve repositories on a free port; keep what is downloaded apart from the user's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    FakeHub.repos = {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_folders_and_nano_are_found_without_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("nano") == NANO
    (tmp_path / "nano").mkdir()
    assert find_checkpoint("nano") == pathlib.Path("nano")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_checkpoint("~/nano") == tmp_path / "nano"
    assert find_checkpoint("no/such/folder") == pathlib.Path("no/such/folder")


def test_an_id_is_downloaded_once_and_loads(hub, tmp_path):
    FakeHub.repos = {"org/tiny": tiny.write_checkpoint(tmp_path)}
    folder = find_checkpoint("org/tiny", endpoint=hub)
    assert COMMIT in str(folder)
    loaded = from_pretrained(folder)
    for got, want in zip(jax.tree.leaves(loaded.model), jax.tree.leaves(tiny.model()), strict=True):
        np.testing.assert_array_equal(got, want)
    assert find_checkpoint("org/tiny@main", endpoint=hub) == folder
    assert find_checkpoint("org/tiny", revision=COMMIT, endpoint=hub) == folder
    FakeHub.repos = {}  # the hub has lost it


def test_without_a_network_the_cache_serves_or_the_command_is_named(hub, tmp_path, monkeypatch):
    FakeHub.repos = {"org/tiny": tiny.write_checkpoint(tmp_path)}
    folder = find_checkpoint("org/tiny", endpoint=hub)
    nowhere = "http://127.0.0.1:9"
    assert find_checkpoint("org/tiny", endpoint=nowhere) == folder
    with pytest.raises(ValueError, match="`hf download org/other --revision v1`"):
        find_checkpoint("org/other", revision="v1", endpoint=nowhere)


def test_the_user_s_token_opens_what_is_gated_and_without_it_the_way_is_named(
    hub, tmp_path, monkeypatch
):
    FakeHub.repos = {"org/gated": tiny.write_checkpoint(tmp_path)}
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(
        ValueError, match=r"org/gated is gated: accept its licence .*`hf auth login`"
    ):
        find_checkpoint("org/gated", endpoint=hub)
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    assert (find_checkpoint("org/gated", endpoint=hub) / "model.safetensors").is_file()


def test_what_the_hub_does_not_have_is_said_in_a_line(hub, tmp_path):
    with pytest.raises(ValueError, match="neither a folder org/none nor a org/none on the hub"):
        find_checkpoint("org/none", endpoint=hub)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    FakeHub.repos = {"org/pickled": tmp_path / "pickled"}
    with pytest.raises(ValueError, match=r"no \*.safetensors .* nothing else is read"):
        find_checkpoint("org/pickled", endpoint=hub)
    assert huggingface_hub.__version__
