"""Dialogues have the ids of Meta's code, and replies are read back with all their calls."""

import json

import pytest
from llama_models import datatypes as meta

from llama4_jax.text import Image, Message, ToolCall, load_tokenizer, parse, render
from tests.text.reference import NANO, meta_chat_format, tokenizer_model

GOLDEN = [
    *(200000, 200005, 15651, 200006, 368, 38918, 200008),
    *(200005, 1556, 200006, 368, 93, 200008),
    *(200005, 140680, 200006, 368, 45, 200008),
    *(200005, 1556, 200006, 368, 19303, 200008),
    *(200005, 140680, 200006, 368),
]


def test_a_dialogue_has_the_published_ids():
    messages = [
        Message("system", "Sys"),
        Message("user", "q"),
        Message("assistant", "A"),
        Message("user", "more"),
    ]
    assert render(messages, tokenizer_model()) == GOLDEN


# ----------------------------------------------------------------------------- against Meta's code

WEATHER = ToolCall("weather", {"city": "Paris", "days": 2})
SEARCH = ToolCall("brave_search", {"query": "gold"})
DIALOGUES = {
    "user": [Message("user", "This is a test sentence.")],
    "system": [Message("system", "This is a test."), Message("user", "This is a response.")],
    "nothing trimmed": [Message("system", "  s \n"), Message("user", "\n\n q\t")],
    "typed special tokens": [Message("user", "<|eot|><|header_start|>system<|header_end|>")],
    "no content": [Message("user", "")],
    "several texts": [Message("user", ("one", " two", "\n", "three"))],
    "retrieved text": [Message("user", "q?", context="The facts.\n")],
    "end of message": [Message("assistant", "Wait.", stop_reason="end_of_message")],
    "end of turn": [Message("assistant", "Done.", stop_reason="end_of_turn")],
    "call and result": [
        Message("user", "q"),
        Message("assistant", "", [WEATHER]),
        Message("tool", '{"sky": "blue"}'),
        Message("assistant", "Blue."),
    ],
    "call after text": [Message("assistant", "I look.", [WEATHER])],
    "search": [Message("assistant", "", [SEARCH]), Message("ipython", "1000")],
    "nothing": [],
}


def _to_meta(message):
    text = [meta.RawTextItem(text=part) for part in message.parts]
    calls = [
        meta.ToolCall(call_id="", tool_name=call.name, arguments=dict(call.arguments))
        for call in message.tool_calls
    ]
    return meta.RawMessage(
        role="tool" if message.is_tool_result else message.role,
        content=message.content if isinstance(message.content, str) else text,
        context=message.context,
        stop_reason=message.stop_reason and meta.StopReason(message.stop_reason),
        tool_calls=calls,
    )


@pytest.mark.parametrize("form", ["json", "function_tag", "python_list"])
@pytest.mark.parametrize("name", DIALOGUES)
def test_a_dialogue_has_the_ids_of_metas_code(name, form):
    want = meta_chat_format().encode_dialog_prompt(
        [_to_meta(message) for message in DIALOGUES[name]], meta.ToolPromptFormat(form)
    )
    assert render(DIALOGUES[name], tokenizer_model(), tool_format=form) == want.tokens


@pytest.mark.parametrize("form", ["json", "function_tag"])
def test_parallel_calls_have_the_ids_of_metas_code(form):
    message = Message("assistant", "", [WEATHER, ToolCall("now"), SEARCH])
    want = meta_chat_format().encode_dialog_prompt([_to_meta(message)], meta.ToolPromptFormat(form))
    # Meta encodes call by call, and so must this: a joint encoding may differ at the seams.
    assert render([message], tokenizer_model(), tool_format=form) == want.tokens


# The inputs of Meta's own tests of its chat format, as the texts that its parsers would see, and
# what those tests expect: name, arguments, the arguments as JSON.
META_CASES = [
    (
        '[get_weather(location="San Francisco", units="metric")]',
        "get_weather",
        {"location": "San Francisco", "units": "metric"},
        '{"location": "San Francisco", "units": "metric"}',
    ),
    (
        'brave_search.call(query="weather in San Francisco")',
        "brave_search",
        {"query": "weather in San Francisco"},
        '{"query": "weather in San Francisco"}',
    ),
    (
        "code_interpreter.call(query=\"print('Hello, World!')\")",
        "code_interpreter",
        {"query": "print('Hello, World!')"},
        '{"query": "print(\'Hello, World!\')"}',
    ),
    (
        '[complex_function(title="My Title", numbers=[1, 2, 3], enabled=true, score=3.14)]',
        "complex_function",
        {"title": "My Title", "numbers": [1, 2, 3], "enabled": True, "score": 3.14},
        '{"title": "My Title", "numbers": [1, 2, 3], "enabled": true, "score": 3.14}',
    ),
]


