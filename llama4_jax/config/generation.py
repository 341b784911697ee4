"""How a checkpoint wants to be sampled: generation_config.json."""

import dataclasses
import pathlib
import warnings
from typing import Any

from llama4_jax.config.json_section import Section
from llama4_jax.config.model import ModelConfig
from llama4_jax.untrusted import load_json, shown

_NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
}
"""Keys that would change what is drawn, and the values that change nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """How a checkpoint wants to be sampled, when the caller does not say.

    Attributes:
      temperature: 0 is greedy.
      top_p: 1 keeps every token.
      top_k: None keeps every token.
      min_p: 0 keeps every token.
      repetition_penalty: 1 leaves repeated tokens as they are.
      stop_ids: tokens that end an answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()


def read_generation(path: pathlib.Path, config: ModelConfig) -> GenerationDefaults:
    """Read generation_config.json; without `do_sample` its numbers of draws do not apply.

    A key that would change what is drawn and that nothing here applies is warned of.

    Args:
      path: of the file; without one, a model stops at the ids of its own config.
      config: of the model.

    Raises:
      ValueError: a value is out of range, or an id is none of the model's.
    """
    if not path.is_file():
        return GenerationDefaults(stop_ids=config.eos_ids)
    values = Section(load_json(path), str(path))
    for key, neutral in _NOT_APPLIED.items():
        if key in values and values.get(key) not in neutral:
            warnings.warn(f"{path}: {key} ({shown(values.get(key))}) is not applied", stacklevel=2)
    drawn: dict[str, Any] = {
        "temperature": _within(values, "temperature", 1.0, 0, 1e30),
        "top_p": _within(values, "top_p", 1.0, 1e-30, 1),
        "top_k": values.integer("top_k", None) or None,
        "min_p": _within(values, "min_p", 0.0, 0, 1),
    }
    return GenerationDefaults(
        stop_ids=_stop_ids(values, config),
        repetition_penalty=_within(values, "repetition_penalty", 1.0, 1e-30, 100),
        **(drawn if values.flag("do_sample", default=False) else {}),
    )


def _within(values: Section, key: str, default: float, low: float, high: float) -> float:
    number = values.number(key, default)
    if not low <= number <= high:
        raise values.fail(key, f"{'above 0' if low else 'at least 0'} and at most {high:g}")
    return number


def _stop_ids(values: Section, config: ModelConfig) -> tuple[int, ...]:
    """Return the ids that end an answer: null are none, absent those of the model's config."""
    key, last = "eos_token_id", config.text.vocab_size - 1
    if key not in values.values:
        return config.eos_ids
    found = values.get(key, [])
    ids = found if isinstance(found, list) else [found]
    if not all(type(i) is int and 0 <= i <= last for i in ids):
        raise values.fail(key, f"a token id from 0 to {last}, or a list of them")
    return tuple(ids)
