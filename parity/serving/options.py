"""The options of a request: each is checked, and those that the API has but this server has not are refused by name."""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from parity.errors import InputError, printable
from parity.sampling import PromptOptions, check_options
from parity.serving.batch import MOST_TOP

MOST_ROWS = 128
"""Largest number of continuations of one request."""
MOST_STOPS = 16
LONGEST_STOP = 1000
"""Largest number of characters of a stop text."""
# Options of the API that this server lacks, with the values that mean the same as leaving them out.
LACKING: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "user": ("",),
    "verbosity": (),
    "web_search_options": (),
}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class OptionError(InputError):
    """An option of a request is wrong; `param` is its name."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The options that completions and chat completions have in common."""

    max_tokens: int | None
    """None if it was not given."""
    n: int
    seed: int
    """A random number if it was not given."""
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    """Whether the last event of a stream has the numbers of tokens."""
    rules: PromptOptions
    """temperature and the filters, as generate() has them."""


def check_names(body: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise OptionError for an option that this server does not have; its default value is the same as none."""
    for name, value in body.items():
        if name in known:
            continue
        if name not in LACKING:
            raise OptionError(
                f"unknown option {printable(repr(name), 80)}; the options are {', '.join(sorted(known))}",
                printable(name, 80),
            )
        if value is not None and not any(_is_same(value, default) for default in LACKING[name]):
            raise OptionError(f"this server does not have the option {name}; leave it out", name)


def _is_same(value: Any, default: Any) -> bool:
    return value == default and isinstance(value, bool) == isinstance(default, bool)


COMMON = ("model", "max_tokens", "n", "seed", "stop", "stream", "stream_options", *_SAMPLING)
"""Names of the options that `read_sampling` and the choice of the model read."""


def read_sampling(body: Mapping[str, Any], n_vocab: int, eos_id: int) -> Sampling:
    """Return the common options of a body, for a model with this vocabulary.

    Raises:
        OptionError: For a value of a wrong kind or out of range.
    """
    rules: dict[str, Any] = {"eos_id": eos_id}
    for name in _SAMPLING:
        value = body.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise OptionError(f"{name} must be a number, got {shown(value)}", name)
        try:
            check_options({name: value}, n_vocab)
        except InputError as error:
            raise OptionError(str(error), name) from None
        rules[name] = value
    seed = integer(body, "seed", 0, 2**63 - 1)
    stream_options = body.get("stream_options")
    stream = switch(body, "stream")
    include_usage = False
    if stream_options is not None:
        if not stream:
            raise OptionError("stream_options needs stream", "stream_options")
        if not isinstance(stream_options, dict):
            raise OptionError("stream_options must be an object", "stream_options")
        if unknown := stream_options.keys() - {"include_usage"}:
            name = printable(min(unknown), 80)
            raise OptionError(f"this server does not have the option stream_options.{name}; leave it out")
        include_usage = switch(stream_options, "include_usage")
    return Sampling(
        max_tokens=integer(body, "max_tokens", 0, 2**31 - 1),
        n=integer(body, "n", 1, MOST_ROWS) or 1,
        seed=secrets.randbelow(2**63) if seed is None else seed,
        stop=stop_texts(body.get("stop")),
        stream=stream,
        include_usage=include_usage,
        rules=PromptOptions(**rules),  # type: ignore[typeddict-item]
    )


def integer(body: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    """Return an integer option, or None if it was not given."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise OptionError(f"{name} must be an integer in {low}..{high}, got {shown(value)}", name)
    return value


def shown(value: Any) -> str:
    """Return a value for a message."""
    if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to write very large numbers
        return "a number of very many digits"
    return printable(repr(value), 60)


def top_count(body: Mapping[str, Any], name: str) -> int | None:
    """Return the number of most likely tokens that an option requests."""
    return integer(body, name, 0, MOST_TOP)


def switch(body: Mapping[str, Any], name: str) -> bool:
    """Return an option that is true or false; false if it was not given."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise OptionError(f"{name} must be true or false, got {shown(value)}", name)
    return bool(value)


def stop_texts(value: Any) -> tuple[str, ...]:
    """Return the texts of the option `stop`: a text, a list of texts, or None."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MOST_STOPS or not all(isinstance(text, str) for text in texts):
        raise OptionError(f"stop must be a text or a list of up to {MOST_STOPS} texts", "stop")
    if any(not 1 <= len(text) <= LONGEST_STOP for text in texts):
        raise OptionError(f"stop: each text needs 1..{LONGEST_STOP} characters", "stop")
    return tuple(texts)
