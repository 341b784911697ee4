"""Make nano_tokenizer.json: what Hugging Face transformers does with nano's tokenizer.

    python tests/golden/make_nano_tokenizer.py

Made with transformers 5.23.0, tokenizers 0.23.3; needs no torch.
"""

import json
import pathlib
import sys

import transformers

HERE = pathlib.Path(__file__).parent
NANO = HERE.parents[1] / "llama4_jax/nano"

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "The digit is 7.",
    "  leading and trailing  \n\n\t",
    "don't DON'T camelCase HTTPServer 1234567",
    "https://docs.python.org/3/library/os.html\r\n",
    "Grüße, 你好，世界 🙂 e\u0301",
    "<|begin_of_text|><|header_start|>user<|header_end|>\n\nhi<|eot|>",
    "<|image_start|><|image|><|patch|><|image_end|> <|unknown|> <|eot",
    "\x00\x7f\u00a0\u2028\ufeff",
    "",
]
DIALOGUES = [
    [{"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 + 2?"},
    ],
    [
        {"role": "user", "content": "The weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "type": "function",
                    "function": {
                        "name": "weather",
                        "arguments": {"city": 'Paris "75"', "days": 2, "deep": {"a": [None, True]}},
                    },
                },
                {"type": "function", "function": {"name": "now", "arguments": {}}},
                {
                    "type": "function",
                    "function": {"name": "brave_search", "arguments": {"query": "Paris"}},
                },
                {
                    "type": "function",
                    "function": {"name": "code_interpreter", "arguments": {"code": "1 + 1"}},
                },
            ],
        },
        {"role": "tool", "content": "sunny"},
        {"role": "ipython", "content": {"time": "12:00"}},
    ],
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says what the weather is – anywhere.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def main() -> None:
    """Write the golden file."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(NANO))
    value = {
        "made_by": "tests/golden/make_nano_tokenizer.py",
        "versions": {"transformers": transformers.__version__, "python": sys.version.split()[0]},
        "vocab_size": len(tokenizer),
        "bos_id": tokenizer.bos_token_id,
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
        "texts": [text_case(tokenizer, text) for text in TEXTS],
        "ids": [ids_case(tokenizer, ids) for ids in id_lists(tokenizer)],
        "dialogues": [
            dialogue_case(tokenizer, dialogue, tools)
            for dialogue in DIALOGUES
            for tools in (None, TOOLS)
        ],
    }
    path = HERE / "nano_tokenizer.json"
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    print(f"{path.name}: {path.stat().st_size} bytes")


def text_case(tokenizer, text: str) -> dict:
    """Encode a text with and without special tokens in it."""
    plain = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    special = tokenizer.encode(text, add_special_tokens=False)
    with_bos = tokenizer.encode(text)
    assert with_bos == [tokenizer.bos_token_id, *special]
    return {"text": text, "plain": plain, "special": special}


def id_lists(tokenizer) -> list[list[int]]:
    """Make lists of ids: texts, broken characters, special tokens."""
    bird = tokenizer.encode("🐦 tweets 你", add_special_tokens=False)
    return [bird, bird[1:], bird[:2], [1920, *bird, 1928, 2012], list(range(0, 2048, 17))]


def ids_case(tokenizer, ids: list[int]) -> dict:
    """Decode ids with and without special tokens."""
    text = tokenizer.decode(ids)
    without = tokenizer.decode(ids, skip_special_tokens=True)
    return {"ids": ids, "text": text, "without_special": without}


def dialogue_case(tokenizer, messages: list[dict], tools: list[dict] | None) -> dict:
    """Render a dialogue with nano's own template."""
    settings = {"tools": tools, "add_generation_prompt": True}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return {"messages": messages, "tools": tools, "text": text, "ids": ids}


if __name__ == "__main__":
    main()
