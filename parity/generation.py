"""Checks the arguments of generate() and stream(), and lays them out as arrays, once for both backends.

A row ends with its eos_id, with the last token of a stop sequence, after max_new_tokens, or, with overflow="stop",
when the context is full. With overflow="crop" a longer row continues from its last `context_size` tokens, which are
all recomputed for each new token, as in the notebook.
"""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from parity.config import GPTConfig
from parity.errors import InputError
from parity.sampling import (
    MOST_SAMPLES,
    ActiveRules,
    GenerateOptions,
    PromptOptions,
    RowOptions,
    SamplingOptions,
    check_options,
    integer,
    refuse_unknown,
    row_options,
    uniforms,
)

SMALLEST_BUCKET = 16
SMALLEST_COUNT = 4  # of stop sequences
SMALLEST_SEGMENT = 4096
"""Number of new tokens that buffers hold, unless the context is longer, so that memory follows what is generated."""
NOTEBOOK_ORDER = ("context_size", "temperature", "top_k", "eos_id")
"""Options that the notebook's generate() takes by position, after max_new_tokens."""


class RowInputs(NamedTuple):
    """The inputs of the generation loop for each row, besides its tokens; arrays of NumPy or of a backend."""

    uniforms: Any
    """float32 [B, new], one number for each new token of a segment"""
    pad_lengths: Any
    """int32 [B], empty slots before the prompt"""
    max_new_per_row: Any
    """int32 [B]"""
    stops: Any
    """int32 [B, stops, W], sequences that end the row, right-aligned; -1 to their left matches any token"""
    stop_lengths: Any
    """int32 [B, stops]"""
    options: RowOptions


class Chunk(NamedTuple):
    """New tokens of some steps of the loop, as NumPy arrays."""

    tokens: np.ndarray
    """int [B, new]"""
    logprobs: np.ndarray
    """float [B, new], zeros unless they were requested"""
    lengths: np.ndarray
    """int32 [B], number of new tokens of each row so far"""
    top_ids: np.ndarray | None = None
    """int [B, new, n_top], the most likely tokens in descending order; None unless they were requested"""
    top_logprobs: np.ndarray | None = None
    """float [B, new, n_top]"""


@dataclasses.dataclass(frozen=True)
class Request:
    """Checked prompts and options, laid out for a loop over a key/value cache."""

    prompts: list[list[int]]
    """The complete prompt of each row; a prompt occurs `samples` times."""
    eos_ids: list[int | None]
    """The end-of-text id of each row."""
    tokens: np.ndarray
    """int32 [B, P], the last context_size tokens of each prompt, right-aligned, with zeros to their left."""
    inputs: RowInputs
    active: ActiveRules
    context_size: int
    n_cached_steps: int
    """Number of new tokens for which the cache has room in every row; after them the context is recomputed."""
    segment: int
    """Number of new tokens for which buffers have room. Longer rows are generated in several segments; the first has
    room for all n_cached_steps, and each for a context and for the longest stop sequence."""
    seeds: list[int]
    """Seed of each row."""
    noise_rows: list[int]
    """Row of the random numbers of each row."""
    as_array: bool
    return_logprobs: bool
    n_top: int = 0
    """Number of most likely tokens that chunks have for each new token."""

    @property
    def max_new_tokens(self) -> int:
        return int(self.inputs.max_new_per_row.max())

    @property
    def cache_length(self) -> int:
        return self.tokens.shape[1] + bucket(self.n_cached_steps)

    def uniforms(self, first: int) -> np.ndarray:
        """Random numbers float32 [B, segment] of the new tokens from number `first` on."""
        return uniforms(self.seeds, self.noise_rows, [len(prompt) + first for prompt in self.prompts], self.segment)

    def result(self, chunks: Sequence[Chunk]) -> Any:
        """Return what generate() returns for all chunks of a loop, with a NumPy array in place of the backend's."""
        none = np.zeros((len(self.prompts), 0), np.int32)
        new_tokens = np.concatenate([none, *(chunk.tokens for chunk in chunks)], axis=1)  # [B, new]
        logprobs = np.concatenate([none, *(chunk.logprobs for chunk in chunks)], axis=1)  # [B, new]
        lengths = chunks[-1].lengths if chunks else np.zeros(len(none), np.int32)  # [B]
        new_rows = zip(self.prompts, new_tokens.tolist(), lengths.tolist(), strict=True)
        rows = [prompt + new[:length] for prompt, new, length in new_rows]
        if self.as_array:
            return self._rectangle(rows)
        if self.return_logprobs:
            return rows, [row[:length].tolist() for row, length in zip(logprobs, lengths, strict=True)]
        return rows

    def _rectangle(self, rows: list[list[int]]) -> np.ndarray:
        """The rows as the notebook returns them, int64 [B, T]: without the eos_id at the end, but padded with it."""
        cut = [
            row[:-1] if len(row) > len(prompt) and row[-1] == eos_id else row
            for row, prompt, eos_id in zip(rows, self.prompts, self.eos_ids, strict=True)
        ]
        width = max(map(len, cut))
        padded = zip(cut, self.eos_ids, strict=True)
        return np.array([row + [eos_id or 0] * (width - len(row)) for row, eos_id in padded], np.int64)


