"""The response to one request, whole or as server-sent events, from the events of its answers."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from llama4_jax.server.chat import ChatAnswer
from llama4_jax.server.completions import CompletionAnswer
from llama4_jax.server.errors import ApiError
from llama4_jax.server.metrics import Metrics, Watch
from llama4_jax.server.worker import Asked, Stream, Worker

type Answers = list[ChatAnswer] | list[CompletionAnswer]
"""The answers of a request, those of its first prompt first."""


class Wants(Protocol):
    """How the client wants to be told."""

    @property
    def stream(self) -> bool:
        """As events."""
        ...

    @property
    def usage(self) -> bool:
        """With a last event that counts tokens."""
        ...

    @property
    def running_usage(self) -> bool:
        """With counts in every event."""
        ...


class Reply:
    """Make the response to a request.

    Args:
      worker: serves it.
      metrics: told of its times.
      head: what every response and event begins with.
      asked: the prompts and their options.
      answers: in the making.
      wants: how the client wants to be told.
    """

    def __init__(
        self,
        worker: Worker,
        metrics: Metrics,
        *,
        model: str,
        asked: Asked,
        answers: Answers,
        wants: Wants,
    ) -> None:
        self._worker, self._metrics, self._wants = worker, metrics, wants
        self._asked, self._answers = asked, answers
        self._is_chat = isinstance(answers[0], ChatAnswer)
        self._kind = "chat.completion" if self._is_chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": self._kind,
            "created": int(time.time()),
            "model": model,
        }
        self._prompt_tokens = sum(len(prompt.tokens_T) for prompt, _ in asked)
        metrics.prompt_tokens.inc(self._prompt_tokens)

    async def respond(self, request: Request, headers: Mapping[str, str]) -> Response:
        """Wait for all answers, or begin to stream; a client that leaves ends them.

        Raises:
          ApiError: the request is refused, or the engine fails before anything was sent.
        """
        stack = contextlib.AsyncExitStack()
        stream = await stack.enter_async_context(self._worker.answer(self._asked))
        if self._wants.stream:
            more = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
            return _Events(
                stack, self._events(stream), media_type="text/event-stream", headers=more
            )
        async with stack:
            work = asyncio.ensure_future(self._whole(stream))
            left = asyncio.ensure_future(_has_left(request))
            try:
                await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise ApiError(400, "the client has left.", code="disconnected")
                return JSONResponse(work.result(), headers=dict(headers))
            finally:
                for task in (work, left):
                    task.cancel()
                await asyncio.gather(work, left, return_exceptions=True)

    async def _whole(self, stream: Stream) -> dict[str, Any]:
        watch = Watch(self._metrics)
        async for index, event in stream:
            watch.tokens(len(event.tokens))
            self._answers[index].take(event)
        watch.end()
        choices = [answer.choice() for answer in self._answers]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def _events(self, stream: Stream) -> AsyncIterator[str]:
        """Yield the events of the response."""
        head, watch = dict(self._head), Watch(self._metrics)
        if self._is_chat:
            head["object"] = "chat.completion.chunk"
        counts: dict[str, Any] = {"usage": None} if self._wants.usage else {}
        try:
            for answer in self._answers if self._is_chat else ():
                delta = {"role": "assistant", "content": ""}
                choice = {"index": answer.index, "delta": delta, "finish_reason": None}
                yield _sse({**head, "choices": [choice], **counts})
            async for index, event in stream:
                watch.tokens(len(event.tokens))
                choices = self._answers[index].chunks(event)
                if self._wants.running_usage:
                    counts = {"usage": self._usage()}
                for choice in choices:
                    yield _sse({**head, "choices": [choice], **counts})
            watch.end()
            if self._wants.usage:
                yield _sse({**head, "choices": [], "usage": self._usage()})
        except ApiError as error:
            yield _sse(error.body())
        yield "data: [DONE]\n\n"

    def _usage(self) -> dict[str, int]:
        new = sum(len(answer.tokens) for answer in self._answers)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
        }


class _Events(StreamingResponse):
    """A stream of events that, however it ends, ends the work for it."""

    def __init__(self, stack: contextlib.AsyncExitStack, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, or those until the client leaves."""
        async with self._stack:
            await super().__call__(scope, receive, send)


def _sse(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _has_left(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
