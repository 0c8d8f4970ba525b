"""Training batches from token arrays. A batch is a pure function of (seed, step), equal for both backends."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from parity.config import IGNORE_INDEX
from parity.data.shard_cache import RemoteTokens, fetch_ahead
from parity.data.token_files import Tokens
from parity.data.window_order import WindowOrder, keyed_order, order
from parity.errors import InputError

_STEPS_AHEAD = 16
"""Number of batches whose shards are fetched, if they are at an address, before the first of them is needed."""
_STEPS_BETWEEN = 8
"""Number of steps after which the shards of further batches are looked for."""


class Dataset(Protocol):
    """What the training loop needs from a dataset; Windows is one, and any class with these members can replace it.

    Batches are tuples of arrays whose first axis is the rows. For the next token they are (inputs, targets), both int32
    [B, T]; other objectives have other targets, or more arrays. T is at most the model's n_ctx, and may differ between
    batches. The target at a position is the id to predict there, or IGNORE_INDEX if the loss should ignore the
    position: padding, or a prompt. Inputs are always in the vocabulary, at ignored positions too.
    """

    @property
    def n_targets(self) -> int:
        """Number of targets in all of in_order() that are not ignored."""

    def batch(self, seed: int, step: int, size: int, places: Sequence[int] | None = None) -> tuple[np.ndarray, ...]:
        """Return the batch of a training step: a pure function of its arguments.

        Args:
            seed: Seed of the order.
            step: Number of the step, from 0.
            size: Number of rows in the whole batch.
            places: Rows of the batch to return; by default all. T does not depend on them.
        """

    def batch_windows(self, seed: int, step: int, size: int) -> list[int]:
        """Return the indices of the examples in a batch; they are recorded if its loss is not finite."""

    def in_order(self, size: int, part: slice = slice(None)) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield the whole dataset once, for evaluation.

        Args:
            size: Number of rows of every batch; the last one is filled with rows whose targets are all ignored.
            part: Rows of each batch to return.
        """


class Windows:
    """Windows over token arrays: inputs [T] and, shifted by one position, targets [T].

    Args:
        shards: Token ids [length], in arrays or files; a window never crosses from one shard to the next.
        n_ctx: Number of positions T of a window.
        n_vocab: Size of the vocabulary.
        stride: Distance between the starts of two windows; by default n_ctx, so that no target occurs twice.
        name: Name of the data in error messages.
        order: How the order of an epoch is made: "shuffled" shuffles a table, which takes 8 bytes per window; "keyed"
            computes a permutation where it is needed. The two orders differ.

    Raises:
        InputError: If every shard is shorter than one window, or an id is outside the vocabulary. The first 16
            million ids of a shard are checked here, unless it was prepared with a tokenizer whose vocabulary fits; all
            others when a batch contains them.
    """

    def __init__(
        self,
        shards: Sequence[Tokens],
        n_ctx: int,
        n_vocab: int,
        stride: int | None = None,
        name: str = "corpus",
        order: WindowOrder = "shuffled",
    ):
        self.shards, self.n_ctx, self.n_vocab, self.name, self.order = list(shards), n_ctx, n_vocab, name, order
        self.stride = n_ctx if stride is None else stride
        self._looked_ahead = range(0)
        """The steps that need not look for the shards of later steps, because an earlier one has done so."""
        if self.stride < 1:
            raise InputError(f"stride must be at least 1, got {self.stride}")
        counts = [max(0, (len(shard) - n_ctx - 1) // self.stride + 1) for shard in self.shards]
        self._ends = np.cumsum(counts, dtype=np.int64)
        if not self.shards or self._ends[-1] == 0:
            longest = max(map(len, self.shards), default=0)
            raise InputError(
                f"{name} has {longest} tokens, fewer than one window of n_ctx + 1 = {n_ctx + 1}; "
                "use more text (for validation, a larger --validation-fraction), or lower --n-ctx"
            )

        for shard in self.shards:
            limit = getattr(shard, "id_limit", None)
            if limit is None or limit > n_vocab:
                self._check_ids(shard[: 2**24])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def batch(
        self, seed: int, step: int, size: int, places: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets, int32 [B, T], of a training step; see Dataset.batch.

        Every epoch contains each window once, in a new order. A batch that begins near the end of an epoch is filled
        from the next epoch, so that no batch is short.
        """
        chosen = range(size) if places is None else places
        if step not in self._looked_ahead and any(isinstance(shard, RemoteTokens) for shard in self.shards[:1]):
            self._looked_ahead = range(step, step + _STEPS_BETWEEN)
            batches = [self.batch_windows(seed, number, size) for number in range(step, step + _STEPS_AHEAD)]
            ahead = [windows[place] for windows in batches for place in chosen]
            fetch_ahead(self.shards[number] for number in dict.fromkeys(self._shard_numbers(ahead)))
        windows = self.batch_windows(seed, step, size)
        return self._stack([self._window(windows[place]) for place in chosen])

    def batch_windows(self, seed: int, step: int, size: int) -> list[int]:
        """Return the indices of the windows in the batch of a step."""
        places = np.arange(step * size, (step + 1) * size)
        epochs, offsets = places // len(self), places % len(self)
        windows = np.empty(size, np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            windows[chosen] = self._in_epoch(seed, int(epoch), offsets[chosen])
        return windows.tolist()

    def _in_epoch(self, seed: int, epoch: int, places: np.ndarray) -> np.ndarray:
        """Return the windows at places of an epoch."""
        if self.order == "keyed":
            return keyed_order(seed, epoch, len(self), places)
        return order(seed, epoch, len(self))[places]

    @property
    def n_targets(self) -> int:
        """Number of targets in in_order(): all tokens but the first of each shard."""
        return sum(max(0, len(shard) - 1) for shard in self.shards)

    def in_order(self, size: int, part: slice = slice(None)) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield every token once, in order, in batches int32 [size, T]; see Dataset.in_order.

        Positions after the end of a shard, and rows after the last window, have targets IGNORE_INDEX.
        """
        rows = self._rows()
        while chunk := list(itertools.islice(rows, size)):
            yield self._stack((chunk + [chunk[0][:0]] * (size - len(chunk)))[part])

    def _rows(self) -> Iterator[np.ndarray]:
        for number, shard in enumerate(self.shards):
            fetch_ahead(self.shards[number : number + 2])
            yield from (shard[start : start + self.n_ctx + 1] for start in range(0, len(shard) - 1, self.n_ctx))

    def _shard_numbers(self, windows: Sequence[int]) -> list[int]:
        return np.searchsorted(self._ends, windows, side="right").tolist()

    def _window(self, index: int) -> np.ndarray:
        (shard,) = self._shard_numbers([index])
        start = (index - (int(self._ends[shard - 1]) if shard else 0)) * self.stride
        return self.shards[shard][start : start + self.n_ctx + 1]

    def _stack(self, windows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full((len(windows), self.n_ctx + 1), IGNORE_INDEX, np.int32)
        for row, window in zip(ids, windows, strict=True):
            row[: len(window)] = window
        self._check_ids(ids)
        return np.maximum(ids[:, :-1], 0), ids[:, 1:]

    def _check_ids(self, ids: np.ndarray) -> None:
        if (high := int(ids.max(initial=0))) >= self.n_vocab:
            raise InputError(
                f"{self.name} contains token id {high}, outside the vocabulary 0..{self.n_vocab - 1}; "
                "was it made with another tokenizer?"
            )
