"""A random model's answers have the form that is asked for, whoever else is served."""

import dataclasses
import json
import re

import pytest

from llama4_jax.checkpoint.location import NANO
from llama4_jax.serve import Engine, Options, Request, generate
from llama4_jax.serve.grammar import Grammars
from llama4_jax.text import load_tokenizer
from tests.serve import tiny
from tests.serve.engine_test import SIZES, SPECULATING, Drafter, alone, collect, prompts_of, same

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yz"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
HOT = {"temperature": 1.0, "max_new_tokens": 30}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tiny.pretrained(tmp_path_factory.mktemp("tiny"))


def fits_schema(text):
    found = json.loads(text)
    return isinstance(found["a"], int) and found["b"] in ("x", "yz") and len(found) == 2


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        ({"regex": "[ab]{3,5}!"}, re.compile("[ab]{3,5}!").fullmatch),
        ({"json_schema": SCHEMA, "logit_bias": {ord(" "): -50, ord("\n"): -50}}, fits_schema),
        ({"choices": ["yes", "no", 'a "quote"']}, {"yes", "no", 'a "quote"'}.__contains__),
        ({"grammar": 'start: "(" start ")" | "x"'}, re.compile(r"\(*x\)*").fullmatch),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_an_answer_has_the_form_it_must_have(pretrained, form, fits):
    for seed in range(3):
        options = Options(seed=seed, **HOT, **form)
        (answer,) = generate(pretrained, "q", options=options, config=SIZES)
        if answer.finish_reason == "stop":
            assert fits(answer.text), answer.text
        else:
            assert len(answer.tokens) == 30


@pytest.mark.parametrize("vocab_size", [2048, 2080])
def test_a_mask_has_a_bit_for_every_row_of_the_table(vocab_size):
    tokenizer = load_tokenizer(NANO)
    assert tokenizer.vocab_size == 2048, "a multiple of 32, as Scout's"
    matcher = Grammars(tokenizer, vocab_size, (0,)).matcher(Options(regex="(.|\n)*"))
    masks_DW = matcher.masks([])
    assert masks_DW.shape == (1, vocab_size // 32)
    assert masks_DW[0, :64].any() and not masks_DW[0, 64:].any()


@pytest.mark.parametrize("config", [SIZES, SPECULATING], ids=lambda c: c.speculate)
def test_forms_stand_beside_free_answers_and_drafts(pretrained, config):
    prompts = prompts_of(pretrained, *(Request(tokens=tiny.random_tokens(n, 8)) for n in range(4)))
    forms = [{"regex": "[ab]{3,9}!"}, {}, {"choices": ["yes", "yellow"]}, {"regex": "(ab)*c"}]
    jobs = [(p, Options(seed=3, **HOT, **f)) for p, f in zip(prompts, forms, strict=True)]
    jobs = [(p, dataclasses.replace(o, max_new_tokens=12)) for p, o in jobs]
    wanted = [alone(pretrained, job) for job in jobs]
    engine = Engine(pretrained, config)
    if config is SPECULATING:
        engine.draft = Drafter(wanted)
    found = collect(engine, jobs)
    for index, answers in enumerate(wanted):
        same(found[index, 0], answers[0, 0])


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"regex": "("}, "request 0: the form that the answer must have is malformed"),
        ({"grammar": "begin: 1"}, "is malformed"),
        ({"json_schema": {"type": "nothing"}}, "is malformed"),
    ],
)
def test_a_malformed_form_is_refused_before_anything_is_generated(pretrained, form, says):
    with pytest.raises(ValueError, match=says):
        generate(pretrained, "q", options=Options(max_new_tokens=9, **form), config=SIZES)


def test_one_answer_has_one_form():
    with pytest.raises(ValueError, match="regex and choices exclude each other"):
        Options(regex="a", choices=["a"])
