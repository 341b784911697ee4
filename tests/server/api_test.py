"""Endpoints answer as OpenAI's do, and refuse in their words what is wrong."""

import base64
import io
import json
import re

import httpx
import numpy as np
import pytest

from llama4_jax.serve import generate
from llama4_jax.serve.options import Options
from llama4_jax.serve.requests import Request
from llama4_jax.serve.sizes import EngineConfig
from llama4_jax.server import Limits
from tests.serve import tiny
from tests.server.live import serving

CONFIG = EngineConfig(max_rows=8, step_tokens=32, max_context=700)
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
HELLO = {"messages": [{"role": "user", "content": "Hi"}], **GREEDY}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, room = tmp_path_factory.mktemp("tiny"), 1024  # for the definitions of tools
    return tiny.pretrained(folder, model=tiny.model(room), config=tiny.config(room))


@pytest.fixture(scope="module")
def client(model):
    with serving(model, config=CONFIG) as (url, server), httpx.Client(base_url=url) as client:
        client.server = server
        yield client


def post(client, path, body, status=200):
    response = client.post(path, json=body, timeout=120)
    assert response.status_code == status, response.text
    return response.json()


def events(client, path, body):
    """Return the events of a stream; it ends with [DONE]."""
    with client.stream("POST", path, json={**body, "stream": True}, timeout=120) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def alone(model, request, **options):
    (answer,) = generate(model, request, options=Options(temperature=0, ignore_eos=True, **options))
    return answer


def picture_url(seed=0):
    file = io.BytesIO()
    tiny.picture(seed).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# ---------------------------------------------------------------------------------- what is said


def test_a_chat_says_what_generate_says(client, model):
    want = alone(model, Request(messages=HELLO["messages"]), max_new_tokens=12, skip_special=True)
    found = post(client, "/v1/chat/completions", {**HELLO, "return_token_ids": True})
    (choice,) = found["choices"]
    assert choice["token_ids"] == want.tokens
    assert choice["message"] == {"role": "assistant", "content": want.text, "refusal": None}
    assert choice["finish_reason"] == "length"
    assert found["object"] == "chat.completion"
    prompt = len(post(client, "/tokenize", {"messages": HELLO["messages"]})["tokens"])
    assert found["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12,
    }  # fmt: skip


def test_a_streamed_chat_says_the_same_in_pieces(client):
    whole = post(client, "/v1/chat/completions", HELLO)["choices"][0]
    found = events(
        client, "/v1/chat/completions", {**HELLO, "stream_options": {"include_usage": True}}
    )
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(event["object"] == "chat.completion.chunk" for event in found)
    *chunks, last = found[1:]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 12
    assert all(event["usage"] is None for event in found[:-1])
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["message"]["content"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1]["choices"][0]["delta"] == {}


def test_images_reach_the_model(client, model):
    content = [
        {"type": "image_url", "image_url": {"url": picture_url()}},
        {"type": "text", "text": "?"},
    ]
    body = {**HELLO, "messages": [{"role": "user", "content": content}], "return_token_ids": True}
    want = alone(model, Request(messages=body["messages"]), max_new_tokens=12)
    assert post(client, "/v1/chat/completions", body)["choices"][0]["token_ids"] == want.tokens
    other = json.loads(json.dumps(body).replace(picture_url(), picture_url(5)))
    assert post(client, "/v1/chat/completions", other)["choices"][0]["token_ids"] != want.tokens


def test_completions_take_texts_and_ids(client, model):
    prompts = ["ab", "cd"]
    body = {**GREEDY, "return_token_ids": True}
    found = post(client, "/v1/completions", {**body, "prompt": prompts})
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    for prompt, choice in zip(prompts, found["choices"], strict=True):
        want = alone(model, prompt, max_new_tokens=12, skip_special=True)
        assert (choice["token_ids"], choice["text"]) == (want.tokens, want.text)
        ids = [tiny.BOS, *prompt.encode()]
        again = post(client, "/v1/completions", {**body, "prompt": ids})
        assert again["choices"][0]["token_ids"] == want.tokens
    several = post(client, "/v1/completions", {**body, "prompt": [[tiny.BOS, 5], [tiny.BOS, 6]]})
    assert len(several["choices"]) == 2


