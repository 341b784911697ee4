"""Tool calls are written as Meta's code writes them, and every call is read back."""

import random

import pytest
from llama_models.datatypes import ToolCall as MetaToolCall
from llama_models.datatypes import ToolPromptFormat
from llama_models.llama3.tool_utils import ToolUtils

from llama4_jax.text import (
    Message,
    ToolCall,
    load_chat_template,
    load_tokenizer,
    parse,
    render,
)
from llama4_jax.text.byte_level import ByteLevelTokenizer
from llama4_jax.text.tool_call_reader import find_calls
from llama4_jax.text.tool_calls import Code, write_calls
from tests.text.reference import NANO

FORMS = ("json", "function_tag", "python_list")

# Values that Meta's code writes so that they can be read again.
SIMPLE_CALLS = [
    ("get_weather", {"location": "San Francisco", "units": "metric"}),
    ("initialize", {}),
    ("calculate_volume", {"radius": 5.2, "height": 10}),
    ("process", {"name": "sample", "value": -42, "active": True, "missing": None}),
    ("convert", {"values": [100, 101.5, "x", False]}),
    ("search", {"text": "naïve 你好"}),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "arguments"), SIMPLE_CALLS)
def test_a_simple_call_is_written_as_metas_code_writes_it(form, name, arguments):
    call = MetaToolCall(call_id="", tool_name=name, arguments=arguments)
    want = ToolUtils.encode_tool_call(call, ToolPromptFormat(form))
    assert write_calls([ToolCall(name, arguments)], form) == [want]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["brave_search", "wolfram_alpha", "photogen"])
def test_a_search_is_written_as_metas_code_writes_it(form, name):
    call = MetaToolCall(call_id="", tool_name=name, arguments={"query": "gold price"})
    want = ToolUtils.encode_tool_call(call, ToolPromptFormat(form))
    assert write_calls([ToolCall(name, {"query": "gold price"})], form) == [want]


@pytest.mark.parametrize("form", FORMS)
def test_code_is_marked_as_code(form):
    assert write_calls([ToolCall("code_interpreter", {"code": "1+1"})], form) == [Code("1+1")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "arguments"), SIMPLE_CALLS)
def test_a_simple_call_is_read_as_metas_code_reads_it(form, name, arguments):
    (text,) = write_calls([ToolCall(name, arguments)], form)
    (call,) = find_calls(text).calls
    assert (call.name, call.arguments) == ToolUtils.maybe_extract_custom_tool_call(text)


# ------------------------------------------------- the cases of Meta's own tests of tool calls

BOILING = ("get_boiling_point", {"liquid_name": "water", "celcius": True})
MELTING = ("get_melting_point", {"substance": "ice", "kelvin": False})
READ = {
    '<function=getWeather>{"location":"New York","date":"2023-08-05"}': [
        ("getWeather", {"location": "New York", "date": "2023-08-05"})
    ],
    '[get_boiling_point(liquid_name="water", celcius=True)]': [BOILING],
    '[get_boiling_point(liquid_name="water", celcius=True), '
    'get_melting_point(substance="ice", kelvin=False)]': [BOILING, MELTING],
    '[get_boiling_point(liquid_name="water", celcius=True, precise=False)]': [
        ("get_boiling_point", {"liquid_name": "water", "celcius": True, "precise": False})
    ],
    "[calculate_volume(radius=5.2, height=10)]": [
        ("calculate_volume", {"radius": 5.2, "height": 10})
    ],
    '[process_data(name="sample", value=42, active=True, ratio=3.14)]': [
        ("process_data", {"name": "sample", "value": 42, "active": True, "ratio": 3.14})
    ],
    "[initialize()]": [("initialize", {})],
    '[analyze_text(content="Hello, world!", language="en")]': [
        ("analyze_text", {"content": "Hello, world!", "language": "en"})
    ],
    '[get_boiling_point(liquid={"name":"water", "color":"translucent"}), '
    'convert_temperature(value=[100, 101], from_unit="C", to_unit="F")]': [
        ("get_boiling_point", {"liquid": {"name": "water", "color": "translucent"}}),
        ("convert_temperature", {"value": [100, 101], "from_unit": "C", "to_unit": "F"}),
    ],
}
NO_CALLS = [
    "[]",
    '[get_boiling_point(liquid_name="water"), 42]',
    '[get_boiling_point("water", True)]',
    '[[get_boiling_point(liquid_name="water")]]',
    '{"func": get_boiling_point(liquid_name="water")}',
    '[get_boiling_point(liquid_name="water", celcius=True',
    'get_boiling_point(liquid_name="water")',
    '[(get_boiling_point(liquid_name="water"),)]',
]


