"""What a request may ask of its answer; the same fields in Python, in JSON lines and over HTTP."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llama4_jax.config.generation import GenerationDefaults
from llama4_jax.untrusted import shown

MAX_LOGPROBS = 20  # alternatives of a token that may be asked for
MAX_CHOICES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a request is answered. Rows of one batch may differ in all of it.

    A token is drawn in this order: logit_bias, penalties, grammar, temperature, top_k, top_p,
    min_p.

    Attributes:
      max_new_tokens: most tokens of the answer; 0 only to score a prompt.
      min_new_tokens: no stop token is drawn before so many.
      temperature: logits are divided by it; 0 takes the likeliest token. None, here and in top_p,
        top_k, min_p and repetition_penalty, takes the checkpoint's own.
      top_p: keep, in falling order of probability, the tokens before which at most this much
        probability lies; in (0, 1], 1 keeps all. The likeliest token is always kept.
      top_k: keep only this many likeliest tokens; 0 keeps all. It acts before top_p.
      min_p: keep only tokens at least this many times as likely as the likeliest.
      seed: of the draws; the same seed, request and place in the list draw the same.
      repetition_penalty: positive logits of tokens in the prompt or the answer are divided by it,
        negative ones multiplied.
      presence_penalty: is subtracted from the logits of tokens in the answer.
      frequency_penalty: is subtracted for every time that a token stands in the answer.
      logit_bias: is added to the logits of these tokens.
      stop: texts that end the answer, which then ends before them.
      include_stop: whether the text that ended the answer stays in it.
      stop_ids: tokens that end the answer, beside the checkpoint's own.
      ignore_eos: whether the checkpoint's own do not end it.
      n: answers to draw, each with draws of its own.
      logprobs: also give the log probability of every token, before temperature and the rest,
        and of so many likeliest tokens in its place; None gives none.
      prompt_logprobs: the same for the tokens of the prompt.
      regex: expression that the answer must match; of this and the next three at most one.
      json_schema: schema of the JSON that the answer must be, or True for any object.
      choices: texts of which the answer must be one.
      grammar: in Lark's notation, that the answer must follow.
      priority: the smaller, the sooner it is served.
      cache_salt: only requests of the same salt share what was computed for a common beginning.
      skip_special: whether special tokens are left out of the text.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int = 0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    stop: Sequence[str] = ()
    include_stop: bool = False
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    regex: str | None = None
    json_schema: Mapping[str, Any] | bool | None = None
    choices: Sequence[str] | None = None
    grammar: str | None = None
    priority: int = 0
    cache_salt: str = ""
    skip_special: bool = False

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            left_open = value is None and name in _MAY_BE_NONE
            if not left_open and not (_is_number(value) and low <= value <= high):
                raise ValueError(f"{name} ({shown(value)}) must lie in {low}..{high}.")
        for name in _WHOLE:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name} ({shown(value)}) must be a whole number.")
        for name in ("include_stop", "ignore_eos", "skip_special"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} ({shown(getattr(self, name))}) must be true or false.")
        if self.top_p == 0 or self.repetition_penalty == 0:
            raise ValueError("top_p and repetition_penalty must be above 0; 1 leaves them out.")
        if self.max_new_tokens == 0 and self.prompt_logprobs is None:
            raise ValueError("max_new_tokens (0) must be at least 1, except for prompt_logprobs.")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) must be at most max_new_tokens "
                f"({self.max_new_tokens})."
            )
        self._check_form()
        if not isinstance(self.cache_salt, str):
            raise ValueError(f"cache_salt ({shown(self.cache_salt)}) must be a text.")
        _check_ids("stop_ids", self.stop_ids)
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias ({shown(self.logit_bias)}) must map tokens to numbers.")
        _check_ids("logit_bias", self.logit_bias)
        for token, bias in self.logit_bias.items():
            if not _is_number(bias):
                raise ValueError(f"logit_bias of token {token} ({shown(bias)}) must be a number.")

    def _check_form(self) -> None:
        forms = ("regex", "json_schema", "choices", "grammar")
        given = [name for name in forms if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; an answer has one form.")
        if given and self.min_new_tokens:
            raise ValueError(f"min_new_tokens and {given[0]} exclude each other; the form decides.")
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} ({shown(value)}) must be a text.")
        for name, texts in (("stop", self.stop), ("choices", self.choices)):
            if texts is None and name == "choices":
                continue
            is_list = isinstance(texts, Sequence) and not isinstance(texts, str)
            if not is_list or not all(isinstance(text, str) and text for text in texts):
                raise ValueError(
                    f"{name} ({shown(texts)}) must be a list of texts, none of them empty."
                )
        if self.choices is not None and not self.choices:
            raise ValueError("choices ([]) must have at least one text.")
        if self.json_schema is False or not isinstance(self.json_schema, Mapping | bool | None):
            raise ValueError(f"json_schema ({shown(self.json_schema)}) must be a schema or true.")

    @property
    def has_form(self) -> bool:
        """Must the answer follow a grammar?"""
        forms = self.regex, self.json_schema, self.choices, self.grammar
        return any(form is not None for form in forms)

    def resolved(self, defaults: GenerationDefaults, vocab_size: int) -> "Options":
        """Fill in what a checkpoint decides.

        Raises:
          ValueError: a token is none of the vocabulary.
        """
        for name in ("stop_ids", "logit_bias"):
            for token in getattr(self, name):
                if not 0 <= token < vocab_size:
                    raise ValueError(
                        f"{name}: token {token} must lie in 0..{vocab_size - 1}, the vocabulary."
                    )
        own = () if self.ignore_eos else defaults.stop_ids
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        left: dict[str, Any] = {n: getattr(defaults, n) for n in names if getattr(self, n) is None}
        if "top_k" in left:
            left["top_k"] = left["top_k"] or 0
        return dataclasses.replace(
            self,
            **left,
            stop_ids=tuple(dict.fromkeys((*own, *self.stop_ids))),
            ignore_eos=True,
        )

    @property
    def changes_logits(self) -> bool:
        """Are logits of single tokens changed before a draw? Of resolved options."""
        assert self.repetition_penalty is not None
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1
        return any(penalties) or bool(self.logit_bias) or self.min_new_tokens > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Options):
    """Options that leave nothing to the checkpoint: without a temperature, the likeliest token."""

    temperature: float | None = 0.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    min_p: float | None = 0.0
    repetition_penalty: float | None = 1.0


_RANGES: tuple[tuple[str, Any, Any], ...] = (
    ("max_new_tokens", 0, 2**31 - 1),
    ("min_new_tokens", 0, 2**31 - 1),
    ("temperature", 0, float(np.finfo(np.float32).max)),
    ("top_p", 0, 1),
    ("top_k", 0, 2**31 - 1),
    ("min_p", 0, 1),
    ("seed", 0, 2**64 - 1),
    ("repetition_penalty", 0, 100),
    ("presence_penalty", -100, 100),
    ("frequency_penalty", -100, 100),
    ("n", 1, MAX_CHOICES),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
    ("priority", -(2**31), 2**31 - 1),
)
_MAY_BE_NONE = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logprobs", "prompt_logprobs",
)  # fmt: skip
_WHOLE = (
    "max_new_tokens", "min_new_tokens", "top_k", "seed", "n", "logprobs", "prompt_logprobs",
    "priority",
)  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _check_ids(name: str, ids: Any) -> None:
    is_list = isinstance(ids, Iterable) and not isinstance(ids, str)
    if not is_list or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ValueError(f"{name} ({shown(ids)}) must name tokens by their numbers.")
