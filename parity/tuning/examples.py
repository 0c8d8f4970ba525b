"""Examples of different lengths as batches of few sizes; the training loop takes them in place of windows."""

import abc
import itertools
from collections.abc import Iterator, Sequence
from typing import Generic, Literal, NamedTuple, Protocol, Self, TypeVar

import numpy as np

from parity.config import IGNORE_INDEX
from parity.data.window_order import order
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


class Row(Protocol):
    """An example that becomes one row of a batch, of texts that are padded to one length."""

    @property
    def length(self) -> int:
        """Number of positions of the longest text."""

    @property
    def n_targets(self) -> int:
        """Number of terms that the row adds to the sum of the losses; 0 if nothing is scored."""

    def cut(self, length: int) -> Self:
        """Return the row with texts of at most `length` positions."""


AnyRow = TypeVar("AnyRow", bound=Row)


class Fitted(NamedTuple, Generic[AnyRow]):
    """Examples that fit into a context."""

    examples: list[AnyRow]
    n_cut: int
    """Number of examples that lost their end, and with it their end-of-text token."""
    n_dropped: int
    """Number of examples that were left out."""

    def __str__(self) -> str:
        return f"{self.n_cut} cut, {self.n_dropped} dropped"


def fit(
    examples: Sequence[AnyRow], origins: Sequence[str], max_length: int, overlong: Overlong = "cut", name: str = "data"
) -> Fitted[AnyRow]:
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
        if example.length <= max_length:
            fitted.append(example)
            continue
        if overlong == "refuse":
            raise InputError(
                f"{origin}: the example has {example.length} positions, more than {max_length}; shorten it, or "
                "use --overlong cut or drop"
            )
        cut = example.cut(max_length)
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


class Rows(abc.ABC, Generic[AnyRow]):
    """A dataset of examples of any kind; implements parity.data.windows.Dataset, which documents the methods.

    The examples of a batch are padded at their end to the bucket of the longest one. The order is that of windows: each
    epoch contains every example once, in a permutation that depends on the seed and the epoch. Within each pool of
    POOL batches the examples are then sorted by length, so that those of a batch are of similar length, and the batches
    of the pool are shuffled.

    Args:
        examples: The examples.
        n_ctx: The model's context, which no example exceeds.
        pad_id: Input at the positions after the end of an example; it has no effect on the positions before.
    """

    def __init__(self, examples: Sequence[AnyRow], n_ctx: int, pad_id: int):
        self.examples, self.n_ctx, self.pad_id = list(examples), n_ctx, pad_id
        self._pools: dict[tuple[int, int, int], np.ndarray] = {}  # the newest one

    @abc.abstractmethod
    def arrays(self, rows: Sequence[AnyRow | None], T: int) -> tuple[np.ndarray, ...]:
        """Return the batch of rows whose texts are padded to T positions; None is a row without targets."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def n_targets(self) -> int:
        return sum(example.n_targets for example in self.examples)

    def batch(self, seed: int, step: int, size: int, places: Sequence[int] | None = None) -> tuple[np.ndarray, ...]:
        chosen: list[AnyRow | None] = [self.examples[index] for index in self.batch_windows(seed, step, size)]
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
            by_length = sorted(chosen, key=lambda index: self.examples[index].length)
            batches = np.array(by_length).reshape(POOL, size)
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number, POOL])))
            pool = batches[generator.permutation(POOL)]
            self._pools = {(seed, number, size): pool}
        return pool

    def in_order(self, size: int, part: slice = slice(None)) -> Iterator[tuple[np.ndarray, ...]]:
        remaining = iter(self.examples)
        while chunk := list(itertools.islice(remaining, size)):
            yield self._stack([*chunk, *[None] * (size - len(chunk))], range(size)[part])

    def _stack(self, rows: Sequence[AnyRow | None], places: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Pad the rows at the places to the bucket of the longest of all rows."""
        T = bucket(max(row.length for row in rows if row is not None), self.n_ctx)
        return self.arrays([rows[place] for place in places], T)

    def pad(self, texts: Sequence[Example | None], T: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs and targets int32 [len(texts), T]; None is a text without targets."""
        inputs = np.full((len(texts), T), self.pad_id, np.int32)
        targets = np.full((len(texts), T), IGNORE_INDEX, np.int32)
        for number, text in enumerate(texts):
            if text is not None:
                inputs[number, : text.length] = text.inputs
                targets[number, : text.length] = text.targets
        return inputs, targets


class Examples(Rows[Example]):
    """A dataset of texts whose next tokens are predicted; the batches are (inputs, targets), both int32 [B, T]."""

    def arrays(self, rows: Sequence[Example | None], T: int) -> tuple[np.ndarray, np.ndarray]:
        return self.pad(rows, T)