@pytest.mark.parametrize(("text", "calls"), READ.items())
def test_all_calls_of_a_text_are_read(text, calls):
    found = find_calls(text)
    assert [(call.name, call.arguments) for call in found.calls] == calls
    assert found.text == ""


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_list_of_calls_stays_text(text):
    assert find_calls(text) == ((), text)


# ---------------------------------------------------------------------------- what else is read

MORE = {
    '{"type": "function", "name": "f", "parameters": {"x": 1}}': [("f", {"x": 1})],
    '{"name": "f", "parameters": {}}{"name": "g", "parameters": {"y": null}}': [
        ("f", {}),
        ("g", {"y": None}),
    ],
    '{"name": "f", "arguments": {"x": 1}};\n{"name": "g", "arguments": {}}': [
        ("f", {"x": 1}),
        ("g", {}),
    ],
    '[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}]': [("f", {}), ("g", {})],
    '<function=f>{"a": {"b": "}"}}</function><function=g>{}</function>': [
        ("f", {"a": {"b": "}"}}),
        ("g", {}),
    ],
    "<function=f>{'a': 'it is', 'b': None}</function>": [("f", {"a": "it is", "b": None})],
    'brave_search.call(query="a \\"b\\" c")': [("brave_search", {"query": 'a "b" c'})],
    'brave_search.call(query="C:\\dir")': [("brave_search", {"query": "C:\\dir"})],
    '[brave_search.call(query="x"), f(y=1)]': [("brave_search", {"query": "x"}), ("f", {"y": 1})],
    "[a.b(x=-1.5, y=(1, 2), z=true, w=null)]": [
        ("a.b", {"x": -1.5, "y": [1, 2], "z": True, "w": None})
    ],
    "  [f(x='single', y=\"]\")]\n": [("f", {"x": "single", "y": "]"})],
    '{"name": "brave_search", "parameters": {"q": "x"}}': [("brave_search", {"query": "x"})],
    '{"name": "f", "arguments": "{\\"x\\": 1}"}': [("f", {"x": 1})],
    '{"name": "f", "parameters": null}': [("f", {})],
    '{"type": "function", "name": "f"}': [("f", {})],
    '{"type": "function", "function": {"name": "f"}}': [("f", {})],
    '[f(from="a", max-results=+3)]': [("f", {"from": "a", "max-results": 3})],
    "[get-weather(x=1), lambda(y=2)]": [("get-weather", {"x": 1}), ("lambda", {"y": 2})],
    '[f(text="two\nlines, and f(x=1)")]': [("f", {"text": "two\nlines, and f(x=1)"})],
    '[f(text="""a "b"\n(c=d)""")]': [("f", {"text": 'a "b"\n(c=d)'})],
    '```json\n{"name": "f", "parameters": {"x": 1}}\n```': [("f", {"x": 1})],
    " ```\n[f(x=1)]\n``` ": [("f", {"x": 1})],
}


@pytest.mark.parametrize(("text", "calls"), MORE.items())
def test_other_spellings_are_read_too(text, calls):
    found = find_calls(text)
    assert [(call.name, call.arguments) for call in found.calls] == calls
    assert found.text == ""


def test_calls_are_numbered():
    assert [c.call_id for c in find_calls("[f(), g()]").calls] == ["call_0", "call_1"]


