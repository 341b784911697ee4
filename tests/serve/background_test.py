"""After warming up no step waits for a compiler: requests wait until a thread has compiled."""

import collections
import dataclasses
import threading

import jax
import pytest

from llama4_jax import from_pretrained, save_pretrained
from llama4_jax.serve import Engine, Options, Request, device
from llama4_jax.serve.catalogue import Program
from llama4_jax.serve.requests import read_requests
from llama4_jax.serve.warm import foreseen
from tests.serve import tiny
from tests.serve.engine_test import SIZES as ENGINE_SIZES
from tests.serve.engine_test import same

# The pools and rows of other tests, whose programs are kept; one length of prompts to compile.
SIZES = dataclasses.replace(ENGINE_SIZES, step_tokens=16)
COMPILED = "/jax/core/compile/backend_compile_duration"

JOBS = [
    (Request(tokens=tiny.random_tokens(1, 9)), Options(max_new_tokens=12)),
    (Request(tokens=tiny.random_tokens(2, 40)), Options(max_new_tokens=9, temperature=1.0)),
    (Request(prompt="ab", images=[tiny.picture(0)]), Options(max_new_tokens=6)),
    (Request(tokens=tiny.random_tokens(3, 20)), Options(max_new_tokens=8, presence_penalty=1.5)),
    (Request(tokens=tiny.random_tokens(4, 5)), Options(max_new_tokens=8, regex="[a-d]+")),
    (Request(tokens=tiny.random_tokens(5, 30)), Options(max_new_tokens=3, prompt_logprobs=1)),
]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tiny.pretrained(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def compiling():
    """The threads in which programs were compiled, from now on."""
    threads: list[str] = []

    def listen(name: str, _: float, **__) -> None:
        if name == COMPILED:
            threads.append(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield threads
    jax.monitoring.unregister_event_duration_listener(listen)


def serve(engine, jobs):
    """Serve jobs to their end, whatever waits for a compiler meanwhile."""
    requests = [request for request, _ in jobs]
    prompts = read_requests(engine.pretrained, requests)
    numbers, found = {}, {}
    for index, (prompt, (_, options)) in enumerate(zip(prompts, jobs, strict=True)):
        numbers[engine.submit(prompt, options)] = index
    left = sum(options.n for _, options in jobs)
    while left:
        assert engine.wait(timeout=600)
        for event in engine.step():
            key = numbers[event.request], event.choice
            got = found.setdefault(key, {"tokens": [], "text": "", "scores": [], "end": None})
            got["tokens"] += event.tokens
            got["text"] += "".join(event.texts)
            got["scores"] += [each.logprob for each in event.prompt_logprobs or ()]
            got["scores"] += [each.logprob for each in event.logprobs or ()]
            got["end"] = event.finish_reason
            left -= event.finish_reason is not None
    return found


@pytest.fixture(scope="module")
def engine(pretrained, compiling):
    """An engine that has served one request; of what other engines compiled it knows nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_compiled", collections.defaultdict(set))
        made = Engine(pretrained, SIZES)
    serve(made, JOBS[:1])
    made.compile_beside()
    compiling.clear()
    yield made
    made.close()


def test_no_step_compiles_whatever_is_asked(pretrained, compiling, engine):
    catalogue = engine.device.catalogue
    before = catalogue.compilations
    assert before > 0
    found = serve(engine, JOBS)
    assert set(compiling) <= {"compile"}  # or nothing, where other tests have compiled it all
    assert catalogue.compilations == before
    kinds = {program.kind for program in catalogue._ready}
    assert kinds == {"read", "loop", "draw", "score", "encode"}
    assert engine.scheduler.whole.held == engine.scheduler.chunk.held == 0
    wanted = serve(Engine(pretrained, SIZES), JOBS)
    assert found.keys() == wanted.keys()
    for key, each in found.items():
        same(each, wanted[key])


def test_a_model_from_a_checkpoint_is_compiled_for_once(pretrained, compiling, tmp_path):
    save_pretrained(pretrained, tmp_path / "saved")
    loaded = Engine(from_pretrained(tmp_path / "saved"), SIZES)
    found = serve(loaded, JOBS[:1])
    compiling.clear()
    assert serve(loaded, JOBS[:1]) == found
    assert compiling == []


def test_what_is_foreseen_is_compiled_before_anybody_asks(pretrained, engine, monkeypatch):
    asked = []
    monkeypatch.setattr(engine._compiler, "ask", lambda liked, **_: asked.extend(liked))
    rows = list(foreseen(engine))
    for row in rows:
        engine._compiler.ask(engine.device.catalogue.needs(row))
    assert {program.kind for program in asked} == {"read", "loop", "draw", "score", "encode"}
    assert max(row.end for row in rows) == engine.context
    assert any(program.form.masked for program in asked if program.kind == "draw")


def test_a_request_that_waits_for_a_compiler_can_be_cancelled(pretrained, engine, monkeypatch):
    never = [Program("encode", count=1000)]
    monkeypatch.setattr(engine.device.catalogue, "needs", lambda _: never)
    monkeypatch.setattr(engine._compiler, "ask", lambda *_, **__: None)
    (prompt,) = read_requests(pretrained, [JOBS[0][0]])
    number = engine.submit(prompt, JOBS[0][1])
    assert engine.step() == []
    assert not engine.is_busy
    engine.cancel(number)
    (event,) = engine.step()
    assert event.finish_reason == "cancelled"
    assert not engine.is_busy


def test_a_failure_of_the_compiler_reaches_the_steps(pretrained, monkeypatch):
    engine = Engine(pretrained, SIZES)
    serve(engine, JOBS[:1])
    engine.compile_beside()
    never = [Program("encode", count=1000)]
    monkeypatch.setattr(engine.device.catalogue, "needs", lambda _: never)
    monkeypatch.setattr(engine._compiler, "_compile", lambda program: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        serve(engine, JOBS[:1])
    engine.close()
