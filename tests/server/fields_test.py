"""The page of fields lists what the server reads, and nothing else."""

import re

from llama4_jax.server import fields
from llama4_jax.server.chat import read_chat
from llama4_jax.server.completions import read_completion
from tests.house import tree

PAGE = (tree.ROOT / "llama4_jax/server/README.md").read_text("utf-8")


def listed(heading: str) -> set[str]:
    """Return the fields in the first column of a table of the page."""
    table = PAGE.partition(f"| {heading} |")[2].partition("\n\n")[0]
    return {
        name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }


def read_by(read, **body) -> set[str]:
    found = fields.Fields(body)
    read(found)
    return {name for name in found._read if name not in fields.IGNORED} | {"model"}


def test_the_page_lists_every_field():
    chat = read_by(read_chat, messages=[{"role": "user", "content": "a"}])
    completion = read_by(read_completion, prompt="a")
    both = listed("honoured in chats and completions")
    assert chat | {"top_logprobs"} == both | listed("honoured in chats alone")
    assert completion == both | listed("honoured in completions alone")
    assert listed("ignored") == set(fields.IGNORED)
    assert listed("refused with 400") == set(fields.REFUSED)
