"""The options of generation, and the rules from logits to a token that both backends follow.

The rules apply in this order (tests/support/numpy_oracle.py implements them in float64). Each keeps the tokens that
Hugging Face's logits processor of that name keeps; of tokens that tie at a limit, all are kept:

1. repetition_penalty (Keskar et al. 2019): the logits of tokens that are already in the row, prompt included, are
   divided by it where positive and multiplied by it where negative.
2. temperature 0 (greedy): the token with the largest logit; ties go to the lowest id. Otherwise:
3. top_k: keep logits that are not below the k-th largest. Divide by the temperature; softmax.
4. top_p (Holtzman et al. 2020): of what is left, keep tokens while the more probable ones together have less
   than top_p, so the token that reaches top_p is kept.
5. min_p (Nguyen et al. 2024): keep tokens at least min_p times as probable as the most probable one.
6. Inverse CDF over the kept tokens in order of id: the first token whose cumulative mass exceeds u * total, or the
   last kept token if rounding leaves none. u is the random number of (seed, row, position); see uniforms().
"""

import hashlib
import math
import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np

from parity.errors import InputError

_SMALLEST = 2.0**-126  # the smallest normal float32: smaller numbers can become 0 in float32 arithmetic
MOST_SAMPLES = 2**16
"""Largest number of continuations of a prompt in one call."""

_NUMBERS_PER_BLOCK = 8  # 32-bit numbers that Philox produces per value of its counter


class SamplingOptions(TypedDict, total=False):
    """Options of all prompts of a call, or of one prompt in `per_prompt`. None means the default."""

    temperature: float | None
    """Divides the logits; 0 is greedy, and a tiny value is nearly greedy. Default 1.0, or 0 for an array of prompts."""
    top_k: int | None
    """Sample from the top_k most probable tokens only, in 1..n_vocab. Default: all tokens."""
    top_p: float | None
    """Sample from the fewest most probable tokens that together have probability top_p, in (0, 1]. Default: all."""
    min_p: float | None
    """Sample from tokens at least min_p times as probable as the most probable one, in [0, 1]. Default: all."""
    repetition_penalty: float | None
    """Above 1, makes tokens that are already in the row less probable; in [0.001, 1000]. Default 1: no change."""
    eos_id: int | None
    """Id of the end-of-text token, with which a row ends. Default: no token ends a row."""
    stop: Sequence[Sequence[int]] | None
    """Sequences of ids. A row ends when its new tokens end with any of them. Default: none."""
    seed: int | None
    """Seed of the random numbers, in 0..2**64-1. Default 0."""


class PromptOptions(SamplingOptions, total=False):
    """Options of one prompt, which replace those given for all prompts."""

    max_new_tokens: int | None
    """Largest number of new tokens of this prompt, at least 1. Default: that of the call."""
    row: int | str | None
    """Row of the random numbers: a number in 0..2**64-1, or a text such as a request's id, which is hashed (SHA-256)
    to one. Default: the place in the batch. A prompt with its own row gets the same tokens in every batch."""


class GenerateOptions(SamplingOptions, total=False):
    """Options of generate() and stream() in both backends."""

    context_size: int | None
    """Largest number of tokens that the model attends to, in 1..n_ctx; longer prompts are cropped from the left.
    Default: n_ctx, and longer prompts are an error."""
    overflow: Literal["crop", "stop"]
    """When a row fills the context: "crop" (default) continues from its last context_size tokens, all recomputed for
    each new token, as in the notebook; "stop" ends the row."""
    samples: int
    """Number of continuations of each prompt, in 1..65536; they are adjacent rows of the result. Default 1."""
    first_row: int
    """Row of the random numbers of the first prompt, in 0..2**32-1, to generate a list of prompts in parts. Default 0.
    Continuation j of prompt i has row first_row + i * samples + j."""
    per_prompt: Sequence[PromptOptions] | None
    """Options for each prompt, one dict (which may be empty) per prompt. Default: all prompts share the options."""


