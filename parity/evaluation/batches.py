"""How the tokens that are scored are laid out in batches, for both backends: positions, and few padded sizes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from parity.config import GPTConfig
from parity.errors import InputError

_SMALLEST_CHUNK = 32
"""Positions per chunk at least; fewer take about as long, because the whole output head is read for each chunk."""


class TokenLogprobs(NamedTuple):
    """The result of token_logprobs: arrays [B, last - first] of the backend.

    The scorer's batches have arrays [R] instead, one element per scored position, and k more axes likewise.
    """

    logprobs: Any
    """Log-probability of the token in nats, float32 (float64 if the parameters are)."""
    is_greedy: Any
    """Whether the token is the most likely one: bool. Among equal logits the first id is the most likely."""
    margins: Any
    """The token's logit minus the largest logit of any other token. Rounding can change `is_greedy` only where it can
    change the sign of this."""
    top_ids: Any
    """Ids of the `top` most likely tokens, [..., top], in descending order; the first id first among equal logits."""
    top_logprobs: Any
    """Their log-probabilities, [..., top]."""


class Batch(NamedTuple):
    """Sequences that are scored together."""

    indices: Sequence[int]
    """Which sequences."""
    n_rows: int
    """Number of rows with those that are padding."""
    n_inputs: int
    """Number of tokens per row that enter the model, with padding."""


def check_scoring(config: GPTConfig, shape: tuple[int, ...], first: int | None, last: int | None, top: int) -> range:
    """Return the positions that token_logprobs scores; see there.

    Raises:
        InputError: For a shape that is not [B, T] with T >= 2, and for positions or `top` out of range.
    """
    if len(shape) != 2:
        raise InputError(f"tokens must have axes [B, T], got shape {list(shape)}")
    B, T = shape
    if T < 2:
        raise InputError(f"tokens [B, T] of shape {list(shape)}: T must be at least 2, one token to read, one to score")
    config.check_tokens((B, T - 1))
    first, last = 0 if first is None else first, T - 1 if last is None else last
    if not 0 <= first < last <= T - 1:
        raise InputError(f"positions first={first} to last={last}: 0 <= first < last <= T - 1 = {T - 1} is needed")
    if not 0 <= top <= config.n_vocab:
        raise InputError(f"top must be between 0 and the size of the vocabulary, {config.n_vocab}; got {top}")
    return range(first, last)


def chunk_sizes(n_positions: int, n_vocab: int, largest: int) -> list[int]:
    """Divide positions into chunks, so that the logits of one chunk exist at a time.

    Args:
        n_positions: Number of positions.
        n_vocab: Number of logits per position.
        largest: Largest number of logits per chunk.

    Returns:
        Powers of two whose sum is at least n_positions; there are few of them, for few compiled programs.
    """
    most = max(_SMALLEST_CHUNK, 2 ** ((largest // n_vocab).bit_length() - 1)) if largest >= n_vocab else _SMALLEST_CHUNK
    sizes = []
    while n_positions > 0:
        sizes.append(min(most, max(_SMALLEST_CHUNK, 2 ** (n_positions.bit_length() - 1))))
        n_positions -= sizes[-1]
    return sizes


def padded_size(n: int, largest: int) -> int:
    """Return the length to which n tokens are padded: eight lengths per doubling, so at most an eighth is padding.

    Below 64 tokens the lengths are the multiples of 8; above, they are multiples of 16, 32, ... `largest` is one of
    them, and no result exceeds it.
    """
    step = max(8, 2 ** ((n - 1).bit_length() - 4))
    return min(largest, -(-n // step) * step)


def plan_batches(lengths: Sequence[int], largest: int, rows_for: Callable[[int], int]) -> list[Batch]:
    """Group sequences of similar length into batches, the longest first.

    Args:
        lengths: Number of input tokens of each sequence.
        largest: Largest number of input tokens, the model's context.
        rows_for: Returns the number of rows of a batch, given its padded length.

    Returns:
        Batches that contain each sequence once. Only the last one has rows that are padding.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])  # stable: a function of the lengths
    batches = []
    start = 0
    while start < len(order):
        n_inputs = padded_size(lengths[order[start]], largest)
        n_rows = rows_for(n_inputs)
        batches.append(Batch(order[start : start + n_rows], n_rows, n_inputs))
        start += n_rows
    return batches
