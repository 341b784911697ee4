"""The transformers side of `make parity`; runs in the environment of the references.

    python hf.py make FOLDER     write random checkpoints and what transformers computes with them
    python hf.py reload FOLDER   load the checkpoints that we wrote beside them, and compute again

Every case has its own folder: `hf/` is transformers' checkpoint, `ours/` our copy of it, and
`hf.npz` and `ours.npz` are what transformers computes with either.
"""

import pathlib
import sys

import cases
import numpy as np
import torch
import transformers
from cases import Case

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def new_model(case: Case) -> transformers.PreTrainedModel:
    """Make a random float32 model whose logits have unit scale and whose norms are not one."""
    text = cases.TEXT | case.text
    if case.has_vision:
        config = transformers.Llama4Config(
            text_config=text,
            vision_config=cases.VISION,
            image_token_index=cases.PATCH,
            boi_token_index=cases.IMAGE_START,
            eoi_token_index=cases.IMAGE_END,
        )
        model = transformers.Llama4ForConditionalGeneration._from_config(config)
    else:
        config = transformers.Llama4TextConfig(**text)
        model = transformers.Llama4ForCausalLM._from_config(config)
    generator = torch.Generator().manual_seed(cases.seed(case))
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm_scale = "norm" in name and name.endswith("weight")
        parameter.data = 1 + 0.2 * noise if is_norm_scale else 0.12 * noise
    return model


def load(folder: pathlib.Path, case: Case) -> transformers.PreTrainedModel:
    """Load a checkpoint folder with transformers; the softmax of sdpa is float32 in any dtype."""
    kind = transformers.Llama4ForCausalLM
    if case.has_vision:
        kind = transformers.Llama4ForConditionalGeneration
    model, report = kind.from_pretrained(
        folder, dtype=DTYPES[case.dtype], attn_implementation="sdpa", output_loading_info=True
    )
    problems = {name: found for name, found in report.items() if found}
    if problems:
        raise ValueError(f"transformers loads {folder} with {problems}")
    return model.eval()


def logits(model: transformers.PreTrainedModel, case: Case) -> np.ndarray:
    """Run the whole batch at once."""
    inputs = {"input_ids": torch.from_numpy(cases.token_ids(case).astype(np.int64))}
    if case.has_vision:
        inputs["pixel_values"] = torch.from_numpy(cases.tiles(case)).to(DTYPES[case.dtype])
    with torch.no_grad():
        return cases.kept(case, model(**inputs, use_cache=False).logits.float().numpy())


def logits_in_pieces(
    model: transformers.PreTrainedModel, case: Case, split: tuple[int, ...]
) -> np.ndarray:
    """Run the batch in pieces with transformers' cache; images go in with the first piece."""
    ids = torch.from_numpy(cases.token_ids(case).astype(np.int64))
    extra = {"pixel_values": torch.from_numpy(cases.tiles(case))} if case.has_vision else {}
    cache, pieces = None, []
    with torch.no_grad():
        for piece in torch.split(ids, list(split), dim=1):
            out = model(input_ids=piece, past_key_values=cache, use_cache=True, **extra)
            cache, extra = out.past_key_values, {}
            pieces.append(out.logits.float().numpy())
    return np.concatenate(pieces, axis=1)


def make(folder: pathlib.Path, case: Case) -> None:
    """Write a checkpoint, the logits of the batch, and those of the same batch in pieces."""
    checkpoint = folder / "hf"
    new_model(case).save_pretrained(checkpoint)
    model = load(checkpoint, case)
    if case.dtype != "float32":
        model.save_pretrained(checkpoint)
    arrays = {"logits": logits(model, case)}
    for i, split in enumerate(case.splits):
        arrays[f"split_{i}"] = logits_in_pieces(model, case, split)
    np.savez(folder / "hf.npz", **arrays)


def reload(folder: pathlib.Path, case: Case) -> None:
    """Write the logits that transformers computes with the checkpoint that we wrote."""
    np.savez(folder / "ours.npz", logits=logits(load(folder / "ours", case), case))


def main() -> None:
    """Run one step for every case."""
    step = {"make": make, "reload": reload}[sys.argv[1]]
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for case in cases.CASES:
        folder = pathlib.Path(sys.argv[2]) / cases.folder_name(case)
        if folder.is_dir():
            step(folder, case)


if __name__ == "__main__":
    main()
