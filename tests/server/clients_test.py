"""Programs that others wrote talk to the server as they are, and clients that come and go."""

import asyncio
import contextlib
import json
import random

import httpx
import openai
import pytest

from llama4_jax import from_pretrained, score
from llama4_jax.serve.sizes import EngineConfig
from tests.serve import tiny
from tests.server.live import serving

CONFIG = EngineConfig(max_rows=8, step_tokens=32, max_context=96)
HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model = tiny.pretrained(tmp_path_factory.mktemp("tiny"))
    with serving(model, config=CONFIG) as (url, server):
        yield url, server


@pytest.fixture(scope="module")
def official(served):
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)


def test_the_openai_package_chats(official):
    more = {"top_k": 0, "ignore_eos": True}
    chat = official.chat.completions
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0}
    whole = chat.create(**asked, logprobs=True, top_logprobs=2, extra_body=more)
    assert whole.usage.completion_tokens == 8
    assert len(whole.choices[0].logprobs.content) == 8
    pieces = chat.create(
        **asked, stream=True, stream_options={"include_usage": True}, extra_body=more
    )
    chunks = list(pieces)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 8
    assert official.models.list().data[0].id == "tiny"


def test_the_openai_package_completes_and_embeds(official):
    found = official.completions.create(model="tiny", prompt=["a", "b"], max_tokens=3, seed=1)
    assert len(found.choices) == 2
    vectors = official.embeddings.create(model="tiny", input="a", encoding_format="float")
    assert len(vectors.data[0].embedding) == 32


def test_the_openai_package_gets_its_own_errors(official):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        official.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
    with pytest.raises(openai.NotFoundError, match="no model"):
        official.chat.completions.create(model="gpt", messages=HELLO)


def test_lm_eval_scores_as_score_does():
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    nano = from_pretrained("nano", dtype="float32")
    pairs = [
        ("def __init__(self", ", name):"),
        ("import os\nimport", " sys"),
        ("for i in", " range("),
    ]
    with serving(nano, config=EngineConfig(max_rows=4, step_tokens=64, max_context=128)) as (
        url,
        _,
    ):
        judge = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions", model="tiny", tokenizer_backend="remote",
            num_concurrent=1, max_retries=1, batch_size=1,
        )  # fmt: skip
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index)
            for index, pair in enumerate(pairs)
        ]
        found = judge.loglikelihood(requests)
    for (context, more), (logprob, is_greedy) in zip(pairs, found, strict=True):
        del is_greedy
        head = nano.tokenizer.encode(context)  # it asks for texts without the begin-of-text token
        ids = nano.tokenizer.encode(context + more)
        (whole,) = score(nano, [{"tokens": ids}])
        assert logprob == pytest.approx(sum(whole.logprobs[len(head) - 1 :]), abs=1e-5)


async def come_and_go(url: str, seconds: float, clients: int) -> int:
    """Ask from many clients, half of which leave early; check every whole answer."""
    limits = httpx.Limits(max_connections=clients)
    loop, whole = asyncio.get_running_loop(), 0
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def ask(prompt: str, **more) -> httpx.Response:
            body = {
                "prompt": prompt,
                "max_tokens": 10,
                "temperature": 0,
                "ignore_eos": True,
                **more,
            }
            return await client.post("/v1/completions", json=body)

        prompts = [f"client {i}" for i in range(12)]
        want = {p: (await ask(p)).json()["choices"][0]["text"] for p in prompts}
        until = loop.time() + seconds

        async def one(number: int) -> None:
            nonlocal whole
            draw = random.Random(number)
            while loop.time() < until:
                prompt, kind = draw.choice(prompts), draw.random()
                if kind < 0.3:  # leave while waiting
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(draw.random() * 0.3):
                            await ask(prompt, max_tokens=60)
                elif kind < 0.5:  # leave in the middle of a stream
                    body = {"prompt": prompt, "max_tokens": 60, "ignore_eos": True, "stream": True}
                    async with client.stream("POST", "/v1/completions", json=body) as response:
                        async for _ in response.aiter_lines():
                            if draw.random() < 0.2:
                                break
                else:
                    response = await ask(prompt)
                    if response.status_code == 200:
                        assert response.json()["choices"][0]["text"] == want[prompt]
                        whole += 1
                    else:
                        assert response.status_code == 429

        await asyncio.gather(*(one(number) for number in range(clients)))
    return whole


@pytest.mark.parametrize(
    ("seconds", "clients"), [(3, 16), pytest.param(60, 64, marks=pytest.mark.slow)]
)
def test_clients_that_leave_take_nothing_with_them(served, seconds, clients):
    url, server = served
    assert asyncio.run(come_and_go(url, seconds, clients)) > clients // 4
    for _ in range(200):
        if not server.engine.is_busy and server.worker.num_open == 0:
            break
        asyncio.run(asyncio.sleep(0.05))
    assert not server.engine.is_busy
    assert server.worker.num_open == 0 and not server.worker._places and not server.worker._early
    scheduler = server.engine.scheduler
    assert scheduler.whole.held == scheduler.chunk.held == 0


def test_streams_hold_no_answer_of_another(served):
    url, _ = served

    async def ask(client, number):
        body = {"messages": [{"role": "user", "content": f"{number}"}], "max_tokens": 12, "n": 2,
                "temperature": 1, "seed": number, "ignore_eos": True}  # fmt: skip
        whole = (await client.post("/v1/chat/completions", json=body)).json()
        texts = ["", ""]
        async with client.stream(
            "POST", "/v1/chat/completions", json={**body, "stream": True}
        ) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line[6:])["choices"]
                    texts[choice["index"]] += choice["delta"].get("content", "")
        assert texts == [choice["message"]["content"] for choice in whole["choices"]]

    async def all_at_once():
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            await asyncio.gather(*(ask(client, number) for number in range(6)))

    asyncio.run(all_at_once())
