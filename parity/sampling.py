"""What a generator is asked for, checked and laid out once for both backends.

From logits to a token, the rules that both follow (tests/support/numpy_oracle.py has them in float64). The
order, and what each step keeps, is that of Hugging Face's logits processors; equals at a limit all stay:

1. repetition_penalty (Keskar et al. 2019): logits of tokens already in the row, prompt included, are
   divided by it where positive and multiplied where negative.
2. temperature 0: the largest logit, the lowest id among equals. Otherwise logits / temperature.
3. top_k: keep logits not below the k-th largest.
4. top_p (Holtzman et al. 2020): of what is left, keep tokens while the more probable ones together
   have less than top_p; so the one that reaches top_p stays.
5. min_p (Nguyen et al. 2024): keep tokens at least min_p times as probable as the most probable one.
6. Inverse CDF over the kept tokens in order of id: the first whose cumulative mass exceeds
   u * total, and the last kept token where rounding leaves none; u from parity/noise.py.

A row ends with its eos_id, with the last token of a stop sequence, after max_new_tokens, or, with
overflow="stop", where the context is full. With overflow="crop" a longer row goes on from its last
`context_size` tokens, computed anew for each token, as in the notebook.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from parity.config import GPTConfig
from parity.errors import InputError

SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits; the rules are at the top of this file."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def check(self, n_vocab: int) -> None:
        """Raise InputError that names an option out of its range."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.top_k is not None and not 1 <= self.top_k <= n_vocab:
            raise InputError(f"top_k must be in 1..{n_vocab}, got {self.top_k}; leave it out to keep all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be in [0, 1], got {self.min_p}")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty must be positive (1 changes nothing), got {self.repetition_penalty}")


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts laid out for a cached loop: row b's first token is at slot first[b] of the bucket."""

    prompts: list[list[int]]
    """One a row, whole: `samples` rows for each prompt given."""
    tokens: np.ndarray
    """int32 [B, P], the last context_size tokens of each prompt at the right end, zeros before it."""
    first: np.ndarray
    """int32 [B]"""
    uniforms: np.ndarray
    """float32 [B, new], one for each token to come, `new` a bucket."""
    limits: np.ndarray
    """int32 [B]: a row ends after this many new tokens."""
    stops: np.ndarray
    """int32 [stops, W], sequences that end a row, at the right end; -1 before them matches anything."""
    stop_lengths: np.ndarray
    """int32 [stops]"""
    context_size: int
    cached_tokens: int
    """So many new tokens fit the context in every row; then each needs the context computed anew."""
    sampling: Sampling

    @property
    def max_new_tokens(self) -> int:
        return int(self.limits.max())

    @property
    def cache_length(self) -> int:
        return self.tokens.shape[1] + bucket(self.cached_tokens)

    def rows(self, generated: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
        """Prompts with the first lengths[b] tokens of their continuations [B, new]."""
        return [
            prompt + new[:length]
            for prompt, new, length in zip(self.prompts, generated.tolist(), lengths.tolist(), strict=True)
        ]

    def rectangle(self, rows: list[list[int]], eos_id: int | None) -> np.ndarray:
        """Rows as the notebook has them, int64 [B, T]: each ends before its eos_id, and is filled up with it."""
        ended = [len(row) > len(prompt) and row[-1] == eos_id for row, prompt in zip(rows, self.prompts, strict=True)]
        rows = [row[:-1] if end else row for row, end in zip(rows, ended, strict=True)]
        longest = max(map(len, rows))
        return np.array([row + [eos_id or 0] * (longest - len(row)) for row in rows], np.int64)


def bucket(length: int) -> int:
    """The next power of two, at least SMALLEST_BUCKET: one compiled program serves a whole bucket."""
    return max(SMALLEST_BUCKET, 1 << max(0, length - 1).bit_length())


def prepare(
    config: GPTConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    context_size: int | None = None,
    overflow: Literal["crop", "stop"] = "crop",
    eos_id: int | None = None,
    stop: Sequence[Sequence[int]] = (),
    samples: int = 1,
    seed: int = 0,
    first_row: int = 0,
    **sampling: float | None,
) -> Request:
    """Check every option and lay the prompts out; raises InputError that names the option.

    `context_size`: how many tokens the model may see, by default and at most n_ctx; given, it also
    crops longer prompts, which are errors otherwise. `first_row`: the noise's row of prompts[0], for
    a list of prompts that is generated in parts.
    """
    rules = Sampling(**sampling)  # type: ignore[arg-type]
    rules.check(config.n_vocab)
    if len(prompts) == 0:
        raise InputError("prompts: give at least one")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if samples < 1:
        raise InputError(f"samples must be at least 1, got {samples}")
    if overflow not in ("crop", "stop"):
        raise InputError(f'overflow must be "crop" or "stop", got {overflow!r}')
    if context_size is not None and not 1 <= context_size <= config.n_ctx:
        raise InputError(f"context_size must be in 1..{config.n_ctx}, the model's context, got {context_size}")
    if not 0 <= seed < 2**64:
        raise InputError(f"seed must be in 0..2**64-1, got {seed}")
    if not 0 <= first_row < 2**32:
        raise InputError(f"first_row must be in 0..2**32-1, got {first_row}")
    if eos_id is not None and not 0 <= eos_id < config.n_vocab:
        raise InputError(f"eos_id {eos_id} is outside the vocabulary 0..{config.n_vocab - 1}")
    ends = [list(map(int, end)) for end in stop]
    for end in ends:
        if not end or min(end) < 0 or max(end) >= config.n_vocab:
            raise InputError(f"stop: each sequence needs ids in 0..{config.n_vocab - 1}, got {end}")
    ends += [] if eos_id is None else [[eos_id]]

    context = context_size or config.n_ctx
    as_lists = [[int(token) for token in prompt] for prompt in prompts for _ in range(samples)]
    for number, prompt in enumerate(as_lists):
        if not prompt:
            raise InputError(
                f"prompt {number // samples} is empty; start with the end-of-text token to generate from nothing"
            )
        seen_length = min(len(prompt), context_size or len(prompt))
        config.check_tokens((1, seen_length), min(prompt), max(prompt))
    cropped = [prompt[-context:] for prompt in as_lists]
    lengths = np.array([len(prompt) for prompt in cropped], np.int32)
    limits = np.full(len(cropped), max_new_tokens, np.int32)
    if overflow == "stop":
        limits = np.minimum(limits, context - lengths)
    stops = np.full((len(ends), max(map(len, ends), default=1)), -1, np.int32)
    for row, end in zip(stops, ends, strict=True):
        row[-len(end) :] = end
    width = bucket(max(int(lengths.max()), stops.shape[1]))
    tokens = np.zeros((len(cropped), width), np.int32)
    for row, prompt in zip(tokens, cropped, strict=True):
        row[width - len(prompt) :] = prompt
    positions = np.array([len(prompt) for prompt in as_lists])
    noise = uniforms(seed, first_row + np.arange(len(cropped)), positions, bucket(int(limits.max())))
    return Request(
        prompts=as_lists,
        tokens=tokens,
        first=width - lengths,
        uniforms=noise,
        limits=limits,
        stops=stops,
        stop_lengths=np.array([len(end) for end in ends], np.int32),
        context_size=context,
        cached_tokens=min(int(limits.max()), context - int(lengths.max())),
        sampling=rules,
    )


def check_finite(failed_at: int) -> None:
    """Raise InputError if generation met logits that are not finite, at new token `failed_at` (-1: it did not)."""
    if failed_at >= 0:
        raise InputError(
            f"the model's logits are not finite at new token {failed_at} (counted from 0): "
            "its weights hold NaN or infinity, or overflow in their dtype"
        )


def uniforms(seed: int, rows: np.ndarray, starts: np.ndarray, count: int) -> np.ndarray:
    """Uniforms float32 [len(rows), count] in [0, 1): row r's are for positions starts[r] onwards.

    Multiples of 2**-24, so that float32 and float64 models compare against the same numbers. The
    number for (seed, row, position) does not depend on what else is asked for.
    """
    drawn = np.empty((len(rows), count), np.float32)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        generator = np.random.Generator(np.random.Philox(key=[seed, int(row)]))
        stream = generator.integers(0, 2**24, size=int(start) + count, dtype=np.uint32)
        drawn[i] = stream[int(start) :].astype(np.float32) * np.float32(2**-24)
    return drawn
