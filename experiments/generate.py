"""Continue a prompt, answer a file of requests, or talk, with a Llama 4 checkpoint.

    python -m experiments.generate --checkpoint=nano --prompt="def add(a, b):"
    python -m experiments.generate --checkpoint=nano --prompt="A digit:" --image=digit.png
    python -m experiments.generate --checkpoint=DIR --input=F.jsonl --output=G.jsonl
    python -m experiments.generate --checkpoint=DIR --chat --mesh=expert:4,tensor:2

A request is one line, {"prompt": TEXT} or {"messages": [{"role": .., "content": ..}, ..]} or
{"tokens": [IDS]}, with "images": [PATHS] where there are any: they stand before the text of a
prompt, take the image parts of messages (or stand before the last user message), or fill the
patch tokens among the ids; and with any field of `llama4_jax.Options`, such as "n", "stop", "min_p"
or "logprobs", in place of what the flags say. An answer is one line, in the order of the requests:
{"tokens": [new IDS], "text": TEXT, "finish_reason": "stop" or "length"}; text lacks the stop token,
and is absent for a checkpoint without a tokenizer, which serves {"tokens": ..} only.

--chat reads what you say line by line, until the input ends or you say /exit.
"""

from typing import TYPE_CHECKING, Any

from absl import flags

from experiments import flags as shared
from experiments.jsonl import LineWriter, naming_lines
from experiments.terminal import Waiting, print_line, show_after, talk
from llama4_jax.text import load_tokenizer

if TYPE_CHECKING:
    from llama4_jax.serve import Answer, Options, Request, TokenLogprobs

FIELDS = {
    name: name
    for name in (
        "prompt", "messages", "tokens", "images", "continue_final_message", "allow_special",
    )
}  # fmt: skip


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
    shared.define_option_flags(values)
    shared.define_engine_flags(values)


def main(values: flags.FlagValues) -> None:
    """Check the flags, load the checkpoint, answer."""
    from llama4_jax.serve import generate

    options, config = shared.check_options(values), shared.engine_config(values)
    requests = check_flags(values, options)
    pretrained = shared.load_model(values)
    settings: dict[str, Any] = {"options": options, "config": config}
    if values.chat:
        talk(pretrained, values.image, **settings)
        return
    if values.prompt is not None:
        settings["on_token"] = show_after(Waiting())
    with naming_lines(values.input):
        if values.output is not None:
            with LineWriter(values.output, len(requests)) as lines:
                write = lines.write
                generate(pretrained, requests, on_answer=lambda a: write(to_line(a)), **settings)
        elif values.prompt is not None:
            generate(pretrained, requests, **settings)
        else:
            generate(pretrained, requests, on_answer=lambda a: print_line(to_line(a)), **settings)
    if values.prompt is not None:
        print()


def check_flags(values: flags.FlagValues, options: "Options") -> "list[Request]":
    """Return the requests; none for --chat, which reads them as it goes.

    Raises:
      FlagError: the flags are contradictory or out of range.
    """
    from llama4_jax.serve import Request

    folder = shared.check_checkpoint(values)
    source = shared.check_one_of(values, ("prompt", "input", "chat"))
    if values.image and source == "input":
        raise shared.FlagError('--image and --input exclude each other; a line has "images".')
    if values.output is not None and source == "chat":
        raise shared.FlagError("--output and --chat exclude each other.")
    shared.check_images(values.image)
    shared.check_output(values)
    if source == "input":
        return shared.read_requests(values.input, FIELDS, options)
    if load_tokenizer(folder) is None:
        raise shared.FlagError(f'{folder} has no tokenizer; give --input with lines of "tokens".')
    return [] if source == "chat" else [Request(prompt=values.prompt, images=values.image)]


def to_line(answer: "Answer") -> dict[str, Any]:
    """Return an answer as an object of JSON, without what it does not have."""
    line: dict[str, Any] = {"tokens": answer.tokens}
    if answer.text is not None:
        line["text"] = answer.text
    line["finish_reason"] = answer.finish_reason
    for name in ("logprobs", "prompt_logprobs"):
        found: list[TokenLogprobs] | None = getattr(answer, name)
        if found is not None:
            line[name] = [each._asdict() for each in found]
    if answer.others:
        line["others"] = [to_line(other) for other in answer.others]
    return line


if __name__ == "__main__":
    shared.launch(define_flags, main)
