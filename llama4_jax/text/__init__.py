"""Text for Llama 4: tokenizers, the dialogue format, tool calls, chat templates.

    tokenizer = load_tokenizer(folder)
    ids = render([Message("user", "Hello")], tokenizer)
    reply = parse(new_ids, tokenizer)

Nothing here needs an array library.
"""

from llama4_jax.text.chat import parse, render
from llama4_jax.text.hf_tokenizer import HFTokenizer
from llama4_jax.text.messages import (
    Image,
    Message,
    ToolCall,
    images_of,
    message_from_dict,
    message_to_dict,
)
from llama4_jax.text.native_template import CHAT_TEMPLATE
from llama4_jax.text.stream import StreamDecoder
from llama4_jax.text.template import ChatTemplate, load_chat_template
from llama4_jax.text.tiktoken_tokenizer import TiktokenTokenizer
from llama4_jax.text.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Tokenizer",
    "TiktokenTokenizer",
    "HFTokenizer",
    "load_tokenizer",
    "StreamDecoder",
    "Image",
    "Message",
    "ToolCall",
    "images_of",
    "message_from_dict",
    "message_to_dict",
    "render",
    "parse",
    "ChatTemplate",
    "load_chat_template",
    "CHAT_TEMPLATE",
]
