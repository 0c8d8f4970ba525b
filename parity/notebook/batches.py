"""Text as windows and batches of token ids, and token ids as text."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from parity.data.tokenizer import END_OF_TEXT, load_tokenizer
from parity.data.window_order import order
from parity.errors import InputError


def check_positive(**numbers: int) -> None:
    """Raise InputError for a number below 1, by its name."""
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name} must be at least 1, got {number}")


class GPTDatasetV1:
    """Windows over a text: item i is (inputs, targets), both int64 [T], with the targets one position later.

    Args:
        txt: The text.
        tokenizer: One of parity/data/tokenizer.py, or of tiktoken.
        max_length: Length T of a window, in tokens.
        stride: Distance between the starts of two windows, in tokens.

    Raises:
        InputError: For a text that is shorter than one window, and for a length or stride below 1.
    """

    def __init__(self, txt: str, tokenizer: Any, max_length: int, stride: int):
        check_positive(max_length=max_length, stride=stride)
        ids = np.array(tokenizer.encode(txt, allowed_special={END_OF_TEXT}), np.int64)
        if len(ids) <= max_length:
            raise InputError(f"the text has {len(ids)} tokens, but a window needs max_length + 1 = {max_length + 1}")
        starts = range(0, len(ids) - max_length, stride)
        self.input_ids = np.stack([ids[start : start + max_length] for start in starts])  # [windows, T]
        self.target_ids = np.stack([ids[start + 1 : start + max_length + 1] for start in starts])  # [windows, T]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.input_ids[index], self.target_ids[index]


class DataLoader:
    """Batches of a dataset: each is (inputs [B, T], targets [B, T]).

    The order of an epoch depends only on the seed and on the number of epochs before it, so it is the same in both
    backends.

    Args:
        dataset: The windows.
        batch_size: Windows per batch, B.
        shuffle: Whether the order is random.
        drop_last: Whether the last batch of an epoch is left out if it is smaller than the others.
        seed: Seed of the order.
        convert: Turns an int64 NumPy array into an array of a framework.

    Raises:
        InputError: For a batch size below 1.
    """

    def __init__(
        self,
        dataset: GPTDatasetV1,
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        seed: int,
        convert: Callable[[np.ndarray], Any],
    ):
        check_positive(batch_size=batch_size)
        self.dataset, self.batch_size, self.shuffle, self.drop_last = dataset, batch_size, shuffle, drop_last
        self.seed, self.epoch, self.convert = seed, 0, convert

    def __len__(self) -> int:
        batches = len(self.dataset) / self.batch_size
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        count = len(self.dataset)
        indices = order(self.seed, self.epoch, count) if self.shuffle else np.arange(count)
        self.epoch += 1
        for batch in range(len(self)):
            windows = indices[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield self.convert(self.dataset.input_ids[windows]), self.convert(self.dataset.target_ids[windows])


def create_dataloader(
    convert: Callable[[np.ndarray], Any],
    txt: str,
    batch_size: int = 4,
    max_length: int = 256,
    stride: int = 128,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
    seed: int = 0,
    tokenizer: Any = None,
) -> DataLoader:
    """Return batches of windows over a text; `create_dataloader_v1` of both backends.

    Args:
        convert: Turns an int64 NumPy array into an array of a framework.
        txt: The text.
        batch_size: Windows per batch.
        max_length: Length of a window, in tokens.
        stride: Distance between the starts of two windows, in tokens.
        shuffle: Whether the order of the windows is random.
        drop_last: Whether the last batch of an epoch is left out if it is smaller than the others.
        num_workers: Has no effect, as the windows are in memory; accepted so that the notebook's code runs unchanged.
        seed: Seed of the order.
        tokenizer: By default GPT-2's, with its vocabulary from the cache folder.

    Raises:
        InputError: For a text that is shorter than one window, and if the default tokenizer's vocabulary is missing.
    """
    dataset = GPTDatasetV1(txt, tokenizer or load_tokenizer("gpt2"), max_length, stride)
    return DataLoader(dataset, batch_size, shuffle, drop_last, seed, convert)


def encode_text(text: str, tokenizer: Any) -> np.ndarray:
    """Return the token ids of a text.

    Args:
        text: The text, in which `<|endoftext|>` is the special token.
        tokenizer: The tokenizer.

    Returns:
        Ids int64 [1, T].
    """
    return np.array([tokenizer.encode(text, allowed_special={END_OF_TEXT})], np.int64)


def token_ids_to_text(token_ids: Any, tokenizer: Any) -> str:
    """Return the text of token ids.

    Args:
        token_ids: Integer ids [1, T], an array of any framework.
        tokenizer: The tokenizer.
    """
    [row] = token_ids
    return tokenizer.decode(row.tolist())


def print_on_one_line(token_ids: Any, tokenizer: Any) -> None:
    """Print the text of token ids with spaces in place of line breaks.

    Args:
        token_ids: Integer ids [1, T], an array of any framework.
        tokenizer: The tokenizer.
    """
    print(token_ids_to_text(token_ids, tokenizer).replace("\n", " "))
