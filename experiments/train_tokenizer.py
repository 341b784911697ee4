"""Train the nano tokenizer on the Python standard library's sources.

    python -m experiments.train_tokenizer --output=nano

writes tokenizer.json and tokenizer_config.json. A few seconds on two cores; it prints the
digest of the texts and of the vocabulary. The vocabulary (2,048 rows):

    0     .. 255     single bytes
    256   .. 1919    merges, the most frequent first
    1920  .. 2047    special tokens; the first 93 in Llama 4's order (begin-of-text 1920,
                     end-of-text 1921, header 1925 and 1926, eom 1927, eot 1928, python 1936 and
                     1937, pad 1938, image start and end 2000 and 2001, tile separators 2004 and
                     2005, image 2010, patch 2012)

The same sources give the same bytes; another Python release has other sources.
"""

import hashlib
import json
import pathlib
import sysconfig
from collections.abc import Iterator

from absl import flags, logging

from experiments.flags import check_given, launch
from llama4_jax.text import special_tokens
from llama4_jax.text.native_template import CHAT_TEMPLATE
from llama4_jax.text.train_bpe import train_bpe

# Installed packages, tests of other things than Python, tables of numbers, generated files.
_SKIPPED_FOLDERS = ("site-packages", "test", "tests", "encodings", "lib2to3", "__pycache__")
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


def define_flags(values: flags.FlagValues) -> None:
    """Define this command's flags."""
    flags.DEFINE_string("output", None, "Folder that gets the two files.", flag_values=values)
    flags.DEFINE_integer(
        "vocab_size", 2048, "Rows of the vocabulary, special tokens included.", lower_bound=512,
        flag_values=values,
    )  # fmt: skip


def standard_library_texts(root: pathlib.Path) -> Iterator[str]:
    """Yield the UTF-8 sources below root in the order of their paths."""
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if any(part in _SKIPPED_FOLDERS or part.startswith(_SKIPPED_PREFIXES) for part in parts):
            continue
        try:
            yield path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            logging.info("skipped %s: not UTF-8", path.relative_to(root))


def tokenizer_config() -> dict:
    """Return what Hugging Face's AutoTokenizer reads beside tokenizer.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special_tokens.BOS,
        "eos_token": special_tokens.EOT,
        "pad_token": special_tokens.PAD,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }


def main(values: flags.FlagValues) -> None:
    """Train, write, report."""
    check_given(values, ("output",))
    texts = list(standard_library_texts(pathlib.Path(sysconfig.get_paths()["stdlib"])))
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    print(f"{len(texts)} files, {sum(map(len, texts))} characters, sha256 {digest}")
    tokenizer = train_bpe(texts, values.vocab_size)
    output = pathlib.Path(values.output)
    output.mkdir(parents=True, exist_ok=True)
    content = tokenizer.to_str(pretty=True) + "\n"
    (output / "tokenizer.json").write_text(content, encoding="utf-8")
    config = json.dumps(tokenizer_config(), indent=2, ensure_ascii=False) + "\n"
    (output / "tokenizer_config.json").write_text(config, encoding="utf-8")
    print(f"tokenizer.json sha256 {hashlib.sha256(content.encode()).hexdigest()}")
    count = sum(len(e.ids) for e in tokenizer.encode_batch(texts[:50], add_special_tokens=False))
    print(f"{sum(map(len, texts[:50])) / count:.2f} characters a token")


if __name__ == "__main__":
    launch(define_flags, main)