def bucket(length: int, smallest: int = SMALLEST_BUCKET) -> int:
    """Round up to a power of two, at least `smallest`: one compiled program serves all lengths of a bucket."""
    return max(smallest, 1 << max(0, length - 1).bit_length())


def prepare(
    config: GPTConfig,
    prompts: Any,
    max_new_tokens: int,
    options: GenerateOptions,
    notebook_options: Sequence[Any] = (),
    *,
    as_array: bool = False,
    return_logprobs: bool = False,
    n_top: int = 0,
) -> Request:
    """Check the arguments of a call, and lay them out as arrays.

    Args:
        config: The model's configuration.
        prompts: Sequences of token ids, or an array [B, T].
        max_new_tokens: Default of each prompt's maximum number of new tokens.
        options: See GenerateOptions.
        notebook_options: Values of NOTEBOOK_ORDER that were given by position.
        as_array: Whether the call returns an array, which makes greedy decoding the default.
        return_logprobs: Whether the call also returns the log-probabilities of the new tokens.
        n_top: See Request.

    Raises:
        InputError: For an empty prompt, an unknown option, and a value out of range; the message names it.
    """
    given = _merge(options, notebook_options)
    samples = integer(given, "samples", 1, 1, MOST_SAMPLES, "; first_row generates more in parts")
    first_row = integer(given, "first_row", 0, 0, 2**32 - 1)
    context = integer(given, "context_size", config.n_ctx, 1, config.n_ctx, "; the model's context is the limit")
    if given.get("overflow", "crop") not in ("crop", "stop"):
        raise InputError(f'overflow must be "crop" or "stop", got {given["overflow"]!r}')
    token_lists = _token_lists(prompts, config, given.get("context_size"))
    defaults = {"temperature": 0.0 if as_array else 1.0, "max_new_tokens": max_new_tokens}
    shared = {name: value for name, value in given.items() if name in SamplingOptions.__optional_keys__}
    check_options(defaults | shared, config.n_vocab)
    per_prompt = given.get("per_prompt", [{}] * len(token_lists))
    if not isinstance(per_prompt, Sequence) or len(per_prompt) != len(token_lists):
        n_prompts = len(token_lists)
        raise InputError(f"per_prompt must be a list of {n_prompts} dicts, one per prompt, got {per_prompt!r:.60}")
    rows = []
    for number, own in enumerate(per_prompt):
        where = f"per_prompt[{number}]: "
        refuse_unknown(own, PromptOptions, where)
        place = {"row": first_row + number * samples}
        row = check_options(defaults | place | _without_none({**shared, **own}), config.n_vocab, where)
        rows += [row | {"row": (row["row"] + sample) % 2**64} for sample in range(samples)]
    if as_array:
        _check_array_form(rows, return_logprobs)

    whole = [prompt for prompt in token_lists for _ in range(samples)]
    cropped = [prompt[-context:] for prompt in whole]
    lengths = np.array([len(prompt) for prompt in cropped], np.int32)
    max_new_per_row = np.array([row["max_new_tokens"] for row in rows], np.int32)
    if given.get("overflow") == "stop":
        max_new_per_row = np.minimum(max_new_per_row, context - lengths)
    max_new = int(max_new_per_row.max())
    stops, stop_lengths = _stop_arrays(rows)
    width = bucket(max(int(lengths.max()), stops.shape[2]))
    tokens = np.zeros((len(cropped), width), np.int32)
    for slots, prompt in zip(tokens, cropped, strict=True):
        slots[width - len(prompt) :] = prompt
    segment = min(bucket(max_new), bucket(max(SMALLEST_SEGMENT, context, stops.shape[2])))
    seeds, noise_rows = [row["seed"] for row in rows], [row["row"] for row in rows]
    noise = uniforms(seeds, noise_rows, [len(prompt) for prompt in whole], segment)
    by_row, active = row_options(rows, config.n_vocab)
    return Request(
        prompts=whole,
        eos_ids=[row["eos_id"] for row in rows],
        tokens=tokens,
        inputs=RowInputs(noise, width - lengths, max_new_per_row, stops, stop_lengths, by_row),
        active=active,
        context_size=context,
        n_cached_steps=min(max_new, context - int(lengths.max())),
        segment=segment,
        seeds=seeds,
        noise_rows=noise_rows,
        as_array=as_array,
        return_logprobs=return_logprobs,
        n_top=min(n_top, config.n_vocab),
    )


