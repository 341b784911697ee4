"""Requests become tokens and tiles in the order of reading; what does not fit is refused."""

import base64
import copy
import dataclasses
import io

import numpy as np
import pytest

from llama4_jax.data import preprocess
from llama4_jax.serve.requests import Request, RequestError, read_requests
from llama4_jax.text import CHAT_TEMPLATE, ChatTemplate, Image, Message
from tests.serve import tiny

ONE_TILE = [
    tiny.SPECIAL["<|image_start|>"],
    tiny.SPECIAL["<|image|>"],
    *[tiny.PATCH] * tiny.TOKENS_PER_TILE,
    tiny.SPECIAL["<|image_end|>"],
]
TWO_TILES = [
    tiny.SPECIAL["<|image_start|>"],
    *[tiny.PATCH] * tiny.TOKENS_PER_TILE,
    tiny.SPECIAL["<|tile_x_separator|>"],
    *[tiny.PATCH] * tiny.TOKENS_PER_TILE,
    tiny.SPECIAL["<|tile_y_separator|>"],
    tiny.SPECIAL["<|image|>"],
    *[tiny.PATCH] * tiny.TOKENS_PER_TILE,
    tiny.SPECIAL["<|image_end|>"],
]


@pytest.fixture
def pretrained(tmp_path):
    """The model is left out: reading a request never runs it."""
    return tiny.pretrained(tmp_path, model=None)


def read(pretrained, **request):
    (prompt,) = read_requests(pretrained, [Request(**request)])
    return prompt


def turn(role, *content):
    header = [tiny.SPECIAL["<|header_start|>"], *role.encode(), tiny.SPECIAL["<|header_end|>"]]
    return [*header, *b"\n\n", *content, tiny.EOT]


ASK = turn("assistant")[:-1]


def test_images_stand_before_the_text_of_a_prompt(pretrained):
    prompt = read(pretrained, prompt="ab", images=[tiny.picture(0), tiny.picture(1, wide=True)])
    assert prompt.tokens_T.tolist() == [tiny.BOS, *ONE_TILE, *TWO_TILES, *b"ab"]


def test_tiles_come_in_the_order_of_their_patch_tokens(pretrained):
    pictures = [tiny.picture(0), tiny.picture(1, wide=True)]
    row = read(pretrained, prompt="ab", images=pictures).row(pretrained.config)
    vision = pretrained.config.vision
    tiles = np.concatenate([preprocess(p, vision, 4).tiles_NCHW for p in pictures])
    np.testing.assert_array_equal(row.tiles_NCHW, tiles)
    assert row.tile_spans_N2.tolist() == [[3, 6], [9, 12], [14, 17], [20, 23]]
    assert all(row.tokens_T[first] == tiny.PATCH for first, _ in row.tile_spans_N2)


def test_an_image_is_a_path_bytes_or_a_picture(pretrained, tmp_path):
    picture, path, file = tiny.picture(0), tmp_path / "a.png", io.BytesIO()
    picture.save(path)
    picture.save(file, format="png")
    rows = [
        read(pretrained, prompt="a", images=[image]).row(pretrained.config)
        for image in (picture, path, str(path), file.getvalue())
    ]
    for row in rows[1:]:
        np.testing.assert_array_equal(row.tiles_NCHW, rows[0].tiles_NCHW)


def test_a_dialogue_ends_where_the_assistant_answers(pretrained):
    messages = [{"role": "user", "content": "q"}, Message("assistant", "A"), Message("user", "m")]
    wanted = [tiny.BOS, *turn("user", *b"q"), *turn("assistant", *b"A"), *turn("user", *b"m"), *ASK]
    assert read(pretrained, messages=messages).tokens_T.tolist() == wanted


def test_image_parts_take_the_images_in_order(pretrained):
    small, wide = tiny.picture(0), tiny.picture(1, wide=True)
    parts = [{"type": "text", "text": "x"}, {"type": "image"}, {"type": "image"}]
    prompt = read(pretrained, messages=[{"role": "user", "content": parts}], images=[wide, small])
    assert prompt.tokens_T.tolist() == [
        tiny.BOS,
        *turn("user", *b"x", *TWO_TILES, *ONE_TILE),
        *ASK,
    ]
    assert list(prompt.images) == [wide, small]


