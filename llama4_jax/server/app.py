"""The server: an engine behind the interface that OpenAI's clients speak, and a page to chat on."""

import asyncio
import contextlib
import pathlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import jax
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import llama4_jax
from llama4_jax.serve.embed import embed
from llama4_jax.serve.engine import Engine
from llama4_jax.serve.options import Options
from llama4_jax.serve.requests import Request as Question
from llama4_jax.serve.requests import RequestError, read_requests
from llama4_jax.server.chat import ChatAnswer, read_chat
from llama4_jax.server.completions import CompletionAnswer, read_completion
from llama4_jax.server.errors import ApiError
from llama4_jax.server.fields import Fields, named
from llama4_jax.server.limits import Limits, bring_images, check_key, read_json
from llama4_jax.server.metrics import Metrics
from llama4_jax.server.reply import Answers, Reply, Wants
from llama4_jax.server.tokens import spell
from llama4_jax.server.worker import Asked, Worker

_PAGE = pathlib.Path(__file__).parent / "page"
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Server:
    """Serve one engine over HTTP; `app` is what an ASGI server runs.

    Args:
      engine: serves nobody else.
      name: of the model.
      limits: what is taken from outside.
      warms: whether /health waits until what most traffic needs is compiled.
    """

    def __init__(
        self, engine: Engine, *, name: str, limits: Limits | None = None, warms: bool = True
    ) -> None:
        self.engine, self.pretrained = engine, engine.pretrained
        self.name, self.limits = name, limits or Limits()
        self.created = int(time.time())
        self.metrics = Metrics(engine, lambda: self.worker.num_open)
        self.worker = Worker(
            engine, max_waiting=self.limits.waiting, warms=warms, observe=self.metrics.observe
        )
        posts: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/v1/chat/completions": self.chat,
            "/v1/completions": self.complete,
            "/v1/embeddings": self.embeddings,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }
        gets: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.model,
            "/tokenizer_info": self.tokenizer_info,
            "/metrics": self.read_metrics,
            "/version": self.version,
        }
        routes = [Route(path, self._guarded(do), methods=["POST"]) for path, do in posts.items()]
        routes += [Route(path, self._guarded(do), methods=["GET"]) for path, do in gets.items()]
        routes += [Route("/health", self.health), Route("/", self.page)]
        middleware = []
        if self.limits.origins:
            middleware.append(
                Middleware(
                    CORSMiddleware,
                    allow_origins=list(self.limits.origins),
                    allow_methods=["GET", "POST"],
                    allow_headers=["authorization", "content-type"],
                )
            )
        self.app = Starlette(
            routes=[*routes, Mount("/page", StaticFiles(directory=_PAGE))],
            middleware=middleware,
            exception_handlers={
                HTTPException: _http_error,
                ApiError: _api_error,
                Exception: _unforeseen,
            },
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        del app
        self.worker.start()
        yield
        await asyncio.to_thread(self.worker.close)

    def _guarded(
        self, do: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                check_key(request, self.limits.keys)
                return await do(request)
            except ApiError as error:
                self.metrics.rejections.labels(error.code or str(error.status)).inc()
                return error.response()

        return guarded

    # ---------------------------------------------------------------------------- generation

    async def chat(self, request: Request) -> Response:
        """Answer a dialogue."""
        body = await read_json(request, self.limits)
        if isinstance(body, dict) and isinstance(body.get("messages"), list):
            await bring_images(body["messages"], self.limits)
        fields = self._fields(body)
        if self.pretrained.tokenizer is None:
            raise ApiError(400, "the model has no tokenizer; send token ids to /v1/completions.")
        asked = read_chat(fields)
        ((prompt, options),) = await self._read([asked.request], asked.options)
        answers = [ChatAnswer(self.pretrained, asked, index) for index in range(options.n)]
        return await self._reply(request, fields, [(prompt, options)], answers, asked)

    async def complete(self, request: Request) -> Response:
        """Go on with prompts."""
        fields = self._fields(await read_json(request, self.limits))
        asked = read_completion(fields)
        pairs = await self._read(asked.requests, asked.options)
        prompts = [prompt.tokens_T.tolist() for prompt, options in pairs for _ in range(options.n)]
        answers = [
            CompletionAnswer(self.pretrained, asked, prompt, index)
            for index, prompt in enumerate(prompts)
        ]
        return await self._reply(request, fields, pairs, answers, asked)

    async def _reply(
        self, request: Request, fields: Fields, asked: Asked, answers: Answers, wants: Wants
    ) -> Response:
        reply = Reply(
            self.worker, self.metrics, model=self.name, asked=asked, answers=answers, wants=wants
        )
        return await reply.respond(request, _warning(fields))

    def _fields(self, body: Any) -> Fields:
        fields = Fields(body)
        name = fields.text("model")
        if name is not None and name != self.name:
            raise ApiError(
                404, f"there is no model {name[:80]!r} here; this server has {self.name!r}.",
                param="model", code="model_not_found",
            )  # fmt: skip
        return fields

    async def _read(self, requests: list[Question], options: Callable[[int], Options]) -> Asked:
        """Turn requests into tokens, beside the event loop, and check all of them."""

        def read() -> Asked:
            prompts = read_requests(self.pretrained, requests)
            room = [self.engine.context - len(prompt.tokens_T) for prompt in prompts]
            pairs = [(p, options(left)) for p, left in zip(prompts, room, strict=True)]
            for prompt, chosen in pairs:
                self.engine.check(prompt, chosen)
            return pairs

        try:
            return await self.worker.read(read)
        except RequestError as error:
            message = str(error)
            if len(requests) == 1:
                message = re.sub(r"^request 0(: )?", lambda m: "" if m[1] else "it", message)
            raise named(ValueError(message)) from error
        except ValueError as error:
            raise named(error) from error

    # --------------------------------------------------------------------------------- others

    async def embeddings(self, request: Request) -> Response:
        """Return the mean of the last hidden states of each input, of length 1."""
        fields = self._fields(await read_json(request, self.limits))
        given, form = fields.any("input"), fields.text("encoding_format", "float")
        if form != "float":
            raise fields.wrong("encoding_format", "float")
        if fields.whole("dimensions") not in (None, self.pretrained.config.text.embed_dim):
            raise fields.wrong("dimensions", f"{self.pretrained.config.text.embed_dim}")
        several = isinstance(given, list) and given and not isinstance(given[0], int)
        inputs = given if several else [given]
        if not isinstance(given, str | list) or not given or len(inputs) > 256:
            raise fields.wrong("input", "a text, token ids, or a list of at most 256 of them")
        try:
            questions = [
                Question(prompt=one) if isinstance(one, str) else Question(tokens=one)
                for one in inputs
            ]
            vectors, counts = await self.worker.read(lambda: embed(self.pretrained, questions))
        except ValueError as error:
            raise ApiError(400, str(error), param="input") from error
        data = [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}
        return JSONResponse({"object": "list", "model": self.name, "data": data, "usage": usage})

    async def tokenize(self, request: Request) -> Response:
        """Turn a prompt or a dialogue into ids."""
        body = await read_json(request, self.limits)
        if isinstance(body, dict) and isinstance(body.get("messages"), list):
            await bring_images(body["messages"], self.limits)
        fields = self._fields(body)
        allow_special = fields.flag("allow_special")
        try:
            if "messages" in fields:
                question = Question(
                    messages=fields.items("messages"),
                    tools=fields.items("tools"),
                    add_generation_prompt=fields.flag("add_generation_prompt", True),
                    continue_final_message=fields.flag("continue_final_message"),
                    allow_special=allow_special,
                )
            else:
                text = fields.text("prompt")
                if text is None:
                    raise fields.wrong("prompt", "a text, or messages must be given")
                question = Question(prompt=text, allow_special=allow_special)
            prompts = await self.worker.read(lambda: read_requests(self.pretrained, [question]))
        except ValueError as error:
            raise ApiError(400, str(error).removeprefix("request 0: ")) from error
        tokens = prompts[0].tokens_T.tolist()
        if "messages" not in fields and not fields.flag("add_special_tokens", True):
            tokens = tokens[1:]
        answer = {"count": len(tokens), "max_model_len": self.engine.context, "tokens": tokens}
        if fields.flag("return_token_strs"):
            answer["token_strs"] = [spell(self.pretrained.tokenizer, token) for token in tokens]
        return JSONResponse(answer)

    async def detokenize(self, request: Request) -> Response:
        """Turn ids into text."""
        fields = self._fields(await read_json(request, self.limits))
        tokens, size = fields.items("tokens"), self.pretrained.config.text.vocab_size
        if self.pretrained.tokenizer is None:
            raise ApiError(400, "the model has no tokenizer.")
        if not all(type(token) is int and 0 <= token < size for token in tokens):
            raise fields.wrong("tokens", f"token ids in 0..{size - 1}")
        tokenizer = self.pretrained.tokenizer
        text = await self.worker.read(lambda: tokenizer.decode(tokens))
        return JSONResponse({"prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        """Tell of the vocabulary what programs that score need."""
        del request
        tokenizer, template = self.pretrained.tokenizer, self.pretrained.chat_template
        if tokenizer is None:
            raise ApiError(404, "the model has no tokenizer.")

        def spelled(token: int | None) -> str | None:
            return None if token is None else spell(tokenizer, token)

        return JSONResponse(
            {
                "tokenizer_class": type(tokenizer).__name__,
                "vocab_size": tokenizer.vocab_size,
                "bos_token": spelled(tokenizer.bos_id),
                "eos_token": spelled(next(iter(tokenizer.eos_ids), None)),
                "pad_token": spelled(tokenizer.pad_id),
                "model_max_length": self.engine.context,
                "chat_template": None if template is None else template.source,
            }
        )

    async def models(self, request: Request) -> Response:
        """List the one model."""
        del request
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """Tell of one model."""
        name = request.path_params["name"]
        if name != self.name:
            raise ApiError(404, f"there is no model {name[:80]!r} here.", code="model_not_found")
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "llama4_jax",
            "max_model_len": self.engine.context,
        }

    async def health(self, request: Request) -> Response:
        """Answer 200 while requests are served."""
        del request
        if not self.worker.is_ready:
            return JSONResponse({"status": "not ready"}, 503)
        return JSONResponse({"status": "ok"})

    async def read_metrics(self, request: Request) -> Response:
        """Tell Prometheus what the server does."""
        del request
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def version(self, request: Request) -> Response:
        """Tell which library answers."""
        del request
        return JSONResponse({"version": llama4_jax.__version__, "jax": jax.__version__})

    async def page(self, request: Request) -> Response:
        """Show the page to chat on."""
        del request
        return Response(
            (_PAGE / "index.html").read_bytes(), media_type="text/html", headers=_PAGE_HEADERS
        )


def _warning(fields: Fields) -> dict[str, str]:
    """Return a header that names the fields that nobody read."""
    unknown = ", ".join(name.encode("ascii", "replace").decode() for name in fields.unknown()[:20])
    unknown = "".join(c for c in unknown if c.isprintable())
    return {"x-ignored-fields": unknown} if unknown else {}


async def _api_error(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {
        404: f"there is nothing at {request.url.path[:80]}.",
        405: "the method is not allowed.",
    }
    message = words.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _unforeseen(request: Request, error: Exception) -> Response:
    del request
    return ApiError(500, f"the server failed: {type(error).__name__}.", code="internal").response()
