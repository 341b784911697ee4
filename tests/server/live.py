"""A server on a free port of this machine, in a thread."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import uvicorn

from llama4_jax.pretrained import Pretrained
from llama4_jax.serve.engine import Engine
from llama4_jax.serve.sizes import EngineConfig
from llama4_jax.server import Limits, Server


@contextlib.contextmanager
def serving(
    pretrained: Pretrained,
    *,
    config: EngineConfig | None = None,
    limits: Limits | None = None,
    name: str = "tiny",
) -> Iterator[tuple[str, Server]]:
    """Serve a model; give the address and the server."""
    server = Server(Engine(pretrained, config), name=name, limits=limits, warms=False)
    place = socket.socket()
    place.bind(("127.0.0.1", 0))
    settings = uvicorn.Config(server.app, log_level="error", timeout_graceful_shutdown=2)
    running = uvicorn.Server(settings)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{place.getsockname()[1]}"
    until = time.monotonic() + 120
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                break
        assert time.monotonic() < until, "the server does not begin to serve"
        time.sleep(0.05)
    try:
        yield url, server
    finally:
        running.should_exit = True
        thread.join()
        place.close()
