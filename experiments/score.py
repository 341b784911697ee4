"""Score texts with a Llama 4 checkpoint: the log probability of every token given those before it.

    python -m experiments.score --checkpoint=nano --input=F.jsonl --output=G.jsonl

A request is one line, {"text": TEXT} or {"tokens": [IDS]}, with "images": [PATHS] where there are
any: they stand before a text, and fill the patch tokens among ids. A text begins with the
begin-of-text token. A score is one line, in the order of the requests: {"tokens": [IDS],
"logprobs": [one for each token after the first, natural logarithm], "nll": minus their sum}.
"""

from dataclasses import asdict

from absl import flags

from experiments import flags as shared
from experiments.jsonl import LineWriter, naming_lines
from experiments.terminal import print_line
from llama4_jax.text import load_tokenizer

FIELDS = {"text": "prompt", "tokens": "tokens", "images": "images"}


def define_flags(values: flags.FlagValues) -> None:
    """Define every flag of this command."""
    shared.define_model_flags(values)
    shared.define_file_flags(values)
    shared.define_engine_flags(values)


def main(values: flags.FlagValues) -> None:
    """Check the flags, load the checkpoint, score."""
    from llama4_jax.serve import score

    folder = shared.check_checkpoint(values)
    shared.check_one_of(values, ("input",))
    shared.check_output(values)
    config = shared.engine_config(values)
    requests = shared.read_requests(values.input, FIELDS)
    if load_tokenizer(folder) is None and any(r.tokens is None for r in requests):
        raise shared.FlagError(f'{folder} has no tokenizer; give lines of "tokens", not "text".')
    pretrained = shared.load_model(values)
    with naming_lines(values.input):
        if values.output is None:
            write = print_line
            score(pretrained, requests, on_score=lambda s: write(asdict(s)), config=config)
            return
        with LineWriter(values.output, len(requests)) as lines:
            write = lines.write
            score(pretrained, requests, on_score=lambda s: write(asdict(s)), config=config)


if __name__ == "__main__":
    shared.launch(define_flags, main)