def test_an_image_part_with_a_source_of_its_own_takes_none(pretrained):
    own, given = tiny.picture(0), tiny.picture(1)
    messages = [Message("user", [Image(own), "and", Image()])]
    assert list(read(pretrained, messages=messages, images=[given]).images) == [own, given]


def test_images_without_a_part_stand_before_the_last_user_message(pretrained):
    messages = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    prompt = read(pretrained, messages=messages, images=[tiny.picture(0)])
    assert prompt.tokens_T.tolist() == [
        tiny.BOS,
        *turn("user", *b"a"),
        *turn("assistant", *b"b"),
        *turn("user", *ONE_TILE, *b"c"),
        *ASK,
    ]


def test_the_checkpoint_s_own_chat_template_is_used(pretrained):
    source = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}<|eot|>"
    template = ChatTemplate(source, {"bos_token": "<|begin_of_text|>"})
    own = dataclasses.replace(pretrained, chat_template=template)
    prompt = read(own, messages=[Message("user", "a<|eot|>")])
    assert prompt.tokens_T.tolist() == [tiny.BOS, *b"[a<|eot|>]", tiny.EOT]


def test_a_template_puts_images_where_it_writes_them(pretrained):
    template = ChatTemplate(CHAT_TEMPLATE, {"bos_token": "<|begin_of_text|>"})
    own = dataclasses.replace(pretrained, chat_template=template)
    request = {"messages": [Message("user", ["x", Image(), "y"])], "images": [tiny.picture(0)]}
    assert read(own, **request).tokens_T.tolist() == read(pretrained, **request).tokens_T.tolist()


def test_a_prompt_begins_with_no_token_where_the_model_has_none(pretrained):
    config = dataclasses.replace(pretrained.config, bos_id=None)
    bare = dataclasses.replace(pretrained, config=config)
    assert read(bare, prompt="ab").tokens_T.tolist() == [*b"ab"]
    with pytest.raises(RequestError, match="prompt is empty, and the model has no begin-of-text"):
        read(bare, prompt="")


@pytest.mark.parametrize("request_", [{"prompt": "a"}, {"messages": [Message("user", "a")]}])
def test_an_id_beyond_the_table_is_refused_whoever_made_it(pretrained, request_):
    class Foreign(type(pretrained.tokenizer)):
        def encode(self, *_, **__):
            return [352]

    foreign = copy.copy(pretrained.tokenizer)
    foreign.__class__ = Foreign
    with pytest.raises(RequestError, match=r"request 0: .* the id 352, but .* has 352 rows"):
        read(dataclasses.replace(pretrained, tokenizer=foreign), **request_)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"tokens": []}, "request 0: tokens is empty"),
        ({"tokens": [0, 352]}, r"request 0: token 1 \(352\) must lie in 0\.\.351"),
        ({"tokens": [-1]}, r"token 0 \(-1\)"),
        ({"tokens": [1.5]}, "whole numbers"),
        ({"tokens": [tiny.PATCH] * 3}, "the 0 images of the request fill 0 patch tokens, but 3"),
        (
            {"tokens": [tiny.PATCH] * 5, "images": [tiny.picture(0)]},
            "the 1 images of the request fill 4 patch tokens, but 5 of",
        ),
        ({"prompt": "a", "images": ["absent.png"]}, "request 0: image 'absent.png' cannot be read"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"content": "a"}]}, 'A message is an object with a "role"'),
        (
            {"messages": [Message("user", [Image()])], "images": [tiny.picture(0)] * 2},
            "1 image parts without a source, but 2 images",
        ),
        ({"messages": [Message("user", [Image()])]}, "1 image parts without a source, but 0"),
        (
            {"messages": [Message("system", "a")], "images": [tiny.picture(0)]},
            "none is from the user",
        ),
    ],
)
def test_a_request_that_cannot_be_read_is_refused(pretrained, request_, says):
    with pytest.raises(ValueError, match=says):
        read(pretrained, **request_)


