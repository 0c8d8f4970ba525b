"""What the workers of one preparation have in common, and the folder through which they share their results.

A preparation has two passes. The first turns the sources into tokens, unit by unit: a unit is a source file, or several
small ones that follow each other. The second writes the shards. Units, and then shards, may be made in any order and in
any number of processes, on one machine or many, and a worker may end at any moment: a result is written under a name of
its own and then renamed, and a piece of work whose result exists is not done again.

Until index.json is complete, the folder `work` inside the output folder contains

- of each unit `000012.tokens` (uint16, with the end-of-text tokens), `000012.lengths` (int64, the number of tokens of
  each document) and then `000012.json`, which marks it as complete; or `000012.error`, the reason why it failed;
- `starts.json`, written after the last unit: the number of documents, and of tokens of each split, before each unit;
- of each complete shard `train_000003.json`, with its sha256;
- files with a random part in their names, which are not complete.
"""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import parity
from parity.data import shard_index
from parity.data.tokenizer import Tokenizer
from parity.errors import InputError
from parity.storage.atomic import replace_text
from parity.storage.json import LISTING, read_object

_UNIT_BYTES = 64 * 2**20
_MOST_UNITS = 1024  # of small files: with one unit for each of 100,000, writing the results would take the most time


def versions(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the versions that decide about the tokens; reading a vocabulary compares it with OpenAI's by itself."""
    current = {"Python": platform.python_version(), "gpt-parity": parity.__version__}
    if tokenizer.name == "gpt2":
        current["tiktoken"] = version("tiktoken")
    return current


@dataclasses.dataclass(frozen=True)
class Preparation:
    """A preparation, as every worker knows it; small enough to be sent along with each piece of work."""

    out: Path
    """The folder for the shards."""
    tokenizer: Tokenizer
    """Encodes the documents."""
    text_field: str
    """Field of JSON and column of Parquet that holds the text."""
    validation_fraction: float
    """Fraction of the documents that go to validation."""
    shard_tokens: int
    """Number of tokens per shard."""
    versions: Mapping[str, str]
    """Versions of Python and of the packages that decide about the tokens, which every worker must have."""
    digest: str
    """sha256 of everything that decides about the results; each of them records it."""

    @property
    def work(self) -> Path:
        """The folder of the results that are not shards."""
        return self.out / "work"

    def unit_file(self, number: int, kind: str) -> Path:
        """Return the path of a result of a unit."""
        return self.work / f"{number:06d}.{kind}"

    def check_worker(self) -> None:
        """Raise InputError if this process has other versions than the one that began the preparation."""
        current = versions(self.tokenizer)
        if different := [name for name in self.versions if current.get(name) != self.versions[name]]:
            begun = ", ".join(f"{name} {self.versions[name]}" for name in different)
            here = ", ".join(f"{name} {current.get(name, 'missing')}" for name in different)
            raise InputError(
                f"{self.out} is being prepared with {begun}, but this process on {platform.node()} has {here}; use the "
                "same versions everywhere, or empty the folder"
            )

    def write(self, path: Path, entries: Mapping[str, Any]) -> None:
        """Write a result as JSON."""
        replace_text(path, json.dumps({"preparation": self.digest, **entries}) + "\n", shared=True)

    def read(self, path: Path) -> dict[str, Any] | None:
        """Return a result; None if it does not exist yet.

        Raises:
            InputError: If it is damaged or belongs to a preparation with other options.
        """
        hint = f"empty {self.out} and prepare again"
        try:
            if not path.exists():
                return None
            entries = read_object(path, LISTING)
        except InputError as error:
            raise InputError(f"{error}; {hint}") from None
        if entries.get("preparation") != self.digest:
            raise InputError(f"{path} belongs to a preparation with other options; {hint}")
        return entries


Unit = Sequence[Mapping[str, Any]]
"""The sources of a unit, as index.json lists them."""


def begin(out: Path, options: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[Preparation, list[Unit]] | None:
    """Begin a preparation, or join the one that has begun in a folder.

    Args:
        out: An existing folder.
        options: The first entries of index.json: tokenizer, sources, text_field, validation_fraction, shard_tokens.
        tokenizer: Encodes the documents.

    Returns:
        The preparation and its units, in order; None if it is complete.

    Raises:
        InputError: If the folder was prepared with other options, is being prepared with other versions, or holds token
            files of another origin.
    """
    if not (out / shard_index.INDEX).exists():
        shard_index.check_unprepared(out)
        sizes = [source["bytes"] for source in options["sources"]]
        shard_index.write_unfinished(out, {**options, "units": _first_sources(sizes), "versions": versions(tokenizer)})
    index = shard_index.load_index(out)
    shard_index.compare_options(out, index, options)
    if index["complete"]:
        return None
    paths = [source["path"] for source in options["sources"]]
    first, stated = index["units"], index["versions"]
    shared = {**options, "sources": paths, "units": first, "versions": stated}
    digest = hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()
    preparation = Preparation(
        out,
        tokenizer,
        options["text_field"],
        options["validation_fraction"],
        options["shard_tokens"],
        stated,
        digest,
    )
    preparation.check_worker()
    preparation.work.mkdir(exist_ok=True)
    ends = [*first[1:], len(paths)]
    return preparation, [options["sources"][begin:end] for begin, end in zip(first, ends, strict=True)]


def _first_sources(sizes: Sequence[int]) -> list[int]:
    """Return the index of the first source of each unit. Only small files share a unit."""
    most = min(_UNIT_BYTES, sum(sizes) // _MOST_UNITS)
    first, filled = [0], 0
    for index, size in enumerate(sizes):
        if index and filled + size > most:
            first.append(index)
            filled = 0
        filled += size
    return first
