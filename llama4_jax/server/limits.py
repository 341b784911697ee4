"""What a server takes from outside: how large, how long, from where."""

import asyncio
import dataclasses
import hmac
import ipaddress
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
from starlette.requests import ClientDisconnect, Request

from llama4_jax.server.errors import ApiError
from llama4_jax.untrusted import parse_json, shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server.

    Attributes:
      body_bytes: of a request, images included.
      body_seconds: that a body may take to arrive.
      images: of a request.
      image_bytes: of one image.
      waiting: answers that may wait beyond those being made.
      image_hosts: names of hosts that images may be fetched from; none by default.
      keys: that clients may show; none opens the server to everybody who reaches it.
      origins: of pages elsewhere that may talk to the server.
    """

    body_bytes: int = 32 << 20
    body_seconds: float = 30.0
    images: int = 16
    image_bytes: int = 16 << 20
    waiting: int = 256
    image_hosts: Sequence[str] = ()
    keys: Sequence[str] = ()
    origins: Sequence[str] = ()


def check_key(request: Request, keys: Sequence[str]) -> None:
    """Refuse a client that shows none of the keys; how long that takes does not tell which part.

    Raises:
      ApiError: 401.
    """
    if not keys:
        return
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    given = key.strip().encode("utf-8", "surrogateescape")
    matches = [hmac.compare_digest(given, known.encode()) for known in keys]
    if kind.lower() != "bearer" or not any(matches):
        raise ApiError(
            401,
            "this server asks for a key: send the header Authorization: Bearer KEY.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


async def read_json(request: Request, limits: Limits) -> Any:
    """Read the body of a request, as far as it may go and as long as it may take.

    Raises:
      ApiError: 400 for what is no JSON, 408 if it takes too long, 413 if it is too large.
    """
    too_large = ApiError(
        413, f"the body has more than {limits.body_bytes} bytes; send fewer or smaller images."
    )
    try:
        if int(request.headers.get("content-length", "0")) > limits.body_bytes:
            raise too_large
    except ValueError:
        raise ApiError(400, "content-length must be a number.") from None
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {limits.body_seconds:g} s; send it at once."
        ) from None
    except ClientDisconnect:
        raise ApiError(400, "the client left before the body was there.") from None
    try:
        return parse_json(bytes(body), "the body")
    except ValueError as error:
        raise ApiError(400, f"{error}.") from error


async def bring_images(messages: list[Any], limits: Limits) -> None:
    """Check every image of a dialogue, and fetch those that stand elsewhere.

    Images may be `data:` URLs; an http or https one is replaced by its bytes if its host is
    allowed. Nothing else is an image here: a path would be one of the server's own files.

    Raises:
      ApiError: there are too many images, one is too large, or not allowed.
    """
    found = 0
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            if not isinstance(part, dict) or part.get("type") not in ("image", "image_url"):
                continue
            found += 1
            if found > limits.images:
                raise ApiError(
                    400, f"at most {limits.images} images may be sent.", param="messages"
                )
            link = part.get("image_url")
            url = link.get("url") if isinstance(link, dict) else link
            if part["type"] != "image_url" or not isinstance(url, str):
                raise ApiError(
                    400, 'an image is {"type": "image_url", "image_url": {"url": "data:.."}}.',
                    param="messages",
                )  # fmt: skip
            part["image_url"] = {"url": await _bring(url, limits)}


async def _bring(url: str, limits: Limits) -> str | bytes:
    if url.startswith("data:"):
        if len(url) * 3 // 4 > limits.image_bytes:
            raise ApiError(
                400, f"an image has more than {limits.image_bytes} bytes.", param="messages"
            )
        return url
    parts = urlsplit(url) if len(url) < 4096 else urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ApiError(400, f"image {shown(url)} must be a data: URL.", param="messages")
    if parts.hostname not in limits.image_hosts:
        raise ApiError(
            400, f"images from {shown(parts.hostname)} are not fetched; send a data: URL, or start "
            "the server with --allow_image_hosts.", param="messages",
        )  # fmt: skip
    await asyncio.to_thread(_refuse_private, parts.hostname)
    return await _fetch(url, limits)


def _refuse_private(host: str) -> None:
    """Refuse a host that is inside: the server would show what only it can reach."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        raise ApiError(400, f"{shown(host)} is not found.", param="messages") from None
    if not all(ipaddress.ip_address(address).is_global for address in found):
        raise ApiError(400, f"{shown(host)} is not a public host.", param="messages")


async def _fetch(url: str, limits: Limits) -> bytes:
    """Read a URL, following no redirect."""
    data = bytearray()
    try:
        async with (
            httpx.AsyncClient(timeout=10, follow_redirects=False, trust_env=False) as client,
            client.stream("GET", url) as response,
        ):
            if response.status_code != 200:
                raise ApiError(
                    400, f"image {shown(url)}: its host answered {response.status_code}.",
                    param="messages",
                )  # fmt: skip
            async for part in response.aiter_bytes():
                data += part
                if len(data) > limits.image_bytes:
                    raise ApiError(
                        400, f"image {shown(url)} has more than {limits.image_bytes} bytes.",
                        param="messages",
                    )  # fmt: skip
    except httpx.HTTPError as error:
        raise ApiError(400, f"image {shown(url)}: {error}", param="messages") from error
    return bytes(data)
