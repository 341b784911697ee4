"""An HTTP server for one engine, with the extra `serve`."""

from llama4_jax.server.app import Server
from llama4_jax.server.limits import Limits

__all__ = ["Limits", "Server"]
