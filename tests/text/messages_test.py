"""Messages refuse what has no meaning and read the JSON of requests."""

import pytest

from llama4_jax.text import Image, Message, ToolCall, images_of, message_from_dict, message_to_dict


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"role": "developer"}, "role must be one of system, user"),
        ({"role": "user", "tool_calls": (ToolCall("f"),)}, "Only the assistant has tool_calls"),
        ({"role": "assistant", "context": "x"}, "Only the user has a context"),
        ({"role": "user", "content": (1,)}, "a str or an Image, not 1"),
        ({"role": "user", "content": {"a": 1}}, "Only a tool's result is an object"),
        ({"role": "assistant", "stop_reason": "eot"}, "stop_reason must be one of"),
    ],
)
def test_a_message_without_meaning_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Message(**fields)


def test_the_result_of_a_tool_speaks_as_ipython():
    assert Message("tool").header == Message("ipython").header == "ipython"
    assert Message("tool").is_tool_result
    assert not Message("user").is_tool_result


def test_images_are_listed_in_reading_order():
    first, second = Image("a.png"), Image("b.png")
    messages = [Message("user", ("x", first)), Message("user", "y"), Message("user", (second,))]
    assert images_of(messages) == [first, second]


def test_a_plain_message_reads_from_json():
    assert message_from_dict({"role": "user", "content": "hi"}) == Message("user", "hi")
    assert message_from_dict({"role": "assistant", "content": None}) == Message("assistant")


def test_parts_read_from_json_in_the_usual_spellings():
    content = [
        {"type": "text", "text": "see"},
        {"type": "image", "path": "a.png"},
        {"type": "image_url", "image_url": {"url": "b.png"}},
        {"type": "image"},
    ]
    want = ("see", Image("a.png"), Image("b.png"), Image())
    assert message_from_dict({"role": "user", "content": content}).content == want


def test_tool_calls_read_from_json_with_arguments_as_object_or_text():
    calls = [
        {"id": "7", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"name": "g", "arguments": {"y": [2]}},
    ]
    message = message_from_dict({"role": "assistant", "tool_calls": calls})
    assert message.tool_calls == (ToolCall("f", {"x": 1}, "7"), ToolCall("g", {"y": [2]}))


def test_the_result_of_a_tool_may_be_any_json():
    message = message_from_dict({"role": "tool", "content": {"a": "é"}})
    assert message.parts == ('{"a": "é"}',)
    assert message_to_dict(message)["content"] == {"a": "é"}
    assert message_from_dict({"role": "tool", "content": [1, 2]}).content == "[1, 2]"
    parts = [{"type": "text", "text": "t"}]
    assert message_from_dict({"role": "tool", "content": parts}).content == ("t",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hi", 'an object with a "role"'),
        ({"content": "hi"}, 'an object with a "role"'),
        ({"role": "user", "content": 3}, "text or a list of parts, not 3"),
        ({"role": "user", "content": [{"type": "audio"}]}, "audio"),
        ({"role": "assistant", "tool_calls": [{"id": 1}]}, 'function with a "name"'),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "not JSON"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "1"}]}, "an object"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[" * 100_000}]},
            "arguments of 'f' is nested",
        ),
        ({"role": "assistant", "tool_calls": 3}, "tool_calls must be a list, not 3"),
        ({"role": "user", "content": "", "context": {}}, "context must be a text"),
        ({"role": ["user"]}, r"role must be one of .* not \['user'\]"),
        ({"role": "x" * 10**6}, r"^.{1,300}$"),
    ],
)
def test_json_that_is_no_message_is_refused_with_the_field(value, message):
    with pytest.raises(ValueError, match=message):
        message_from_dict(value)


def test_templates_get_the_form_they_know():
    call = ToolCall("f", {"x": 1})
    assert message_to_dict(Message("user", "q", context="facts")) == {
        "role": "user",
        "content": "q\n\nfacts",
    }
    assert message_to_dict(Message("user", ("q", Image("a"))))["content"] == [
        {"type": "text", "text": "q"},
        {"type": "image"},
    ]
    assert message_to_dict(Message("assistant", "", (call,)))["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ]
    assert "tool_calls" not in message_to_dict(Message("assistant", "a"))
