"""Texts as token ids in padded batches, with the place that a classifier reads, and with their labels for training."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from parity.config import IGNORE_INDEX, GPTConfig
from parity.data.window_order import order
from parity.errors import InputError
from parity.tuning.examples import bucket
from parity.weights.classifier import ClassifierConfig

_AT_ONCE = 32
_EMPTY = np.zeros(0, np.int32)


class LabeledText(NamedTuple):
    """One text."""

    inputs: np.ndarray
    """Token ids, int32 [T]."""
    label: int
    """Number of its label."""


def pad_texts(
    texts: Sequence[np.ndarray], classifier: ClassifierConfig, n_ctx: int, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return int32 inputs [B, T], padded at the end, and lengths [B]: the head reads position length - 1.

    Args:
        texts: Token ids of each text, int32 [T].
        classifier: If it reads the last position, all texts are padded to its length, and longer ones are cut.
        n_ctx: The model's context.
        longest: Length of the longest text of the batch, of which these may be a part; texts are padded to its bucket.
    """
    T = classifier.length or bucket(longest, n_ctx)
    inputs = np.full((len(texts), T), classifier.pad_id, np.int32)
    for row, text in zip(inputs, texts, strict=True):
        row[: len(text)] = text[:T]
    lengths = [T if classifier.position == "last" else max(1, len(text)) for text in texts]
    return inputs, np.array(lengths, np.int32)


def label_batches(
    texts: Sequence[Sequence[int] | np.ndarray], classifier: ClassifierConfig, config: GPTConfig
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yield (numbers of the texts in a batch, inputs, lengths) until each text was in one, the shortest first.

    All batches have the same number of rows, so that a batch may have more rows than numbers.

    Args:
        texts: Token ids of each text.
        classifier: See pad_texts().
        config: Configuration of the model.

    Raises:
        InputError: For a text that is not integers, has an id outside the vocabulary, or is longer than the context
            and not cut.
    """
    arrays = [_checked(text, number, classifier, config) for number, text in enumerate(texts)]
    size = min(_AT_ONCE, 1 << (len(arrays) - 1).bit_length())
    by_length = sorted(range(len(arrays)), key=lambda number: len(arrays[number]))
    for first in range(0, len(arrays), size):
        numbers = by_length[first : first + size]
        rows = [arrays[number] for number in numbers] + [_EMPTY] * (size - len(numbers))
        yield numbers, *pad_texts(rows, classifier, config.n_ctx, len(arrays[numbers[-1]]))


def _checked(
    text: Sequence[int] | np.ndarray, number: int, classifier: ClassifierConfig, config: GPTConfig
) -> np.ndarray:
    try:
        ids = np.asarray(text)
    except ValueError:  # rows of different lengths
        ids = np.empty((0, 0))
    if ids.shape == (0,):
        return _EMPTY
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(f"text {number} must be a sequence of token ids (integers), got {text!r:.60}")
    length = min(len(ids), classifier.length or len(ids))
    try:
        config.check_tokens((1, length), int(ids.min()), int(ids.max()))
    except InputError as error:
        raise InputError(f"text {number}: {error}") from None
    return ids.astype(np.int32)


class LabeledTexts:
    """A dataset of texts with labels; implements parity.data.windows.Dataset, which documents the methods.

    A batch is (inputs [B, T], targets [B], lengths [B]), all int32; see pad_texts(). The target of a row that only
    fills a batch is IGNORE_INDEX. The order is that of windows. Texts are not sorted by length as examples are, because
    the length may depend on the label, and a batch would then have texts of few labels.

    Args:
        texts: The texts.
        classifier: The classifier.
        n_ctx: The model's context, which no text exceeds.
    """

    def __init__(self, texts: Sequence[LabeledText], classifier: ClassifierConfig, n_ctx: int):
        self.texts, self.classifier, self.n_ctx = list(texts), classifier, n_ctx

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def n_targets(self) -> int:
        return len(self.texts)

    def batch(self, seed: int, step: int, size: int, places: Sequence[int] | None = None) -> tuple[np.ndarray, ...]:
        chosen: list[LabeledText | None] = [self.texts[index] for index in self.batch_windows(seed, step, size)]
        return self._stack(chosen, range(size) if places is None else places)

    def batch_windows(self, seed: int, step: int, size: int) -> list[int]:
        epochs, offsets = np.divmod(np.arange(step * size, (step + 1) * size), len(self))
        return [int(order(seed, int(e), len(self))[o]) for e, o in zip(epochs, offsets, strict=True)]

    def in_order(self, size: int, part: slice = slice(None)) -> Iterator[tuple[np.ndarray, ...]]:
        remaining = iter(self.texts)
        while chunk := list(itertools.islice(remaining, size)):
            yield self._stack([*chunk, *[None] * (size - len(chunk))], range(size)[part])

    def _stack(self, rows: Sequence[LabeledText | None], places: Sequence[int]) -> tuple[np.ndarray, ...]:
        longest = max(len(row.inputs) for row in rows if row is not None)
        chosen = [rows[place] for place in places]
        texts = [_EMPTY if row is None else row.inputs for row in chosen]
        inputs, lengths = pad_texts(texts, self.classifier, self.n_ctx, longest)
        targets = np.array([IGNORE_INDEX if row is None else row.label for row in chosen], np.int32)
        return inputs, targets, lengths