class RowOptions(NamedTuple):
    """The sampling options of each row, arrays [B]. An option that is off has a value without effect."""

    greedy: Any
    """bool"""
    temperature: Any
    """float, positive (1 in greedy rows)"""
    top_k: Any
    """int32, n_vocab where off"""
    top_p: Any
    """float, infinity where off"""
    min_p: Any
    """float, 0 where off"""
    repetition_penalty: Any
    """float, 1 where off"""


class ActiveRules(NamedTuple):
    """Which rules at least one row uses. A compiled program contains only these; their values are inputs."""

    sampled: bool
    """Whether a row is not greedy."""
    top_k: bool
    """Whether a row limits the number of tokens."""
    top_p: bool
    """Whether a row limits the sum of the probabilities."""
    min_p: bool
    """Whether a row limits the relative probability."""
    repetition_penalty: bool
    """Whether a row changes the logits of tokens that it contains."""


def check_options(options: Mapping[str, Any], n_vocab: int, where: str = "") -> dict[str, Any]:
    """Check the options of one prompt, and fill in those that are off or not given.

    Args:
        options: PromptOptions without values that are None.
        n_vocab: Size of the vocabulary.
        where: Beginning of each error message.

    Returns:
        The fields of RowOptions for this prompt, and its eos_id (or None), stop, seed, row and max_new_tokens.

    Raises:
        InputError: For a value that is out of range; the message names the option.
    """
    temperature = number(options, "temperature", 1.0, 0, sys.float_info.max, "0 (greedy) or positive", where)
    top_p = number(options, "top_p", 1.0, math.ulp(0.0), 1, "in (0, 1]", where)
    eos_id = integer(options, "eos_id", -1, 0, n_vocab - 1, "; it must be in the vocabulary", where)
    row = options.get("row", 0)
    if isinstance(row, str):
        row = int.from_bytes(hashlib.sha256(row.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return {
        "greedy": temperature == 0,
        "temperature": 1.0 if temperature == 0 else min(max(temperature, _SMALLEST), 1 / _SMALLEST),
        "top_k": integer(options, "top_k", n_vocab, 1, n_vocab, "; leave it out to keep all tokens", where),
        "top_p": math.inf if top_p == 1 else max(top_p, _SMALLEST),
        "min_p": number(options, "min_p", 0.0, 0, 1, "in [0, 1]", where),
        "repetition_penalty": number(
            options, "repetition_penalty", 1.0, 1e-3, 1e3, "in [0.001, 1000] (1 changes nothing)", where
        ),
        "eos_id": None if eos_id < 0 else eos_id,
        "stop": _check_stops(options.get("stop", ()), n_vocab, where),
        "seed": integer(options, "seed", 0, 0, 2**64 - 1, "", where),
        "row": integer({"row": row}, "row", 0, 0, 2**64 - 1, "; or it is a text", where),
        "max_new_tokens": integer(options, "max_new_tokens", 1, 1, 2**31 - 1, "", where),
    }


def row_options(checked: Sequence[Mapping[str, Any]], n_vocab: int) -> tuple[RowOptions, ActiveRules]:
    """Return the options of all rows as arrays, with the rules that they need.

    Args:
        checked: The result of check_options() for each row.
        n_vocab: Size of the vocabulary.
    """
    dtypes = {"greedy": bool, "top_k": np.int32}
    rows = RowOptions(
        *(np.array([row[name] for row in checked], dtypes.get(name, np.float64)) for name in RowOptions._fields)
    )
    return rows, ActiveRules(
        sampled=not rows.greedy.all(),
        top_k=bool((rows.top_k < n_vocab).any()),
        top_p=bool((rows.top_p < 1).any()),
        min_p=bool((rows.min_p > 0).any()),
        repetition_penalty=bool((rows.repetition_penalty != 1).any()),
    )


def seen_tokens(prompts: Sequence[Sequence[int]], n_vocab: int) -> np.ndarray:
    """Return which tokens are in each prompt, for the repetition penalty.

    Args:
        prompts: The complete prompts, token ids.
        n_vocab: Size of the vocabulary.

    Returns:
        bool [B, V].
    """
    seen = np.zeros((len(prompts), n_vocab), bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[list(prompt)] = True
    return seen


def refuse_unknown(options: Mapping[str, Any], known: Any, where: str = "") -> None:
    """Check that all options are known.

    Args:
        options: {name: value}.
        known: The TypedDict that declares the options, such as GenerateOptions.
        where: Beginning of the error message.

    Raises:
        InputError: For an option that `known` does not declare.
    """
    if not isinstance(options, Mapping):
        raise InputError(f"{where}a dict of options is needed, got {options!r:.60}")
    if unknown := sorted(options.keys() - known.__optional_keys__, key=str):
        names = ", ".join(sorted(known.__optional_keys__))
        raise InputError(f"{where}unknown option {', '.join(map(str, unknown))}; the options are {names}")


def integer(
    options: Mapping[str, Any], name: str, default: int, low: int, high: int, hint: str = "", where: str = ""
) -> int:
    """Return an option as an int.

    Args:
        options: {name: value}.
        name: Name of the option.
        default: The result if the option is not given.
        low: Smallest value.
        high: Largest value.
        hint: End of the error message.
        where: Beginning of the error message.

    Raises:
        InputError: If the value is not an integer in low..high.
    """
    if name not in options:
        return default
    try:
        value = operator.index(options[name])
    except TypeError:
        value = low - 1
    if not low <= value <= high:
        raise InputError(f"{where}{name} must be in {low}..{high}, got {options[name]!r}{hint}")
    return value


def number(
    options: Mapping[str, Any], name: str, default: float, low: float, high: float, text: str, where: str = ""
) -> float:
    """Return an option as a float.

    Args:
        options: {name: value}.
        name: Name of the option.
        default: The result if the option is not given.
        low: Smallest value.
        high: Largest value.
        text: The range in words, for the error message.
        where: Beginning of the error message.

    Raises:
        InputError: If the value is not a number in low..high.
    """
    try:
        value = float(options.get(name, default))
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not low <= value <= high:
        raise InputError(f"{where}{name} must be {text}, got {options[name]!r}")
    return value


def _check_stops(sequences: Any, n_vocab: int, where: str) -> list[list[int]]:
    if not isinstance(sequences, Iterable):
        raise InputError(f"{where}stop must be a list of sequences of token ids, got {sequences!r:.60}")
    return [_check_stop(sequence, n_vocab, where) for sequence in sequences]


def _check_stop(sequence: Sequence[int], n_vocab: int, where: str) -> list[int]:
    try:
        ids = [operator.index(token) for token in sequence]
    except TypeError:
        ids = []
    if not ids or min(ids) < 0 or max(ids) >= n_vocab:
        raise InputError(f"{where}stop: each sequence needs token ids in 0..{n_vocab - 1}, got {sequence!r:.60}")
    return ids


def uniforms(seeds: Sequence[int], rows: Sequence[int], starts: Sequence[int], count: int) -> np.ndarray:
    """Return the uniform random numbers with which tokens are drawn.

    The number at (seed, row, position) does not depend on which other numbers are drawn (Philox; Salmon et al. 2011).

    Args:
        seeds: Seed of each row, in 0..2**64-1.
        rows: Row of the random numbers for each row of the batch, in 0..2**64-1.
        starts: Position of the first number of each row.
        count: How many numbers each row gets.

    Returns:
        Numbers [B, count] in [0, 1), float32. They are multiples of 2**-24, so that float32 and float64 models compare
        with the same numbers.
    """
    drawn = np.empty((len(rows), count), np.float32)
    for out, seed, row, start in zip(drawn, seeds, rows, starts, strict=True):
        philox = np.random.Philox(key=np.array([seed, row], np.uint64))
        blocks, rest = divmod(int(start), _NUMBERS_PER_BLOCK)
        philox.advance(blocks)
        stream = np.random.Generator(philox).integers(0, 2**24, size=rest + count, dtype=np.uint32)
        out[:] = stream[rest:].astype(np.float32) * np.float32(2**-24)
    return drawn
