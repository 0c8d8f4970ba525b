"""Token files and windows. A batch is a pure function of (seed, step), the same for both backends.

Files: nanoGPT's .bin (raw uint16) and llm.c's .bin (256 int32 of header, then uint16), both
memory-mapped; text goes through a tokenizer (parity/corpora.py).
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from parity.config import IGNORE_INDEX
from parity.errors import InputError


class Windows:
    """Shifted windows over token arrays: window i has inputs [T] and, one position on, targets [T].

    `shards`: arrays of token ids, memory-mapped or not; a window never crosses from one to the next.
    `stride`: from one window's start to the next; by default n_ctx, so that no target comes twice.
    Raises InputError for shards shorter than one window, and for an id outside the vocabulary: in the
    first 16 million of each shard at once, further on where a batch meets one.
    """

    def __init__(
        self, shards: Sequence[np.ndarray], n_ctx: int, n_vocab: int, stride: int | None = None, name: str = "corpus"
    ):
        self.shards, self.n_ctx, self.n_vocab, self.name = list(shards), n_ctx, n_vocab, name
        self.stride = n_ctx if stride is None else stride
        if self.stride < 1:
            raise InputError(f"stride must be at least 1, got {self.stride}")
        counts = [max(0, (len(shard) - n_ctx - 1) // self.stride + 1) for shard in self.shards]
        self._ends = np.cumsum(counts, dtype=np.int64)
        if not self.shards or self._ends[-1] == 0:
            longest = max(map(len, self.shards), default=0)
            raise InputError(
                f"{name} has {longest} tokens, less than one window of n_ctx + 1 = {n_ctx + 1}; "
                "give more text or a shorter context"
            )

        for shard in self.shards:
            self._check_ids(shard[: 2**24])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.shards))

    def batch(
        self, seed: int, step: int, size: int, places: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int32 [B, T], of a training step: a pure function of its arguments.

        The windows run in a new order each epoch, every one once; a batch that begins near the end
        of an epoch is filled from the next epoch's order, so that no batch is short. `places`: which
        of the batch's windows to read; by default all.
        """
        windows = self.batch_windows(seed, step, size)
        return self._stack([self._window(windows[place]) for place in (range(size) if places is None else places)])

    def batch_windows(self, seed: int, step: int, size: int) -> list[int]:
        """Which windows are in the batch of a step."""
        places = np.arange(step * size, (step + 1) * size)
        epochs, offsets = places // len(self), places % len(self)
        return [int(order(seed, int(e), len(self))[o]) for e, o in zip(epochs, offsets, strict=True)]

    @property
    def n_targets(self) -> int:
        """Targets that in_order() gives: each shard's tokens but its first."""
        return sum(max(0, len(shard) - 1) for shard in self.shards)

    def in_order(self, size: int, part: slice = slice(None)) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every token once, in order, in batches int32 [size, T], or a `part` of each batch's rows.

        Positions after the end of a shard, and rows after the last window, have targets IGNORE_INDEX.
        """
        rows = [
            shard[start : start + self.n_ctx + 1]
            for shard in self.shards
            for start in range(0, len(shard) - 1, self.n_ctx)
        ]
        for begin in range(0, len(rows), size):
            chunk = rows[begin : begin + size]
            yield self._stack((chunk + [chunk[0][:0]] * (size - len(chunk)))[part])

    def _window(self, index: int) -> np.ndarray:
        shard = int(np.searchsorted(self._ends, index, side="right"))
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
                f"{self.name} holds token id {high}, outside the vocabulary 0..{self.n_vocab - 1}; "
                "was it made with another tokenizer?"
            )


@functools.lru_cache(maxsize=4)
def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of `count` windows in an epoch: a permutation of 0..count-1."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(count)
