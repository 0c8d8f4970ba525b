"""Which documents are for validation, and where the tokens of each unit are in the two splits."""

import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from parity.data.preparation import Preparation
from parity.data.shard_index import SPLITS
from parity.errors import InputError

_LOW = 2**16
_BLOCK = 2**18  # documents


def is_validation(first: int, count: int, fraction: float) -> np.ndarray:
    """Return which documents are for validation: those whose CRC-32 is below a fraction of 2^32.

    Args:
        first: Index of the first document, over all sources.
        count: Number of documents.
        fraction: Expected fraction of the documents that are for validation.

    Returns:
        bool [count].
    """
    parts = [np.empty(0, bool)]
    number = first
    while number < first + count:
        high, low = divmod(number, _LOW)
        end = min(_LOW, low + first + count - number)
        parts.append((_crc32_of_low_bits()[low:end] ^ _difference(high)) < fraction * 2**32)
        number += end - low
    return np.concatenate(parts)


def _crc32(number: int) -> int:
    return zlib.crc32(number.to_bytes(8, "little"))


@functools.cache
def _crc32_of_low_bits() -> np.ndarray:
    """CRC-32 of the numbers below 2^16, uint32 [2^16]."""
    return np.array([_crc32(number) for number in range(_LOW)], np.uint32)


def _difference(high: int) -> np.uint32:
    """What the other bits of a number change: the CRC-32 of (a XOR b) is crc(a) XOR crc(b) XOR crc(0)."""
    return np.uint32(_crc32(high * _LOW) ^ _crc32(0))


def document_blocks(
    preparation: Preparation, unit: int, first: int, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the documents of a unit in blocks, so that no unit has to fit in memory.

    Args:
        preparation: The preparation.
        unit: Index of the unit.
        first: Index of its first document, over all sources.
        count: Number of its documents.

    Yields:
        The number of tokens of each document, int64 [D], and whether it is for validation, bool [D].
    """
    if not count:
        return  # an empty file cannot be mapped
    lengths = map_array(preparation, unit, "lengths", "<i8", count)
    for begin in range(0, count, _BLOCK):
        block = np.array(lengths[begin : begin + _BLOCK])
        yield block, is_validation(first + begin, len(block), preparation.validation_fraction)


def map_array(preparation: Preparation, number: int, kind: str, dtype: str, count: int) -> np.ndarray:
    """Memory-map a file of a unit; raises InputError if it does not have the size that the unit's result states."""
    path = preparation.unit_file(number, kind)
    size = count * np.dtype(dtype).itemsize
    if not path.is_file() or path.stat().st_size != size:
        raise InputError(f"{path} is missing or does not have {size} bytes; empty {preparation.out} and prepare again")
    return np.memmap(path, dtype, mode="r", shape=(count,))


def find_starts(preparation: Preparation, n_units: int) -> dict[str, Any]:
    """Return where each unit begins, once all units have been made; the first caller computes it for all workers.

    Args:
        preparation: The preparation.
        n_units: Number of units.

    Returns:
        {"documents", "train", "val": list of [n_units + 1] numbers}: how many documents of all, and tokens of each
        split, come before each unit, and at last the sums.

    Raises:
        InputError: If a result is missing or damaged.
    """
    path = preparation.work / "starts.json"
    starts = preparation.read(path)
    if starts is not None:
        return starts
    counts: dict[str, list[int]] = {"documents": [], "train": [], "val": []}
    first = 0
    for number in range(n_units):
        result = preparation.read(preparation.unit_file(number, "json"))
        if result is None:
            raise InputError(f"{preparation.unit_file(number, 'json')} is missing; run the first pass again")
        n_documents = result["documents"]
        n_tokens = n_validation = 0
        for lengths, validation in document_blocks(preparation, number, first, n_documents):
            n_tokens += int(lengths.sum())
            n_validation += int(lengths[validation].sum())
        if n_tokens != result["tokens"]:
            raise InputError(
                f"{preparation.unit_file(number, 'lengths')} is damaged; empty {preparation.out} and prepare again"
            )
        for key, count in zip(counts, (n_documents, n_tokens - n_validation, n_validation), strict=True):
            counts[key].append(count)
        first += n_documents
    starts = {key: _before(values) for key, values in counts.items()}
    preparation.write(path, starts)
    return starts


def _before(counts: Sequence[int]) -> list[int]:
    return [0, *map(int, np.cumsum(counts))]


def shard_list(preparation: Preparation, starts: dict[str, Any]) -> list[tuple[str, int]]:
    """Return (split, number) of all shards: first those for validation, which contain a little of each unit."""
    return [
        (split, number)
        for split in reversed(SPLITS)
        for number in range(-(-starts[split][-1] // preparation.shard_tokens))
    ]
