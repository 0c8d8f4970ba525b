"""What a generator is asked for, checked and laid out once for both backends.

From logits to a token, the rules that both follow (tests/numpy_oracle.py has them in float64):

1. temperature 0: the largest logit, the lowest id among equals. Otherwise logits / temperature.
2. top_k: keep logits not below the k-th largest; all that equal it stay.
3. top_p (Holtzman et al. 2020): of what is left, from the largest down, keep tokens until their
   mass reaches top_p, the one that reaches it included, and all that equal it.
4. Inverse CDF over the kept tokens in order of id: the first whose cumulative mass exceeds
   u * total, and the last kept token where rounding leaves none; u from parity/noise.py.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from parity.config import GPTConfig
from parity.errors import InputError
from parity.noise import uniforms
from parity.tokens import check_tokens

SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts laid out for a cached loop: row b's first token is at slot first[b] of the bucket."""

    prompts: list[list[int]]
    tokens: np.ndarray
    """int32 [B, P], each prompt at the right end, zeros before it."""
    first: np.ndarray
    """int32 [B]"""
    uniforms: np.ndarray
    """float32 [B, new], one for each token to come."""
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    eos_id: int | None

    @property
    def cache_length(self) -> int:
        return self.tokens.shape[1] + self.uniforms.shape[1]

    def rows(self, generated: np.ndarray) -> list[list[int]]:
        """Prompts with their continuations [B, new], each cut after its first eos."""
        rows = []
        for prompt, new in zip(self.prompts, generated.tolist(), strict=True):
            new = new[: self.max_new_tokens]
            if self.eos_id in new:
                new = new[: new.index(self.eos_id) + 1]
            rows.append(prompt + new)
        return rows


def bucket(length: int) -> int:
    """The next power of two, at least SMALLEST_BUCKET: one compiled program serves a whole bucket."""
    return max(SMALLEST_BUCKET, 1 << max(0, length - 1).bit_length())


def prepare(
    prompts: Sequence[Sequence[int]],
    config: GPTConfig,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_id: int | None,
    seed: int,
) -> Request:
    """Check every option and lay the prompts out; raises InputError that names the option."""
    if not prompts:
        raise InputError("prompts: give at least one")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature must be 0 (greedy) or positive, got {temperature}")
    if top_k is not None and not 1 <= top_k <= config.n_vocab:
        raise InputError(f"top_k must be in 1..{config.n_vocab}, got {top_k}; leave it out to keep all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p must be in (0, 1], got {top_p}")
    if eos_id is not None and not 0 <= eos_id < config.n_vocab:
        raise InputError(f"eos_id {eos_id} is outside the vocabulary 0..{config.n_vocab - 1}")
    if not 0 <= seed < 2**64:
        raise InputError(f"seed must be in 0..2**64-1, got {seed}")
    as_lists = [[int(token) for token in prompt] for prompt in prompts]
    for number, prompt in enumerate(as_lists):
        if not prompt:
            raise InputError(f"prompt {number} is empty; start with the end-of-text token to generate from nothing")
        check_tokens((1, len(prompt)), config, min(prompt), max(prompt))
        if len(prompt) + max_new_tokens > config.n_ctx:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} it exceeds "
                f"the model's context, n_ctx={config.n_ctx}"
            )
    lengths = np.array([len(prompt) for prompt in as_lists], np.int32)
    width = bucket(int(lengths.max()))
    tokens = np.zeros((len(as_lists), width), np.int32)
    for row, prompt in zip(tokens, as_lists, strict=True):
        row[width - len(prompt) :] = prompt
    noise = uniforms(seed, np.arange(len(as_lists)), lengths, bucket(max_new_tokens))
    return Request(as_lists, tokens, width - lengths, noise, max_new_tokens, float(temperature), top_k, top_p, eos_id)
