"""Continue a prompt, answer a file of requests, or talk, with a Llama 4 checkpoint.

    python -m experiments.generate --checkpoint=nano --prompt="def add(a, b):"
    python -m experiments.generate --checkpoint=nano --prompt="A digit:" --image=digit.png
    python -m experiments.generate --checkpoint=DIR --input=F.jsonl --output=G.jsonl
    python -m experiments.generate --checkpoint=DIR --chat --mesh=expert:4,tensor:2

A request is one line, {"prompt": TEXT} or {"messages": [{"role": .., "content": ..}, ..]} or
{"tokens": [IDS]}, with "images": [PATHS] where there are any: they stand before the text of a
prompt, take the image parts of messages (or stand before the last user message), or fill the
patch tokens among the ids. An answer is one line, in the order of the requests:
{"tokens": [new IDS], "text": TEXT, "finish_reason": "stop" or "length"}; text lacks the stop token,
and is absent for a checkpoint without a tokenizer, which serves {"tokens": ..} only.

--chat reads what you say line by line, until the input ends or you say /exit.
"""

import dataclasses
from typing import Any

from absl import flags

from experiments import flags as shared
from experiments.jsonl import LineWriter, naming_lines
from experiments.terminal import print_line, show, talk
from llama4_jax.serve import Answer, Request, default_sampling, generate
from llama4_jax.text import load_tokenizer

FIELDS = {name: name for name in ("prompt", "messages", "tokens", "images")}


def define_flags(values: flags.FlagValues) -> None:
    """Define every flag of this command."""
    shared.define_model_flags(values)
    flags.DEFINE_string("prompt", None, "A text to continue.", flag_values=values)
    flags.DEFINE_bool("chat", False, "Talk with the model.", flag_values=values)
    flags.DEFINE_multi_string(
        "image", [], "A picture that stands before the prompt or the first thing you say; may be "
        "repeated.", flag_values=values,
    )  # fmt: skip
    shared.define_file_flags(values)
    shared.define_sampling_flags(values)


def main(values: flags.FlagValues) -> None:
    """Check the flags, load the checkpoint, answer."""
    requests = check_flags(values)
    chosen = shared.check_sampling(values)
    pretrained = shared.load_model(values)
    sampling = dataclasses.replace(default_sampling(pretrained), **chosen)
    settings = {"sampling": sampling, "max_new_tokens": values.max_new_tokens}
    if values.chat:
        talk(pretrained, values.image, **settings)
        return
    if values.prompt is not None:
        settings["on_token"] = show
    with naming_lines(values.input):
        if values.output is not None:
            with LineWriter(values.output) as lines:
                write = lines.write
                generate(pretrained, requests, on_answer=lambda a: write(to_line(a)), **settings)
        elif values.prompt is not None:
            generate(pretrained, requests, **settings)
        else:
            generate(pretrained, requests, on_answer=lambda a: print_line(to_line(a)), **settings)
    if values.prompt is not None:
        print()


def check_flags(values: flags.FlagValues) -> list[Request]:
    """Return the requests; none for --chat, which reads them as it goes.

    Raises:
      FlagError: the flags are contradictory or out of range.
    """
    folder = shared.check_checkpoint(values)
    source = shared.check_one_of(values, ("prompt", "input", "chat"))
    if values.image and source == "input":
        raise shared.FlagError('--image and --input exclude each other; a line has "images".')
    if values.output is not None and source == "chat":
        raise shared.FlagError("--output and --chat exclude each other.")
    shared.check_images(values.image)
    shared.check_output(values)
    if source == "input":
        return shared.read_requests(values.input, FIELDS)
    if load_tokenizer(folder) is None:
        raise shared.FlagError(f'{folder} has no tokenizer; give --input with lines of "tokens".')
    return [] if source == "chat" else [Request(prompt=values.prompt, images=values.image)]


def to_line(answer: Answer) -> dict[str, Any]:
    """Return an answer as an object of JSON, without a text if it has none."""
    fields = dataclasses.asdict(answer)
    return fields if answer.text is not None else {k: v for k, v in fields.items() if k != "text"}


if __name__ == "__main__":
    shared.launch(define_flags, main)