def running_tokens(tokens: np.ndarray, lengths: np.ndarray, number: int) -> list[int | None]:
    """What stream() yields for new token `number` of each row: tokens [B], or None where the row has ended."""
    return [int(t) if length > number else None for t, length in zip(tokens, lengths, strict=True)]


def pick_prompts(prompts: Any, idx: Any) -> Any:
    """Return `prompts`, or `idx` as the notebook calls them; raise InputError unless exactly one is given."""
    if (prompts is None) == (idx is None):
        raise InputError("prompts: give exactly one of prompts and idx, which is the notebook's name for them")
    return idx if prompts is None else prompts


def check_finite(failed_at: int) -> None:
    """Raise InputError if logits were not finite at new token number `failed_at`; -1 means that all were."""
    if failed_at >= 0:
        raise InputError(
            f"the model's logits are not finite at new token {failed_at} (counted from 0): "
            "its weights hold NaN or infinity, or they overflow in their dtype"
        )


def _merge(options: Mapping[str, Any], notebook_options: Sequence[Any]) -> dict[str, Any]:
    """Return all options by name, without those that are None."""
    if len(notebook_options) > len(NOTEBOOK_ORDER):
        raise InputError(f"after max_new_tokens, only {', '.join(NOTEBOOK_ORDER)} can be given by position")
    by_position = dict(zip(NOTEBOOK_ORDER, notebook_options, strict=False))
    if twice := sorted(by_position.keys() & options.keys()):
        raise InputError(f"{', '.join(twice)}: given both by position and by name")
    refuse_unknown(options, GenerateOptions)
    return _without_none({**by_position, **options})


def _without_none(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _token_lists(prompts: Any, config: GPTConfig, context_size: int | None) -> list[list[int]]:
    """Return the prompts as lists of ints; those longer than an explicit context_size are cropped later."""
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    try:
        lists = [[operator.index(token) for token in prompt] for prompt in prompts]
    except TypeError:
        raise InputError(f"prompts must be sequences of token ids (integers), got {prompts!r:.60}") from None
    if not lists:
        raise InputError("prompts: the list is empty; give at least one prompt")
    for number, prompt in enumerate(lists):
        if not prompt:
            raise InputError(f"prompt {number} is empty; start with the end-of-text token to generate from nothing")
        config.check_tokens((1, min(len(prompt), context_size or len(prompt))), min(prompt), max(prompt))
    return lists


def _check_array_form(rows: Sequence[Mapping[str, Any]], return_logprobs: bool) -> None:
    """Raise InputError for options whose result an array [B, T] cannot hold."""
    if return_logprobs:
        raise InputError("return_logprobs needs prompts as lists of ids: ids.tolist()")
    lengths_differ = any(row["stop"] for row in rows) or len({row["max_new_tokens"] for row in rows}) > 1
    if lengths_differ and any(row["eos_id"] is None for row in rows):
        raise InputError(
            "with stop or max_new_tokens per prompt the rows of an array end at different lengths: "
            "give eos_id, with which the shorter rows are padded, or prompts as lists of ids (ids.tolist())"
        )


def _stop_arrays(rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The sequences that end each row, its eos_id among them: (stops, stop_lengths) of RowInputs."""
    ends = [row["stop"] + ([] if row["eos_id"] is None else [[row["eos_id"]]]) for row in rows]
    count = max(map(len, ends))
    width = max((len(sequence) for row in ends for sequence in row), default=1)
    shape = (len(rows), bucket(count, SMALLEST_COUNT), bucket(width))
    stops = np.full(shape, -1, np.int32)
    stop_lengths = np.full(shape[:2], np.iinfo(np.int32).max, np.int32)  # no row ever has so many new tokens
    for i, row in enumerate(ends):
        for j, sequence in enumerate(row):
            stops[i, j, -len(sequence) :] = sequence
            stop_lengths[i, j] = len(sequence)
    return stops, stop_lengths
