"""A template that would take forever or fill the memory is refused; an honest one is not."""

import pytest

from llama4_jax.text import CHAT_TEMPLATE, ChatTemplate, Message, template_limits
from tests.text.template_test import TYPICAL

GROW = "{%% set ns = namespace(s='ab') %%}{%% for i in range(60) %%}%s{%% endfor %%}{{ ns.s }}"
BIG = "('a' * 1000000)"

EXPLODING = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "times": "{{ 'a' * 10**9 }}",
    "a list times": "{{ [0] * 10**9 }}",
    "powers": "{{ 2 ** (10**9) }}",
    "large numbers": GROW.replace("'ab'", "3") % "{% set ns.s = ns.s * ns.s %}",
    "sums": GROW % "{% set ns.s = ns.s + ns.s %}",
    "joined": GROW % "{% set ns.s = ns.s ~ ns.s %}",
    "blocks": GROW % "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}",
    "str.format": GROW % "{% set ns.s = '{}{}'.format(ns.s, ns.s) %}",
    "percent": GROW % "{% set ns.s = '%s%s' % (ns.s, ns.s) %}",
    "join": GROW % "{% set ns.s = [ns.s, ns.s] | join %}",
    "str.join": GROW % "{% set ns.s = ''.join([ns.s, ns.s]) %}",
    "replace": GROW % "{% set ns.s = ns.s | replace('a', ns.s) %}",
    "str.replace": GROW % "{% set ns.s = ns.s.replace('a', ns.s) %}",
    "lists of lists": GROW % "{% set ns.s = [ns.s, ns.s] %}",
    "tuples of tuples": GROW % "{% set ns.s = (ns.s, ns.s) %}",
    "dicts of dicts": GROW % "{% set ns.s = {'a': ns.s, 'b': ns.s} %}",
    "dicts by name": GROW % "{% set ns.s = dict(a=ns.s, b=ns.s) %}",
    "wide columns": "{{ 'a'.center(10**9) }}",
    "a wide number": "{{ '%1000000000d' % 1 }}",
    "a wide field": "{{ '{:1000000000}'.format(1) }}",
    "a computed width": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "a starred width": "{{ '%*d' % (10**9, 1) }}",
    "the filter format": "{{ '%1000000000d' | format(1) }}",
    "repeated fields": "{{ ('{0}' * 1000000).format(" + BIG + ") }}",
    "a wide separator": "{{ range(99999) | join(" + BIG + ") }}",
    "many of many": "{{ range(99999) | map('replace', '', " + BIG + ") | list | length }}",
    "sums of lists": "{{ ([range(99999) | list] * 99999) | sum(start=[]) }}",
    "indented": "{{ ('\n' * 100000) | indent(10**6) }}",
    "indented JSON": "{{ [0] | tojson(indent=10**9) }}",
    "wide JSON": "{{ ([0] * 100000) | tojson(separators=(" + BIG + ", '')) }}",
    "rounded": "{{ 5 | round(-10**9) }}",
    "encoded": "{{ (1).to_bytes(10**9, 'big') }}",
    "tabs": "{{ ('\t' * 1000000).expandtabs(60000) }}",
    "filler": "{{ lipsum(10**6) }}",
    "recursive loops": "{% for a in [[]] recursive %}{{ loop([a]) }}{% endfor %}",
}


@pytest.mark.parametrize("name", EXPLODING)
def test_a_template_that_explodes_is_refused(name, monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_STEPS", 100_000)  # of macros, a million take 9 s
    with pytest.raises(ValueError, match=r"^The chat template does not render .{10,300}$"):
        ChatTemplate(EXPLODING[name]).text([Message("user", "x")])


NESTED = {
    "parentheses": "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}",
    "lists": "{{ " + "[" * 10_000 + "1" + "]" * 10_000 + " }}",
    "negations": "{{ " + "not " * 10_000 + "a }}",
    "sums": "{{ 1" + "+1" * 10_000 + " }}",
    "attributes": "{{ a" + ".a" * 10_000 + " }}",
    "conditions": "{% if a %}" * 10_000 + "{% endif %}" * 10_000,
    "indentation": "{% if a %}" * 120 + "{% endif %}" * 120,
    "alternatives": "{% if a %}" + "{% elif b %}" * 10_000 + "{% endif %}",
    "a filter left out": "{{ 'a' | center(10**9) }}",
    "nothing closed": "{{ '" + "a" * 1_000_000,
}


@pytest.mark.parametrize("name", NESTED)
def test_a_template_that_nests_too_deep_is_refused(name):
    with pytest.raises(ValueError, match=r"^The chat template (does not compile|is not Jinja)"):
        ChatTemplate(NESTED[name])


def test_operations_that_make_little_may_not_take_forever(monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.1)
    source = "{% set a = 'a' * 9999999 %}{% for i in range(99999) %}{{ 'b' in a }}{% endfor %}"
    with pytest.raises(ValueError, match="does not come to an end"):
        ChatTemplate(source).text([])


def test_a_namespace_that_is_in_itself_is_written_out_once():
    names = "".join(f"{{% set n{i + 1} = namespace(a=n{i}, b=n{i}) %}}" for i in range(60))
    assert ChatTemplate(f"{{% set n0 = 0 %}}{names}{{{{ n60 }}}}").text([]) == "<Namespace>"


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, TYPICAL])
def test_a_long_dialogue_renders(source):
    template = ChatTemplate(source, {"bos_token": "<|begin_of_text|>"})
    messages = [Message("user", f"message {i}") for i in range(2000)]
    assert "message 1999" in template.text(messages)
    assert template.text([Message("user", "a" * 10**7)]).count("a") >= 10**7
