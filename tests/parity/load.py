"""Load for a server: requests that stream their answers, at once or at random moments."""

import asyncio
import time
from collections.abc import Sequence

import httpx
import numpy as np

from llama4_jax.serve import Options, Request


async def over_http(
    url: str, requests: Sequence[Request], *, rate: float | None = None, seed: int = 3
) -> dict[str, float]:
    """Send requests to `/v1/completions` and read all answers.

    Args:
      url: of the server.
      requests: of tokens.
      rate: how many begin in a second, at random moments; None is all at once.
      seed: of the moments.

    Returns:
      The seconds that all took, and the median and the 99th percentile of those to a first token.
    """
    firsts: list[float] = []
    moments = np.zeros(len(requests))
    if rate is not None:
        moments = np.random.default_rng(seed).exponential(1 / rate, len(requests)).cumsum()

    async def one(client: httpx.AsyncClient, request: Request, after: float) -> None:
        await asyncio.sleep(after)
        sent, options = time.perf_counter(), request.options or Options()
        body = {
            "prompt": request.tokens, "max_tokens": options.max_new_tokens, "temperature": 0,
            "ignore_eos": True, "stream": True,
        }  # fmt: skip
        async with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            waiting = True
            async for line in response.aiter_lines():
                if waiting and line.startswith("data: {"):
                    firsts.append(time.perf_counter() - sent)
                    waiting = False

    started = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        pairs = zip(requests, moments.tolist(), strict=True)
        await asyncio.gather(*(one(client, request, after) for request, after in pairs))
    return {
        "seconds": time.perf_counter() - started,
        "p50_first_token_s": float(np.quantile(firsts, 0.5)),
        "p99_first_token_s": float(np.quantile(firsts, 0.99)),
    }
