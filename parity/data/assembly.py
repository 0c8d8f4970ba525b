"""The second pass of a preparation: each shard, from the tokens of the units that it spans."""

import bisect
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from parity.data.preparation import Preparation
from parity.data.shard_index import SPLITS, shard_name
from parity.data.splits import document_blocks, map_array
from parity.data.token_files import bin_header
from parity.errors import InputError
from parity.storage.atomic import named_errors

_COPY_TOKENS = 2**19


def make_shard(preparation: Preparation, split: str, number: int) -> dict[str, Any]:
    """Write a shard, unless it has been written already.

    Args:
        preparation: A preparation whose first pass is complete.
        split: "train" or "val".
        number: Index of the shard in its split.

    Returns:
        Its entry of index.json: {name, tokens, sha256}.

    Raises:
        InputError: If a result of the first pass is missing or damaged, and for other versions than those of the worker
            that began the preparation.
    """
    preparation.check_worker()
    entry = load_shard(preparation, split, number)
    if entry is None:
        try:
            entry = _write_shard(preparation, split, number)
        except (InputError, OSError):  # another process may have written it, and deleted the tokens
            entry = load_shard(preparation, split, number)
            if entry is None:
                raise
    return entry


def _write_shard(preparation: Preparation, split: str, number: int) -> dict[str, Any]:
    starts = preparation.read(preparation.work / "starts.json")
    if starts is None:
        raise InputError(f"{preparation.work / 'starts.json'} is missing; run the first pass again")
    name, begin = shard_name(split, number), number * preparation.shard_tokens
    end = min(begin + preparation.shard_tokens, starts[split][-1])
    part, sha256 = preparation.work / f"{name}.{secrets.token_hex(8)}.part", hashlib.sha256()
    try:
        with named_errors(part), part.open("wb") as file:
            for data in _content(preparation, starts, split, begin, end):
                file.write(data)
                sha256.update(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(preparation.out / name)
    finally:
        part.unlink(missing_ok=True)
    entry = {"name": name, "tokens": end - begin, "sha256": sha256.hexdigest()}
    preparation.write(_entry_file(preparation, name), entry)
    return entry


def load_shard(preparation: Preparation, split: str, number: int) -> dict[str, Any] | None:
    """Return the entry of a shard that has been written; None if it is missing or does not have its size."""
    name = shard_name(split, number)
    entry, path = preparation.read(_entry_file(preparation, name)), preparation.out / name
    if entry is None or not path.is_file() or path.stat().st_size != len(bin_header(0)) + 2 * entry["tokens"]:
        return None
    return {key: entry[key] for key in ("name", "tokens", "sha256")}


def _entry_file(preparation: Preparation, name: str) -> Path:
    return (preparation.work / name).with_suffix(".json")


def _content(preparation: Preparation, starts: dict[str, Any], split: str, begin: int, end: int) -> Iterator[bytes]:
    """Yield the bytes of a shard: its header and the tokens from `begin` to `end` of the split."""
    yield bin_header(end - begin, preparation.tokenizer.n_vocab)
    first = bisect.bisect_right(starts[split], begin) - 1
    for unit in range(first, bisect.bisect_left(starts[split], end)):
        if starts[split][unit + 1] > starts[split][unit]:
            yield from _unit_content(preparation, starts, split, unit, begin, end)


def _unit_content(
    preparation: Preparation, starts: dict[str, Any], split: str, unit: int, begin: int, end: int
) -> Iterator[bytes]:
    """Yield the tokens of a unit that are between `begin` and `end` of the split."""
    first, after = starts["documents"][unit : unit + 2]
    n_tokens = sum(starts[name][unit + 1] - starts[name][unit] for name in SPLITS)
    tokens = map_array(preparation, unit, "tokens", "<u2", n_tokens)
    at, at_split = 0, starts[split][unit]
    for lengths, validation in document_blocks(preparation, unit, first, after - first):
        chosen = validation == (split == "val")
        for low, high in find_ranges(lengths, chosen, begin - at_split, end - at_split):
            for place in range(at + low, at + high, _COPY_TOKENS):
                yield tokens[place : min(place + _COPY_TOKENS, at + high)].tobytes()
        at += int(lengths.sum())
        at_split += int(lengths[chosen].sum())
        if at_split >= end:
            break


def find_ranges(lengths: np.ndarray, chosen: np.ndarray, begin: int, end: int) -> list[tuple[int, int]]:
    """Return where the tokens from `begin` to `end` of the chosen documents are among the tokens of all.

    Args:
        lengths: Number of tokens of each document, int64 [D].
        chosen: Whether a document is chosen, bool [D].
        begin: Number of tokens of chosen documents before the range; less than 0 means 0.
        end: The same for its end; more than all tokens means all.

    Returns:
        Ranges (first token, end), in order and not adjacent.
    """
    own = lengths[chosen]
    ends = np.cumsum(own)  # among the tokens of the chosen documents
    first, last = np.searchsorted(ends, begin, "right"), np.searchsorted(ends - own, end, "left")
    if first >= last:
        return []
    low, high = (np.cumsum(lengths) - lengths)[chosen][first:last], np.cumsum(lengths)[chosen][first:last]
    low[0] += max(begin - int(ends[first] - own[first]), 0)
    high[-1] -= max(int(ends[last - 1]) - end, 0)
    gaps = np.flatnonzero(low[1:] != high[:-1])
    return list(zip(low[[0, *(gaps + 1)]].tolist(), high[[*gaps, -1]].tolist(), strict=True))
