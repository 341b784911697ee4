"""Serve a Llama 4 checkpoint over HTTP, as OpenAI's clients expect it, with a page to chat on.

    python -m experiments.serve --checkpoint=nano
    python -m experiments.serve --checkpoint=DIR --mesh=tensor:8 --port=8000 --kv_cache=fp8
    curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello"}]}'

Needs `pip install '.[serve]'`. /health answers 200 once the programs that most traffic needs are
compiled. Without --api_keys everybody who reaches the port may use it. llama4_jax/server/README.md
lists the fields of requests.
"""

import dataclasses
import pathlib
import socket
from typing import Any

from absl import flags

from experiments import flags as shared


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's flags."""
    shared.define_model_flags(values)
    shared.define_engine_flags(values)
    known: list[tuple[Any, str, Any, str]] = [
        (flags.DEFINE_string, "host", "127.0.0.1",
         "Address to listen at; 0.0.0.0 is all of this machine's."),
        (flags.DEFINE_integer, "port", 8000, "Port; 0 takes a free one."),
        (flags.DEFINE_string, "name", None, "Of the model, for clients. Default: its folder's."),
        (flags.DEFINE_float, "cache_gb", None, "Of keys and values, over all devices. Default: "
         "most of what is left, or 1 where devices do not say."),
        (flags.DEFINE_integer, "max_context", None,
         "Most tokens of a prompt and its answer. Default: the model's."),
        (flags.DEFINE_integer, "max_queue", 256,
         "Answers that may wait; more are told to come again."),
        (flags.DEFINE_string, "api_keys", None,
         "File of keys, one a line, of which clients show one."),
        (flags.DEFINE_list, "allow_image_hosts", [], "Hosts that images may be fetched from."),
        (flags.DEFINE_list, "cors_origins", [],
         "Origins of pages elsewhere that may talk to this server."),
    ]  # fmt: skip
    for define, name, default, meaning in known:
        define(name, default, meaning, flag_values=values)


def read_limits(values: flags.FlagValues) -> dict[str, Any]:
    """Return what the flags let in, as fields of `server.Limits`.

    Raises:
      FlagError: the file of keys is missing or empty.
    """
    keys: list[str] = []
    if values.api_keys is not None:
        try:
            lines = pathlib.Path(values.api_keys).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise shared.FlagError(
                f"--api_keys={values.api_keys} cannot be read: {error}."
            ) from error
        keys = [line.strip() for line in lines if line.strip()]
        if not keys:
            raise shared.FlagError(f"--api_keys={values.api_keys} holds no key; write one a line.")
    return {
        "waiting": values.max_queue,
        "image_hosts": values.allow_image_hosts,
        "origins": values.cors_origins,
        "keys": keys,
    }


def listen(values: flags.FlagValues) -> socket.socket:
    """Take the port, before anything is loaded.

    Raises:
      FlagError: it is taken, or there is no such address.
    """
    family = socket.AF_INET6 if ":" in values.host else socket.AF_INET
    place = socket.socket(family, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((values.host, values.port))
    except (OSError, OverflowError) as error:
        place.close()
        where = f"--host={values.host} --port={values.port}"
        raise shared.FlagError(f"{where}: {error}; choose another.") from error
    return place


def main(values: flags.FlagValues) -> None:
    """Check the flags, load the checkpoint, serve until interrupted."""
    from llama4_jax.serve import Engine

    folder = shared.check_checkpoint(values)
    limits, config = read_limits(values), shared.engine_config(values)
    room = None if values.cache_gb is None else int(values.cache_gb * 1e9)
    try:
        sizes = {"max_context": values.max_context, "cache_bytes": room}
        config = dataclasses.replace(config, **sizes, loops=1)  # who arrives waits for one step
    except ValueError as error:
        raise shared.FlagError(f"{error}") from error
    try:
        import uvicorn

        from llama4_jax.server import Limits, Server
    except ImportError as error:
        raise shared.FlagError(f"{error}; pip install 'llama4_jax[serve]' brings it.") from error
    place = listen(values)
    engine = Engine(shared.load_model(values), config)
    server = Server(engine, name=values.name or folder.resolve().name, limits=Limits(**limits))
    host, port = place.getsockname()[:2]
    print(f"serving {server.name} at http://{host}:{port}", flush=True)
    settings = uvicorn.Config(server.app, log_level="warning", timeout_graceful_shutdown=5)
    uvicorn.Server(settings).run(sockets=[place])


if __name__ == "__main__":
    shared.launch(define_flags, main)