def test_a_model_without_vision_takes_no_images_and_any_token(pretrained):
    text_only = dataclasses.replace(
        pretrained, config=dataclasses.replace(pretrained.config, vision=None)
    )
    with pytest.raises(ValueError, match="the model tiny reads no images"):
        read(text_only, prompt="a", images=[tiny.picture(0)])
    with pytest.raises(ValueError, match="the model tiny reads no images"):
        read(text_only, tokens=[1], images=[tiny.picture(0)])
    assert read(text_only, tokens=[tiny.PATCH]).tokens_T.tolist() == [tiny.PATCH]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({}, "found none of them"),
        ({"prompt": "a", "tokens": [1]}, "found prompt and tokens"),
        ({"prompt": 3}, "prompt must be a text, not int"),
        ({"prompt": "a", "images": "a.png"}, "images must be a list"),
    ],
)
def test_a_malformed_request_is_refused_at_once(wrong, says):
    with pytest.raises(ValueError, match=says):
        Request(**wrong)


@pytest.mark.parametrize(
    "given",
    [
        "ab",
        ["ab"],
        Request(prompt="ab"),
        {"prompt": "ab"},
        [{"prompt": "ab"}],
        (request for request in ["ab"]),
        {"tokens": [tiny.BOS, *b"ab"]},
        Request(tokens=np.array([tiny.BOS, *b"ab"])),
    ],
)
def test_a_request_is_given_in_many_ways(pretrained, given):
    (prompt,) = read_requests(pretrained, given)
    assert prompt.tokens_T.tolist() == [tiny.BOS, *b"ab"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["a", 3], "request 1: 3 is a int; give a text"),
        (3, "request 0: 3 is a int; give a text"),
        ([1, 2, 3], r"request 0: 1 is a int.*token ids go into Request\(tokens="),
        ([{"role": "user", "content": "a"}], r"request 0: a message .*Request\(messages="),
        ([Message("user", "a")], r"request 0: a message .*Request\(messages="),
        ({"text": "a"}, "request 0: unknown field 'text'; a request has prompt, messages, tokens"),
        (["a", {"prompt": 1}], "request 1: prompt must be a text"),
    ],
)
def test_what_is_no_request_says_what_to_write(pretrained, given, says):
    with pytest.raises(RequestError, match=says):
        read_requests(pretrained, given)


def test_a_value_quoted_in_an_error_is_cut(pretrained):
    with pytest.raises(RequestError) as caught:
        read_requests(pretrained, [{"x" * 100_000: 1}])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", ["array", "data URL"])
def test_an_image_is_an_array_or_a_data_url(pretrained, kind):
    picture = tiny.picture(0)
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    given = np.asarray(picture) if kind == "array" else url
    want = read(pretrained, prompt="a", images=[picture])
    got = read(pretrained, prompt="a", images=[given])
    assert got.tokens_T.tolist() == want.tokens_T.tolist()
    found, tiles = (prompt.row(pretrained.config).tiles_NCHW for prompt in (got, want))
    np.testing.assert_array_equal(found, tiles)


def test_special_tokens_are_typed_only_where_that_is_allowed(pretrained):
    typed, special = read_requests(
        pretrained,
        [Request(prompt="<|eot|>"), Request(prompt="<|eot|>", allow_special=True)],
    )
    assert typed.tokens_T.tolist() == [tiny.BOS, *b"<|eot|>"]
    assert special.tokens_T.tolist() == [tiny.BOS, tiny.EOT]


def test_an_answer_may_go_on_with_the_last_message(pretrained):
    messages = [Message("user", "q"), Message("assistant", "it is")]
    whole, final = read_requests(
        pretrained,
        [
            Request(messages=messages),
            Request(messages=messages, continue_final_message=True),
        ],
    )
    tokens = final.tokens_T.tolist()
    assert tokens[-5:] == [*b"it is"]
    assert whole.tokens_T.tolist()[: len(tokens)] == tokens
    with pytest.raises(ValueError, match="needs a last message of the assistant"):
        read_requests(pretrained, [Request(messages=messages[:1], continue_final_message=True)])
    with pytest.raises(ValueError, match="continue_final_message is for messages"):
        Request(prompt="a", continue_final_message=True)
