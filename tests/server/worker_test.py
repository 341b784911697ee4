"""Whoever waits for an answer is told how it ends."""

import asyncio

import pytest

from llama4_jax.serve.answers import Event
from llama4_jax.server.errors import ApiError
from llama4_jax.server.worker import Stream


def test_an_answer_whose_logits_are_nan_is_an_error_of_that_request_alone():
    async def wait(reason):
        stream = Stream(asyncio.get_running_loop(), answers=1)
        stream.put((0, Event(request=0, choice=0, tokens=[], texts=[], finish_reason=reason)))
        return [event.finish_reason async for _, event in stream]

    assert asyncio.run(wait("length")) == ["length"]
    with pytest.raises(ApiError, match="logits are NaN") as caught:
        asyncio.run(wait("failed"))
    assert caught.value.status == 500
