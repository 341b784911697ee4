"""The special tokens have Llama 4's names and ids."""

import pytest

from llama4_jax.text import special_tokens
from tests.text.reference import meta_tokenizer

LLAMA4 = {name: 200_000 + i for i, name in enumerate(special_tokens.llama4_special_tokens())}
NANO = {name: 1_920 + i for i, name in enumerate(special_tokens.nano_special_tokens())}

IDS = {
    "<|begin_of_text|>": 200000,
    "<|end_of_text|>": 200001,
    "<|fim_prefix|>": 200002,
    "<|fim_middle|>": 200003,
    "<|fim_suffix|>": 200004,
    "<|header_start|>": 200005,
    "<|header_end|>": 200006,
    "<|eom|>": 200007,
    "<|eot|>": 200008,
    "<|step|>": 200009,
    "<|text_post_train_reserved_special_token_0|>": 200010,
    "<|text_post_train_reserved_special_token_5|>": 200015,
    "<|python_start|>": 200016,
    "<|python_end|>": 200017,
    "<|finetune_right_pad|>": 200018,
    "<|text_post_train_reserved_special_token_8|>": 200019,
    "<|text_post_train_reserved_special_token_68|>": 200079,
    "<|image_start|>": 200080,
    "<|image_end|>": 200081,
    "<|vision_reserved_special_token_1|>": 200083,
    "<|tile_x_separator|>": 200084,
    "<|tile_y_separator|>": 200085,
    "<|vision_reserved_special_token_5|>": 200089,
    "<|image|>": 200090,
    "<|vision_reserved_special_token_6|>": 200091,
    "<|patch|>": 200092,
    "<|vision_reserved_special_token_7|>": 200093,
    "<|vision_reserved_special_token_1047|>": 201133,
    "<|reasoning_reserved_special_token_0|>": 201134,
    "<|reasoning_thinking_start|>": 201142,
    "<|reasoning_thinking_end|>": 201143,
    "<|reserved_special_token_0|>": 201144,
    "<|reserved_special_token_903|>": 202047,
}


@pytest.mark.parametrize(("name", "token_id"), IDS.items())
def test_a_token_has_its_published_id(name, token_id):
    assert LLAMA4[name] == token_id


def test_there_are_2048_and_none_twice():
    assert len(special_tokens.llama4_special_tokens()) == len(LLAMA4) == 2048


def test_the_whole_map_is_that_of_metas_code():
    assert meta_tokenizer().special_tokens == LLAMA4


def test_nano_has_128_and_none_twice():
    assert len(special_tokens.nano_special_tokens()) == len(NANO) == 128


def test_nano_keeps_llama_4s_order_up_to_the_patch_token():
    shared = [name for name, token_id in LLAMA4.items() if token_id <= LLAMA4["<|patch|>"]]
    assert len(shared) == 93
    assert all(NANO[name] - 1_920 == LLAMA4[name] - 200_000 for name in shared)


def test_nano_has_no_name_of_its_own():
    assert set(NANO) <= set(LLAMA4)