def test_an_echo_scores_the_prompt(client, model):
    ids = [tiny.BOS, *b"score me"]
    body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    (choice,) = post(client, "/v1/completions", body)["choices"]
    scores = choice["logprobs"]
    want = tiny.full_logits(ids)
    want = (
        want
        - np.log(np.exp(want - want.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - want.max(-1, keepdims=True)
    )
    assert scores["token_logprobs"][0] is None and len(scores["token_logprobs"]) == len(ids) + 1
    for place in range(1, len(ids)):
        assert scores["token_logprobs"][place] == pytest.approx(
            want[place - 1, ids[place]], abs=1e-4
        )
        (top,) = scores["top_logprobs"][place].values()
        assert top == pytest.approx(want[place - 1].max(), abs=1e-4)
    assert choice["text"].startswith("score me")
    streamed = events(client, "/v1/completions", body)
    text = "".join(event["choices"][0]["text"] for event in streamed)
    assert text == choice["text"]
    told = [lp for e in streamed for lp in e["choices"][0]["logprobs"]["token_logprobs"]]
    assert told == scores["token_logprobs"]


def test_logprobs_of_a_chat(client):
    body = {**HELLO, "logprobs": True, "top_logprobs": 3}
    (choice,) = post(client, "/v1/chat/completions", body)["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 12
    for token in content:
        assert len(token["top_logprobs"]) == 3
        best = max(likely["logprob"] for likely in token["top_logprobs"])
        assert token["logprob"] == pytest.approx(best, abs=1e-5)  # temperature 0
        assert isinstance(token["bytes"], list)


def test_several_answers_share_a_prompt(client):
    body = {**HELLO, "temperature": 1.0, "n": 4, "seed": 3}
    found = post(client, "/v1/chat/completions", body)
    texts = [choice["message"]["content"] for choice in found["choices"]]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert found["usage"]["completion_tokens"] == 48
    again = post(client, "/v1/chat/completions", body)
    assert [choice["message"]["content"] for choice in again["choices"]] == texts
    pieces = dict.fromkeys(range(4), "")
    for event in events(client, "/v1/chat/completions", body):
        for choice in event["choices"]:
            pieces[choice["index"]] += choice["delta"].get("content", "")
    assert list(pieces.values()) == texts


BOOLEAN = {
    "type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "check"),
    [
        ({"response_format": {"type": "json_object"}}, lambda text: json.loads(text) is not None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": BOOLEAN}}},
            lambda text: isinstance(json.loads(text)["a"], bool),
        ),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, re.compile("[0-9]{3}$").match),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, lambda text: text in ("yes", "no")),
        ({"structured_outputs": {"grammar": 'start: "a" "b"*'}}, re.compile("ab*$").match),
    ],
)  # fmt: skip
def test_an_answer_has_the_form_that_is_asked_for(client, form, check):
    body = {**HELLO, **form, "temperature": 1.0, "seed": 1, "max_tokens": 60, "ignore_eos": False}
    (choice,) = post(client, "/v1/chat/completions", body)["choices"]
    if choice["finish_reason"] == "stop":  # a random model may go on with spaces for ever
        assert check(choice["message"]["content"])


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
        "additionalProperties": False}}}
    for name in ("light", "fan")
]  # fmt: skip


@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "fan"}}, "required"])
def test_a_forced_call_is_a_call(client, choice):
    body = {**HELLO, "tools": TOOLS, "tool_choice": choice, "max_tokens": 80, "ignore_eos": False}
    (found,) = post(client, "/v1/chat/completions", body)["choices"]
    if found["finish_reason"] == "length":
        return
    (call,) = found["message"]["tool_calls"]
    assert found["finish_reason"] == "tool_calls"
    assert call["function"]["name"] in (("fan",) if choice != "required" else ("light", "fan"))
    assert isinstance(json.loads(call["function"]["arguments"])["on"], bool)
    assert found["message"]["content"] is None


def test_ids_and_texts_turn_into_each_other(client):
    found = post(client, "/tokenize", {"prompt": "hé"})
    assert found["tokens"] == [tiny.BOS, *"hé".encode()]
    assert (found["count"], found["max_model_len"]) == (4, 700)
    assert post(client, "/detokenize", {"tokens": found["tokens"][1:]}) == {"prompt": "hé"}
    info = client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["model_max_length"]) == ("<|begin_of_text|>", 700)


def test_embeddings_have_length_one_and_ignore_padding(client):
    found = post(client, "/v1/embeddings", {"input": ["a", "a longer text", "a"], "model": "tiny"})
    vectors = [np.asarray(entry["embedding"]) for entry in found["data"]]
    assert all(abs(np.linalg.norm(vector) - 1) < 1e-5 for vector in vectors)
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01
    assert found["usage"]["prompt_tokens"] == 2 + 14 + 2