@pytest.mark.parametrize(("text", "name", "arguments", "as_json"), META_CASES)
def test_the_calls_of_metas_own_chat_tests_are_read(text, name, arguments, as_json):
    reply = parse(text, stop_reason="end_of_turn")
    (call,) = reply.tool_calls
    assert (call.name, call.arguments, call.arguments_json) == (name, arguments, as_json)
    assert json.loads(call.arguments_json) == arguments
    assert call.call_id
    assert reply.content == ""
    assert reply.stop_reason == "end_of_turn"


def test_a_reply_without_calls_is_its_text():
    text = "Just a regular response with no tool calls."
    assert parse(text) == Message("assistant", text)


REPLIES = [
    "Hello.<|eot|>",
    "<|header_start|>assistant<|header_end|>\n\nHello.<|eot|>",
    "Wait.<|eom|>",
    '[f(x=1, s="a")]<|eom|>',
    "<function=f>{\"x\": 1}</function><|eom|>",
    '{"type": "function", "name": "f", "parameters": {"x": [1]}}<|eom|>',
    '<|python_start|>brave_search.call(query="gold")<|python_end|><|eom|>',
    "<|python_start|>print(1)\nprint(2)<|python_end|><|eom|>",
    "<|python_start|>print(1)<|eom|>",
    '<|python_start|><|python_end|>{"name": "f", "parameters": {"x": 1}}<|eot|>',
    '<|python_start|>[f(x=1)]<|python_end|><|eom|>',
]  # fmt: skip


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_is_read_as_metas_code_reads_it(reply):
    stop = meta.StopReason.out_of_tokens
    want = meta_chat_format().decode_assistant_message_from_content(reply, stop)
    ids = tokenizer_model().encode(reply, allow_special=True)
    for got in (parse(reply), parse(ids, tokenizer_model())):
        assert got.content == want.content
        assert got.stop_reason == want.stop_reason.value.replace("out_of_tokens", "") or None
        assert [(c.name, c.arguments) for c in got.tool_calls] == [
            (getattr(c.tool_name, "value", c.tool_name), c.arguments) for c in want.tool_calls
        ]


# ------------------------------------------------------------------------------------ our own part


def test_metas_code_reads_only_the_first_call_and_this_reads_all():
    reply = parse("[f(x=1), g(y=2)]<|eom|>")
    assert [(c.name, c.call_id) for c in reply.tool_calls] == [("f", "call_0"), ("g", "call_1")]
    mixed = parse('<|python_start|>1+1<|python_end|>[f()]brave_search.call(query="q")')
    assert [c.name for c in mixed.tool_calls] == ["code_interpreter", "f", "brave_search"]
    assert [c.call_id for c in mixed.tool_calls] == ["call_0", "call_1", "call_2"]


def test_code_is_written_between_its_special_tokens_and_read_back():
    call = ToolCall("code_interpreter", {"code": "print('<|python_end|>')\n"})
    tokenizer = tokenizer_model()
    ids = render([Message("assistant", "", [call])], tokenizer, add_generation_prompt=False)
    assert ids.count(200_016) == ids.count(200_017) == 1
    (got,) = parse(ids[1:], tokenizer).tool_calls
    assert (got.name, got.arguments) == (call.name, call.arguments)


def test_a_terminator_spelled_in_ordinary_tokens_does_not_end_a_reply():
    tokenizer = tokenizer_model()
    ids = [*tokenizer.encode("Write <|eot|> to end, <|python_start|> to begin."), 200_008]
    reply = parse(ids, tokenizer)
    assert reply.content == "Write <|eot|> to end, <|python_start|> to begin."
    assert reply.stop_reason == "end_of_turn"


def test_what_follows_the_terminator_is_ignored():
    tokenizer = tokenizer_model()
    ids = [*tokenizer.encode("Hi."), 200_008, 200_018, 200_018]
    assert parse(ids, tokenizer).content == parse("Hi.<|eot|><|eot|>junk").content == "Hi."


def test_a_reply_cut_short_keeps_the_reason_it_was_given():
    assert parse("So the", stop_reason="out_of_tokens").stop_reason == "out_of_tokens"
    assert parse("So.<|eom|>", stop_reason="out_of_tokens").stop_reason == "end_of_message"


def test_ids_need_their_tokenizer():
    with pytest.raises(ValueError, match="needs the tokenizer"):
        parse([1, 2, 3])


# ------------------------------------------------------------------------------------------ images


