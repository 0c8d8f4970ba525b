"""Several examples in one row, with the number of each position's example, so that no example sees another."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from parity.config import IGNORE_INDEX
from parity.data.window_order import order
from parity.tuning.encoding import Example

PADDING = 0
"""Segment of the positions after the last example of a row; the examples are numbered from 1."""


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Distribute examples over rows, the longest first, each into the fullest row that has room for it.

    Args:
        lengths: Number of positions of each example, at most `room`.
        room: Number of positions of a row.

    Returns:
        The indices of the examples in each row, in rising order; the rows are sorted by their first example.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # the rows by the number of their free positions
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        free = next((free for free in range(length, room + 1) if with_room[free]), None)
        if free is None:
            row, free = len(rows), room
            rows.append([])
        else:
            row = with_room[free].pop()
        rows[row].append(index)
        with_room[free - length].append(row)
    return sorted(map(sorted, rows))


class Packed:
    """A dataset of rows that hold several examples; implements parity.data.windows.Dataset, which has the methods.

    A batch is (inputs, targets, segments), all int32 [B, T]; a segment is the number of an example in its row, from 1,
    and PADDING after the last. The distribution of the examples over rows is the same in every epoch; the order of the
    rows is a permutation that depends on the seed and the epoch.

    Args:
        examples: The examples.
        length: Number of positions T of a row, which no example exceeds.
        pad_id: Input at the positions after the last example of a row.
    """

    def __init__(self, examples: Sequence[Example], length: int, pad_id: int):
        self.examples, self.length, self.pad_id = list(examples), length, pad_id
        self.rows = best_fit([len(example.inputs) for example in self.examples], length)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_targets(self) -> int:
        return sum(example.n_targets for example in self.examples)

    def batch(self, seed: int, step: int, size: int, places: Sequence[int] | None = None) -> tuple[np.ndarray, ...]:
        rows = self._numbers(seed, step, size)
        return self._stack([self.rows[rows[place]] for place in (range(size) if places is None else places)])

    def batch_windows(self, seed: int, step: int, size: int) -> list[int]:
        return [index for row in self._numbers(seed, step, size) for index in self.rows[row]]

    def _numbers(self, seed: int, step: int, size: int) -> list[int]:
        """Return the numbers of the rows in a batch."""
        places, count = range(step * size, (step + 1) * size), len(self)
        return [int(order(seed, place // count, count)[place % count]) for place in places]

    def in_order(self, size: int, part: slice = slice(None)) -> Iterator[tuple[np.ndarray, ...]]:
        remaining = iter(self.rows)
        while chunk := list(itertools.islice(remaining, size)):
            yield self._stack([*chunk, *[[] for _ in range(size - len(chunk))]][part])

    def _stack(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, ...]:
        shape = len(rows), self.length
        inputs = np.full(shape, self.pad_id, np.int32)
        targets = np.full(shape, IGNORE_INDEX, np.int32)
        segments = np.full(shape, PADDING, np.int32)
        for number, row in enumerate(rows):
            start = 0
            for segment, index in enumerate(row, 1):
                example = self.examples[index]
                end = start + len(example.inputs)
                inputs[number, start:end], targets[number, start:end] = example
                segments[number, start:end] = segment
                start = end
        return inputs, targets, segments
