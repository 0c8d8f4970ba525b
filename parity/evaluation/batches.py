"""How the tokens that are scored are laid out in batches, for both backends: positions, and few padded sizes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

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


class Group(NamedTuple):
    """Sequences with the same context, which is computed once."""

    indices: list[int]
    """Which sequences."""
    n_inputs: int
    """Number of tokens that enter the model: the context, and each continuation but its last token."""


class Batch(NamedTuple):
    """Groups that are computed together, one per row."""

    groups: Sequence[Group]
    n_rows: int
    """Number of rows with those that are padding."""
    n_inputs: int
    """Number of tokens per row with padding."""


class Layout(NamedTuple):
    """The arrays of a batch."""

    tokens: np.ndarray
    """Ids, int32 [B, T]: in each row a context, its continuations without their last tokens, and padding."""
    positions: np.ndarray
    """Position of each token in its own sequence, int32 [B, T]."""
    segments: np.ndarray
    """int32 [B, T]: 0 for the context, which all may attend to, and 1, 2, ... for the continuations, which must not
    attend to each other."""
    is_shared: bool
    """Whether a row has several continuations. Otherwise positions and segments are those of plain sequences."""
    rows: np.ndarray
    """Row of each scored position, int32 [R], ascending."""
    columns: np.ndarray
    """Column of each scored position, int32 [R]."""
    targets: np.ndarray
    """The token that is scored there, int32 [R]."""
    counts: dict[int, int]
    """{sequence: number of its scored positions}, in their order."""


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


def group_sequences(
    sequences: Sequence[np.ndarray], counts: Sequence[int], largest: int, is_shared: bool
) -> list[Group]:
    """Group sequences that differ only in their continuations.

    Args:
        sequences: Token ids of each context with its continuation.
        counts: Number of tokens of each continuation.
        largest: Largest number of input tokens of a group.
        is_shared: Whether several sequences may be in one group.
    """
    groups: list[Group] = []
    last: dict[bytes, int] = {}  # the number of the last group with a context
    for index, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        n_context = len(sequence) - count
        context = sequence[:n_context].tobytes()
        # Rows become longer, which costs time in the attention; a short context is not worth it.
        if is_shared and 2 * n_context >= count and context in last:
            group = groups[last[context]]
            if group.n_inputs + count - 1 <= largest:
                groups[last[context]] = Group([*group.indices, index], group.n_inputs + count - 1)
                continue
        last[context] = len(groups)
        groups.append(Group([index], n_context + count - 1))
    return groups


def plan_batches(
    groups: Sequence[Group], largest: int, rows_for: Callable[[int], int], multiple: int = 1
) -> list[Batch]:
    """Put groups of similar length into batches, the longest first.

    Args:
        groups: The groups.
        largest: Largest number of input tokens, the model's context.
        rows_for: Returns the number of rows of a batch, given its padded length.
        multiple: A divisor of the number of rows.

    Returns:
        Batches that contain each group once. Only the last one may have rows that are padding.
    """
    ordered = sorted(groups, key=lambda group: -group.n_inputs)  # stable: a function of the groups
    batches = []
    start = 0
    while start < len(ordered):
        n_inputs = padded_size(ordered[start].n_inputs, largest)
        n_rows = rows_for(n_inputs)
        chosen = ordered[start : start + n_rows]
        if len(chosen) < n_rows:  # the last batch
            n_rows = min(n_rows, -(-(2 ** (len(chosen) - 1).bit_length()) // multiple) * multiple)
        batches.append(Batch(chosen, n_rows, n_inputs))
        start += len(chosen)
    return batches


def lay_out(batch: Batch, sequences: Sequence[np.ndarray], counts: Sequence[int]) -> Layout:
    """Return the arrays of a batch; see group_sequences() for the arguments.

    Rows are padded on the right, which changes nothing because attention is causal.
    """
    tokens, positions, segments = np.zeros((3, batch.n_rows, batch.n_inputs), np.int32)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, group in enumerate(batch.groups):
        n_context = len(sequences[group.indices[0]]) - counts[group.indices[0]]
        tokens[row, :n_context] = sequences[group.indices[0]][:n_context]
        positions[row, :n_context] = range(n_context)
        end = n_context
        for segment, index in enumerate(group.indices, 1):
            continuation = sequences[index][n_context:]
            start, end = end, end + len(continuation) - 1
            tokens[row, start:end] = continuation[:-1]
            positions[row, start:end] = range(n_context, n_context + len(continuation) - 1)
            segments[row, start:end] = segment
            rows += [row] * len(continuation)
            columns += [n_context - 1, *range(start, end)]
            targets += continuation.tolist()
    return Layout(
        tokens=tokens,
        positions=positions,
        segments=segments,
        is_shared=any(len(group.indices) > 1 for group in batch.groups),
        rows=np.array(rows, np.int32),
        columns=np.array(columns, np.int32),
        targets=np.array(targets, np.int32),
        counts={index: counts[index] for group in batch.groups for index in group.indices},
    )