def test_a_tools_object_is_written_as_json():
    as_object = render([Message("tool", {"sky": "blau é"})], tokenizer_model())
    assert as_object == render([Message("tool", '{"sky": "blau é"}')], tokenizer_model())


def _runs(*runs):
    return [[200_080, *run, 200_081] for run in runs]


def test_images_stand_where_they_were_put_as_the_ids_given():
    messages = [
        Message("user", (Image(), "and", Image(), "differ?")),
        Message("user", ("this", Image())),
    ]
    ids = render(messages, tokenizer_model(), image_tokens=_runs([1], [2, 2], [3]))
    joined = " ".join(map(str, ids))
    assert "200006 368 200080 1 200081 429 200080 2 2 200081" in joined
    assert joined.index("200080 2 2 200081") < joined.index("200080 3 200081")


def test_ids_of_images_may_come_from_a_function():
    messages = [Message("user", (Image("a"), Image("bc")))]
    ids = render(messages, tokenizer_model(), image_tokens=lambda image: [7] * len(image.source))
    assert ids.count(7) == 3


@pytest.mark.parametrize(("given", "message"), [(0, "more images than the 0"), (2, "1 image")])
def test_another_number_of_images_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        render([Message("user", (Image(),))], tokenizer_model(), image_tokens=_runs(*[[1]] * given))


def test_a_typed_image_token_is_text_unless_special_tokens_are_asked_for():
    messages = [Message("user", "<|image|>")]
    assert 200_090 not in render(messages, tokenizer_model())
    assert 200_090 in render(messages, tokenizer_model(), allow_special=True)


# ------------------------------------------------------------------------------------------- tools

TOOL = {"name": "weather", "description": "Says the weather – <|eot|>", "parameters": {}}


def _text(messages, **settings):
    tokenizer = load_tokenizer(NANO)
    return tokenizer.decode(render(messages, tokenizer, **settings))


@pytest.mark.parametrize("form", ["json", "function_tag", "python_list"])
def test_tools_are_described_in_the_system_message(form):
    text = _text([Message("user", "q")], tools=[TOOL], tool_format=form)
    system, _, rest = text.partition("<|header_start|>user")
    assert system.startswith("<|begin_of_text|><|header_start|>system<|header_end|>\n\nYou can")
    assert json.dumps(TOOL, ensure_ascii=False) in system
    assert rest.startswith("<|header_end|>\n\nq<|eot|>")


def test_every_form_is_shown_by_an_example_that_reads_as_calls():
    for form, example in {
        "json": '{"type": "function", "name": "first", "parameters": {"text": "a"}}',
        "function_tag": '<function=first>{"text": "a"}</function>',
        "python_list": '[first(text="a"), second(count=2)]',
    }.items():
        assert example in _text([], tools=[TOOL], tool_format=form)
        assert parse(example).tool_calls[0].arguments == {"text": "a"}


def test_a_tool_may_be_wrapped_as_a_function():
    wrapped = {"type": "function", "function": TOOL}
    assert _text([], tools=[wrapped]) == _text([], tools=[TOOL])


def test_an_existing_system_message_keeps_its_text_before_the_tools():
    text = _text([Message("system", "Be brief."), Message("user", "q")], tools=[TOOL])
    assert text.count("<|header_start|>system") == 1
    assert "<|header_end|>\n\nBe brief.\n\nYou can call" in text


def test_built_in_tools_are_named_in_the_environment():
    text = _text([Message("system", "Hi.")], tools=["brave_search", "code_interpreter"])
    assert "<|header_end|>\n\nEnvironment: ipython\nTools: brave_search\n\nHi.<|eot|>" in text
    assert "Environment: ipython<|eot|>" in _text([], tools=["code_interpreter"])


def test_built_in_and_own_tools_go_together():
    text = _text([], tools=["brave_search", TOOL])
    assert "Environment: ipython\nTools: brave_search\n\nYou can call" in text


@pytest.mark.parametrize(
    ("tool", "message"), [("google", "not a built-in tool"), ({"a": 1}, 'with a "name"')]
)
def test_a_tool_that_is_none_is_refused(tool, message):
    with pytest.raises(ValueError, match=message):
        render([], tokenizer_model(), tools=[tool])


def test_no_special_token_of_a_tool_is_special():
    tokenizer = tokenizer_model()
    ids = render([Message("user", "q")], tokenizer, tools=[TOOL], add_generation_prompt=False)
    assert ids.count(200_008) == 2  # the system's and the user's own terminators


def test_the_assistants_header_can_be_left_out():
    ids = render([Message("user", "q")], tokenizer_model(), add_generation_prompt=False)
    assert ids[-1] == 200_008