def test_text_around_tags_and_searches_is_kept():
    found = find_calls('Sure.\n<function=f>{}</function>\nbrave_search.call(query="x")\nDone.')
    assert [call.name for call in found.calls] == ["f", "brave_search"]
    assert found.text == "Sure.\n\n\nDone."


DANGEROUS = [
    "[__import__('os').system(command='x')]",
    "[f(x=__import__('os'))]",
    "[f(x=open('a'))]",
    "[f(x=1+1)]",
    "[f(x='a' * 9999999999)]",
    "[f(x=[i for i in ()])]",
    "[f(x=lambda: 1)]",
    "[f(x=f'{1}')]",
    "[f(x=b'bytes')]",
    "[f(x={1, 2})]",
    "[f(x=1e999)]",
    "[f(**g)]",
    "[" * 500 + "]" * 500,
    "[f(x=" + "[" * 5000 + "]" * 5000 + ")]",
    '{"name": "f", "parameters": ' + '{"a":' * 100_000,
    "[f(x='\\d')]\0",
    '["' + '\\"' * 100_000,
    '["' * 50_000,
    'Write `brave_search.call(query="x")` to search.',
    'The answer is {"name": "f", "parameters": {}} in JSON.',
    '{"name": "Ada", "age": 36}',
    '{"name": "f", "arguments": "not JSON"}',
    "[f(x=a-b)]",
    "[f(x=g(y=1))]",
    "[f(x=1, x-)]",
    "[a..b(x=1)]",
    "[-f(x=1)]",
    "[" + "a" * 100_000 + "]",
    "[" + "a-" * 50_000 + " b(x=1)]",
    '["' + '"""' * 50_001 + "]",
    '```json\n{"name": "Ada", "age": 36}\n```',
]


@pytest.mark.parametrize("text", DANGEROUS)
def test_anything_but_literals_is_text_and_nothing_runs(text):
    assert find_calls(text) == ((), text)


# ----------------------------------------------------------------------------------- round trips


def _value(random_, depth=0):
    kinds = [None, True, False, random_.randint(-9, 9), random_.random(), _text(random_)]
    if depth < 3:
        kinds.append([_value(random_, depth + 1) for _ in range(random_.randint(0, 3))])
        kinds.append({_text(random_): _value(random_, depth + 1) for _ in range(2)})
    return random_.choice(kinds)


def _text(random_):
    alphabet = "ab \"'\\\n\t{}[]()<>=,;:#é🙂\u2028|/"
    return "".join(random_.choice(alphabet) for _ in range(random_.randint(0, 12)))


def _calls(random_):
    names = ("f", "get-weather", "a.b", "lambda")
    keys = ("x", "y_1", "from", "max-results", "two words", "-", "query")
    calls = []
    for _ in range(random_.randint(1, 4)):
        arguments = {k: _value(random_) for k in random_.sample(keys, random_.randint(0, 4))}
        calls.append(ToolCall(random_.choice(names), arguments))
    calls.insert(
        random_.randrange(len(calls) + 1), ToolCall("brave_search", {"query": _text(random_)})
    )
    code = f"print(1)\n{_text(random_)}"
    calls.insert(random_.randrange(len(calls) + 1), ToolCall("code_interpreter", {"code": code}))
    return calls


@pytest.mark.parametrize("form", FORMS)
def test_whatever_calls_are_rendered_the_same_are_parsed(form):
    tokenizer, random_ = load_tokenizer(NANO), random.Random(8)
    for _ in range(150):
        calls = _calls(random_)
        message = Message("assistant", "", calls)
        ids = render([message], tokenizer, tool_format=form, add_generation_prompt=False)[1:]
        for reply in (parse(ids, tokenizer), parse(tokenizer.decode(ids))):
            assert [(c.name, c.arguments) for c in reply.tool_calls] == [
                (c.name, c.arguments) for c in calls
            ]
            assert reply.content == ""
            assert reply.stop_reason == "end_of_message"


