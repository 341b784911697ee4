"""The transformers side of `make bench-hf`; runs in the environment of the references.

    python bench_hf.py FOLDER THREADS STEPS

Writes a random checkpoint to FOLDER/hf and what transformers computes with it to FOLDER/hf.npz.
STEPS tokens are chosen after the first one.
Then reads requests from standard input, a JSON object a line, and answers each with one: the first
says the versions and which ways there are to run each item, the others are the seconds of so many
runs of one. It waits in between, without using the processors.
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import bench_case
import numpy as np
import torch
import transformers

DEFAULT = "eager"


def new_model() -> transformers.Llama4ForCausalLM:
    """Make a random model whose activations and logits have unit scale."""
    config = transformers.Llama4TextConfig(**bench_case.TEXT)
    model = transformers.Llama4ForCausalLM._from_config(config, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data = 1 + 0.2 * noise
        elif "embed_tokens" in name:
            parameter.data = noise
        else:  # matrices are [out, in], those of experts [expert, in, out]
            parameter.data = noise * parameter.shape[1] ** -0.5
    return model.eval()


class Model:
    """The model with its inputs, and every way to run them."""

    def __init__(self, model: transformers.Llama4ForCausalLM, steps: int):
        self.model, self.steps = model, steps
        self.ids = torch.from_numpy(bench_case.token_ids().astype(np.int64))
        self.x = torch.from_numpy(bench_case.layer_inputs())
        self.layer = model.model.layers[bench_case.LAYER].feed_forward
        self.tokens = [self.x[:, i : i + 1].contiguous() for i in range(steps)]

    def static_cache(self) -> transformers.StaticCache:
        """Return an empty cache with room for the prompt and the answer."""
        length = bench_case.LENGTH + self.steps + 1
        return transformers.StaticCache(config=self.model.config, max_cache_len=length)

    def read_prompt(self, model: Callable, cache: transformers.Cache | None):
        """Read the prompt; return the cache and the logits [1, V] that follow it."""
        out = model(self.ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1]

    def choose(self, model: Callable, cache: transformers.Cache, logits: torch.Tensor) -> Iterator:
        """Choose the likeliest token `steps` times; yield the logits that follow each."""
        for _ in range(self.steps):
            token = logits.argmax(-1, keepdim=True)
            logits = model(token, past_key_values=cache, use_cache=True).logits[:, -1]
            yield logits

    def answer(self, model: Callable, cache: transformers.Cache | None) -> float:
        """Return the seconds that the tokens after the first one take, the prompt left out."""
        cache, logits = self.read_prompt(model, cache)
        start = time.perf_counter()
        for following in self.choose(model, cache, logits):
            int(following.argmax())  # what a caller wants of each step
        return (time.perf_counter() - start) / self.steps

    def ways(self) -> dict[str, dict[str, Callable[[], float]]]:
        """Return functions by item and name, which run once and return seconds; `eager` first."""
        model = self.model
        compiled, compiled_layer = torch.compile(model), torch.compile(self.layer)

        def timed(run: Callable[[], object]) -> Callable[[], float]:
            def once() -> float:
                start = time.perf_counter()
                run()
                return time.perf_counter() - start

            return once

        def each_token(layer: Callable) -> Callable[[], float]:
            once = timed(lambda: [layer(x) for x in self.tokens])
            return lambda: once() / len(self.tokens)

        return {
            "layer, prompt": {
                DEFAULT: timed(lambda: self.layer(self.x)),
                "torch.compile": timed(lambda: compiled_layer(self.x)),
            },
            "layer, token": {
                DEFAULT: each_token(self.layer),
                "torch.compile": each_token(compiled_layer),
            },
            "model, all logits": {
                DEFAULT: timed(lambda: model(self.ids, use_cache=False)),
                "torch.compile": timed(lambda: compiled(self.ids, use_cache=False)),
            },
            "model, first token": {
                DEFAULT: timed(lambda: self.read_prompt(model, None)[1].argmax()),
                "static cache": timed(
                    lambda: self.read_prompt(model, self.static_cache())[1].argmax()
                ),
            },
            "model, more tokens": {
                DEFAULT: lambda: self.answer(model, None),
                "static cache": lambda: self.answer(model, self.static_cache()),
                "static cache, torch.compile": lambda: self.answer(compiled, self.static_cache()),
            },
        }

    def serve(self, batch: int, cache: str | None, count: int) -> float:
        """Return the seconds of the first mixed requests in batches, padded on the left."""
        requests = bench_case.mixed_requests()[:count]
        start = time.perf_counter()
        for first in range(0, len(requests), batch):
            rows = requests[first : first + batch]
            longest = max(len(prompt) for prompt, _ in rows)
            ids = torch.zeros((len(rows), longest), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, (prompt, _) in enumerate(rows):
                ids[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask[row, longest - len(prompt) :] = 1
            new = max(new for _, new in rows)
            more = {} if cache is None else {"cache_implementation": cache}
            self.model.generate(
                ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                pad_token_id=0, **more,
            )  # fmt: skip
        return time.perf_counter() - start

    def results(self) -> dict[str, np.ndarray]:
        """Compute what both sides are to agree on."""
        cache, logits = self.read_prompt(self.model, None)
        chosen = torch.stack([logits, *self.choose(self.model, cache, logits)])[:, 0]
        best = chosen.topk(2).values
        return {
            "layer": self.layer(self.x)[0].reshape(self.x.shape).numpy(),
            "logits": self.model(self.ids, use_cache=False).logits.numpy(),
            "tokens": chosen.argmax(-1).numpy(),
            "gaps": (best[:, 0] - best[:, 1]).numpy(),
        }


def main() -> None:
    """Write the checkpoint and the results, then measure what is asked."""
    folder, threads, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever prints must not spoil an answer
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with torch.inference_mode():
        model = Model(new_model(), steps)
        model.model.save_pretrained(folder / "hf")
        np.savez(folder / "hf.npz", **model.results())
        ways = model.ways()
        for line in sys.stdin:
            request = json.loads(line)
            if "batch" in request:
                try:
                    answer = {"seconds": [model.serve(**request)]}
                except Exception as error:  # noqa: BLE001, not every cache runs
                    answer = {"refused": str(error).splitlines()[0][:200]}
            elif "item" not in request:
                answer = {
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "ways": {item: list(named) for item, named in ways.items()},
                }
            else:
                run = ways[request["item"]][request["way"]]
                try:
                    answer = {"seconds": [run() for _ in range(request["runs"])]}
                except Exception as error:  # noqa: BLE001, whatever the compiler lacks here
                    answer = {"refused": str(error).splitlines()[0][:200]}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