def test_models_version_and_metrics(client):
    post(client, "/v1/chat/completions", HELLO)
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == ("tiny", 700)
    assert client.get("/v1/models/tiny").json() == card
    assert client.get("/version").json()["version"]
    text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["llama4_generation_tokens_total"]) >= 12
    assert float(values['llama4_request_success_total{finished_reason="length"}']) >= 1
    assert float(values["llama4_num_requests_running"]) == 0
    assert float(values["llama4_time_to_first_token_seconds_count"]) >= 1


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("path", "change", "status", "says", "param"),
    [
        ("chat", {"temperature": -1}, 400, "temperature", "temperature"),
        ("chat", {"temperature": "hot"}, 400, "must be a number", "temperature"),
        ("chat", {"top_p": 0}, 400, "top_p", "top_p"),
        ("chat", {"max_tokens": 0}, 400, "max_tokens", "max_tokens"),
        ("chat", {"max_tokens": 9999}, 400, "positions", None),
        ("chat", {"n": 0}, 400, "n (0)", "n"),
        ("chat", {"messages": []}, 400, "at least one message", "messages"),
        ("chat", {"messages": [{"role": "king", "content": "a"}]}, 400, "role", None),
        ("chat", {"messages": "a"}, 400, "must be a list", "messages"),
        ("chat", {"logprobs": True, "top_logprobs": 21}, 400, "0..20", "top_logprobs"),
        ("chat", {"logit_bias": {"a": 1}}, 400, "token ids", "logit_bias"),
        ("chat", {"logit_bias": {"99999": 1}}, 400, "0..351", "logit_bias"),
        ("chat", {"functions": [{}]}, 400, "use tools", "functions"),
        ("chat", {"tool_choice": "required"}, 400, "needs tools", "tool_choice"),
        ("chat", {"response_format": {"type": "xml"}}, 400, "json_object", "response_format.type"),
        ("chat", {"structured_outputs": {"regex": "("}}, 400, "malformed", None),
        ("chat", {"model": "gpt"}, 404, "there is no model 'gpt'", "model"),
        ("chat", {"stop": [1]}, 400, "stop", "stop"),
        ("completion", {"prompt": 3}, 400, "prompt", "prompt"),
        ("completion", {"prompt": [[1], "a"]}, 400, "prompt", "prompt"),
        ("completion", {"prompt": [99999]}, 400, "must lie in", None),
        ("completion", {"suffix": "a"}, 400, "middle", "suffix"),
        ("chat", {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}]}]},
         400, "--allow_image_hosts", "messages"),
        ("chat", {"messages": [{"role": "user", "content": [
            {"type": "image", "path": "/etc/passwd"}]}]}, 400, "image_url", "messages"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(client, path, change, status, says, param):
    bodies = {
        "chat": ("/v1/chat/completions", HELLO),
        "completion": ("/v1/completions", {"prompt": "a", **GREEDY}),
    }
    where, body = bodies[path]
    for more in ({}, {"stream": True}):
        error = post(client, where, {**body, **change, **more}, status)["error"]
        assert says in error["message"]
        assert error["param"] == param
        assert error["type"] in ("invalid_request_error", "not_found_error")


def test_an_unknown_field_is_named_in_a_header(client):
    response = client.post("/v1/chat/completions", json={**HELLO, "colour": "red", "user": "u"})
    assert response.headers["x-ignored-fields"] == "colour"


def test_what_is_not_there_is_told_in_the_same_form(client):
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert client.get("/v1/chat/completions").status_code == 405
    assert client.get("/page/../app.py").status_code == 404
    assert client.get("/page/%2e%2e/app.py").status_code == 404


def test_the_page_loads_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("page/chat.js", "page/chat.css"):
        assert name in page.text
        text = client.get(f"/{name}").text
        assert "http://" not in text and "https://" not in text
    assert "http://" not in page.text and "https://" not in page.text


def test_keys_are_asked_for_and_health_is_open(model):
    limits = Limits(keys=("sesame", "other"))
    with serving(model, config=CONFIG, limits=limits) as (url, _):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"}):
            response = httpx.get(f"{url}/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
        for key in limits.keys:
            headers = {"authorization": f"Bearer {key}"}
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(url).status_code == 200


def test_a_full_queue_says_when_to_come_again(model):
    limits = Limits(waiting=0)
    config = EngineConfig(max_rows=1, step_tokens=8, max_context=96)
    with serving(model, config=config, limits=limits) as (url, _):
        body = {**HELLO, "n": 2}
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert httpx.post(f"{url}/v1/chat/completions", json=HELLO, timeout=60).status_code == 200


def test_pages_elsewhere_are_let_in_by_name(model):
    with serving(model, config=CONFIG, limits=Limits(origins=("https://a.example",))) as (url, _):
        for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
            headers = {"origin": origin, "access-control-request-method": "POST"}
            response = httpx.options(f"{url}/v1/models", headers=headers)
            assert (response.headers.get("access-control-allow-origin") == origin) == allowed