@pytest.mark.parametrize("depth", [100, 900, 100_000])
def test_calls_nested_beyond_use_are_text(depth):
    for text in (
        '{"name": "f", "parameters": {"x": ' + "[" * depth + "]" * depth + "}}",
        "[f(x=" + "[" * depth + "]" * depth + ")]",
        "<function=f>{" + '"x": {' * depth + "}" * depth + "}",
    ):
        assert parse(text).content == text


def test_the_shipped_template_writes_every_call_and_tool_as_render_does():
    tokenizer, random_ = load_tokenizer(NANO), random.Random(9)
    template = load_chat_template(NANO)
    definition = {"name": "f", "parameters": {"type": "object"}}
    built_in = ("brave_search", "code_interpreter", "wolfram_alpha")
    for _ in range(60):
        own = random_.sample(built_in, random_.randint(0, 3))
        tools = [*own, *random_.choice(([], [definition], [{"function": definition}] * 2))]
        odd = [
            ToolCall("code_interpreter", {"code": "1", "timeout": 2}),
            ToolCall("brave_search", {"q": "x"}),
            ToolCall("wolfram_alpha", {"query": 'a "b"'}),
            ToolCall("code_interpreter", {"source": "1"}),
        ]
        called = [*_calls(random_), *random_.sample(odd, 2)]
        messages = [Message("user", "q"), Message("assistant", "", called), Message("tool", "1")]
        system = random_.choice((None, "", "s", ("a", "b"), ("",)))
        if system is not None:
            messages.insert(0, Message("system", system))
        want = render(messages, tokenizer, tools=tools)
        got = template.render(messages, tokenizer, tools=tools)
        assert tokenizer.decode(got) == tokenizer.decode(want)  # parts are encoded one by one


def test_the_shipped_template_refuses_what_render_refuses():
    tokenizer, template = load_tokenizer(NANO), load_chat_template(NANO)
    for write in (lambda *a, **b: render(*a, tokenizer, **b), template.text):
        with pytest.raises(ValueError, match="cannot say the name"):
            write([Message("assistant", "", [ToolCall("get weather")])])
        with pytest.raises(ValueError, match="built-in tool"):
            write([Message("user", "q")], tools=["browser"])


LLAMA3 = {
    "<|begin_of_text|>": 300,
    "<|start_header_id|>": 301,
    "<|end_header_id|>": 302,
    "<|eom_id|>": 303,
    "<|eot_id|>": 304,
    "<|python_tag|>": 305,
}


class _Bytes(ByteLevelTokenizer):
    def _encode_ordinary(self, text):
        return list(text.encode())


def test_a_vocabulary_of_llama_3_renders_and_parses():
    tokenizer = _Bytes(
        token_bytes=[bytes([i % 256]) for i in range(300)] + [name.encode() for name in LLAMA3],
        special_tokens=LLAMA3, bos_id=300, eos_ids=(303, 304), pad_id=304,
    )  # fmt: skip
    messages = [
        Message("user", "q"),
        Message("assistant", "", [ToolCall("code_interpreter", {"code": "1+1"})]),
    ]
    ids = render(messages, tokenizer, add_generation_prompt=False)
    text = tokenizer.decode(ids)
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|python_tag|>1+1<|eom_id|>"
    )
    reply_ids = ids[ids.index(304) + 1 :]
    for reply in (parse(reply_ids, tokenizer), parse(tokenizer.decode(reply_ids))):
        (call,) = reply.tool_calls
        assert (call.name, call.arguments) == ("code_interpreter", {"code": "1+1"})
        assert reply.stop_reason == "end_of_message"


@pytest.mark.parametrize(
    ("call", "form", "message"),
    [
        (ToolCall("get weather"), "python_list", "cannot say the name 'get weather'"),
        (ToolCall("a b"), "function_tag", "cannot say the name 'a b'"),
        (ToolCall("f", {"x": {1}}), "python_list", "must be a JSON value"),
        (ToolCall("f", {"x": float("nan")}), "python_list", "must be a JSON value"),
        (ToolCall("f"), "xml", "must be json, function_tag or python_list"),
    ],
)
def test_what_a_form_cannot_say_is_refused(call, form, message):
    with pytest.raises(ValueError, match=message):
        write_calls([call], form)
