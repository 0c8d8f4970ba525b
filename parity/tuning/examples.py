"""Examples of different lengths as batches of few sizes; the training loop takes them in place of windows."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from parity.config import IGNORE_INDEX
from parity.data.windows import order
from parity.errors import InputError
from parity.tuning.encoding import Example

Overlong = Literal["cut", "drop", "refuse"]
_SMALLEST = 16
POOL = 16
"""Number of consecutive batches whose examples are sorted by length."""


def bucket(length: int, n_ctx: int) -> int:
    """Return the length to which a batch is padded: 16, 24, ..., 64, 80, 96, 112, 128, 160, ..., at most n_ctx.

    JAX compiles the training step once per length, of which there are four between a power of two and the next.
    """
    step = max(8, 1 << max(0, (length - 1).bit_length() - 3))
    return min(max(_SMALLEST, -(-length // step) * step), n_ctx)


class Fitted(NamedTuple):
    """Examples that fit into a context."""

    examples: list[Example]
    n_cut: int
    """Number of examples that lost their end, and with it their end-of-text token."""
    n_dropped: int
    """Number of examples that were left out."""

    def __str__(self) -> str:
        return f"{self.n_cut} cut, {self.n_dropped} dropped"


def fit(
    examples: Sequence[Example], origins: Sequence[str], max_length: int, overlong: Overlong = "cut", name: str = "data"
) -> Fitted:
    """Shorten or leave out the examples that have more than `max_length` positions.

    Args:
        examples: The examples.
        origins: Where each is from, for messages.
        max_length: Largest number of positions.
        overlong: "cut" removes the end of an example, and leaves it out if nothing that is scored remains; "drop"
            leaves out every example that is too long; "refuse" raises InputError.
        name: Name of the data in messages.

    Raises:
        InputError: If an example is too long and `overlong` is "refuse", or if no example remains.
    """
    fitted, n_cut, n_dropped = [], 0, 0
    for example, origin in zip(examples, origins, strict=True):
        if len(example.inputs) <= max_length:
            fitted.append(example)
            continue
        if overlong == "refuse":
            raise InputError(
                f"{origin}: the example has {len(example.inputs)} positions, more than {max_length}; shorten it, or "
                "use --overlong cut or drop"
            )
        cut = Example(example.inputs[:max_length], example.targets[:max_length])
        if overlong == "cut" and cut.n_targets:
            fitted.append(cut)
            n_cut += 1
        else:
            n_dropped += 1
    if not fitted:
        raise InputError(
            f"{name}: none of the {len(examples)} examples fits into {max_length} positions; use a model with a longer "
            "context, or shorter examples"
        )
    return Fitted(fitted, n_cut, n_dropped)


class Examples:
    """A dataset of examples; implements parity.data.windows.Dataset, which documents the methods.

    The examples of a batch are padded at their end to the bucket of the longest one. The order is that of windows: each
    epoch contains every example once, in a permutation that depends on the seed and the epoch. Within each pool of
    POOL batches the examples are then sorted by length, so that those of a batch are of similar length, and the batches
    of the pool are shuffled.

    Args:
        examples: The examples.
        n_ctx: The model's context, which no example exceeds.
        pad_id: Input at the positions after the end of an example; it has no effect on the positions before.
    """

    def __init__(self, examples: Sequence[Example], n_ctx: int, pad_id: int):
        self.examples, self.n_ctx, self.pad_id = list(examples), n_ctx, pad_id
        self._pools: dict[tuple[int, int, int], np.ndarray] = {}  # the newest one

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def n_targets(self) -> int:
        return sum(example.n_targets for example in self.examples)

    def batch(
        self, seed: int, step: int, size: int, places: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        chosen: list[Example | None] = [self.examples[index] for index in self.batch_windows(seed, step, size)]
        return self._stack(chosen, range(size) if places is None else places)

    def batch_windows(self, seed: int, step: int, size: int) -> list[int]:
        return self._pool(seed, step // POOL, size)[step % POOL].tolist()

    def _pool(self, seed: int, number: int, size: int) -> np.ndarray:
        """Return the indices of the examples in the batches of a pool, [POOL, size]."""
        pool = self._pools.get((seed, number, size))
        if pool is None:
            places = range(number * POOL * size, (number + 1) * POOL * size)
            epochs, count = (place // len(self) for place in places), len(self)
            chosen = [order(seed, epoch, count)[place % count] for epoch, place in zip(epochs, places, strict=True)]
            by_length = sorted(chosen, key=lambda index: len(self.examples[index].inputs))
            batches = np.array(by_length).reshape(POOL, size)
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number, POOL])))
            pool = batches[generator.permutation(POOL)]
            self._pools = {(seed, number, size): pool}
        return pool

    def in_order(self, size: int, part: slice = slice(None)) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        remaining = iter(self.examples)
        while chunk := list(itertools.islice(remaining, size)):
            yield self._stack([*chunk, *[None] * (size - len(chunk))], range(size)[part])

    def _stack(self, rows: Sequence[Example | None], places: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Pad the rows at the places to the bucket of the longest of all rows; None is a row without targets."""
        T = bucket(max(len(row.inputs) for row in rows if row is not None), self.n_ctx)
        inputs = np.full((len(places), T), self.pad_id, np.int32)
        targets = np.full((len(places), T), IGNORE_INDEX, np.int32)
        for number, place in enumerate(places):
            if (row := rows[place]) is not None:
                inputs[number, : len(row.inputs)] = row.inputs
                targets[number, : len(row.targets)] = row.targets
        return inputs, targets
